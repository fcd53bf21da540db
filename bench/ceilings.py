"""What this machine can do at best: arithmetic peaks and memory bandwidth, measured in a process of its own.

fp32_gflops     torch.mm, 2048³ (fp32)
int8_isa_gops   register-only loops of the compiled extension, one for each instruction set that it knows
int8_gops       the highest of those, None without the extension
int_mm_gops     torch._int_mm, 2048³: what a library reaches
read_gbs        bytes in the working set → GB/s (the extension's loop; without it the sum of an int64 tensor)
update_gbs      "R+U" → bytes in the working set → GB/s of reading R arrays and updating U others in place, an updated
                byte counted twice (the extension's loop; without it torch add_, which is 1+1)
copy_gbs        torch copy_, counting bytes read and written
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pyops import backend
from pyops.bench.case import Pass
from pyops.bench.machine import wait_until_quiet
from pyops.bench.pool import child_environment

COPY_BYTES = 128 * 2**20


def measure(
    device: str, threads: int, quick: bool, working_sets: Iterable[float], passes: Iterable[Pass] = ()
) -> dict[str, Any]:
    """The ceilings at `threads` threads, from a fresh process; {"error": why} if that fails.

    Bandwidth is measured for each of `working_sets` (bytes, rounded to two digits): what fits a cache is read faster.
    Likewise for the footprint of each of `passes`, with its mixture of reading and updating.
    """
    if not quick:
        wait_until_quiet(30.0, 0.15)
    passes = list(passes)
    sizes = {("read", _rounded(size)) for size in working_sets}
    sizes |= {("read" if not p.updates else f"{p.reads}+{p.updates}", _rounded(p.footprint)) for p in passes}
    options = [device, str(threads), "quick" if quick else "full", *(f"{kind}:{size}" for kind, size in sorted(sizes))]
    command = [sys.executable, "-m", "pyops.bench.ceilings", *options]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True)
    if done.returncode:
        return {"error": f"exit status {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}"}
    return json.loads(done.stdout.splitlines()[-1])


def _rounded(size: float) -> int:
    return int(float(f"{size:.1e}"))


def _nearest(table: dict[Any, float], working_set: float) -> float | None:
    by_size = {int(size): gbs for size, gbs in table.items()}
    if not by_size:
        return None
    return by_size[min(by_size, key=lambda size: abs(math.log(size / working_set)))]


def read_bandwidth(ceilings: dict[str, Any], working_set: float) -> float | None:
    """GB/s for reading a working set of so many bytes: that of the nearest size which was measured."""
    return _nearest(ceilings.get("read_gbs", {}), working_set)


def passes_ms(ceilings: dict[str, Any], passes: Iterable[Pass]) -> tuple[float, str] | None:
    """The least ms for `passes` over memory, one after the other; None if the bandwidth of one is unknown."""
    total = 0.0
    for part in passes:
        if part.updates:
            gbs = _nearest(ceilings.get("update_gbs", {}).get(f"{part.reads}+{part.updates}", {}), part.footprint)
        else:
            gbs = read_bandwidth(ceilings, part.footprint)
        if not gbs:
            return None
        total += part.bytes / gbs / 1e6
    return total, "memory"


def roof_ms(
    ceilings: dict[str, Any], peak: str, ops: float, moved: float, working_set: float
) -> tuple[float, str] | None:
    """The least ms for `ops` and `moved` bytes, and which of the two limits it; None if a ceiling is unknown."""
    gops, gbs = ceilings.get(peak), read_bandwidth(ceilings, working_set)
    if not gops or not gbs:
        return None
    return max((ops / gops / 1e6, "compute"), (moved / gbs / 1e6, "memory"))


def _best_s(call: Callable[[], object], seconds: float, sync: Callable[[], object]) -> float:
    """The shortest time of a call: noise only ever takes away from a ceiling."""
    call()
    sync()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        call()
        sync()
        best = min(best, time.perf_counter() - before)
    return best


def _native(device: str, what: str) -> Callable[..., float] | None:
    """The extension's loop that measures "read" or "update" bandwidth, where there is one."""
    return getattr(backend.native, f"{what}_bandwidth_gbs", None) if device == "cpu" else None


def _pass_gbs(
    device: str, threads: int, nbytes: int, reads: int, updates: int, seconds: float, sync: Callable[[], object]
) -> float:
    """GB/s of one pass over arrays of `nbytes` all together."""
    least = 4096 * threads * (reads + updates)  # a page a thread and array at least
    if updates:
        if update := _native(device, "update"):
            return float(update(max(nbytes, least), threads, reads, updates))
        source = torch.ones(max(nbytes // 8, 1), device=device)
        target = torch.zeros_like(source)
        return 3 * source.nbytes / _best_s(lambda: target.add_(source), seconds, sync) / 1e9
    if read := _native(device, "read"):
        return float(read(max(nbytes, least), threads))
    data = torch.ones(max(nbytes // 8, 1), dtype=torch.int64, device=device)
    return nbytes / _best_s(data.sum, seconds, sync) / 1e9


def _here(device: str, threads: int, quick: bool, sizes: list[tuple[str, int]]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    seconds, size = (0.15, 1024) if quick else (0.6, 2048)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        size *= 4

    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    result: dict[str, Any] = {"fp32_gflops": 2 * size**3 / _best_s(lambda: a @ b, seconds, sync) / 1e9}
    q_a, q_b = a.to(torch.int8), b.to(torch.int8)
    result["int_mm_gops"] = 2 * size**3 / _best_s(lambda: torch._int_mm(q_a, q_b.t()), seconds, sync) / 1e9

    isas: dict[str, float] = {}
    if device == "cpu" and hasattr(backend.native, "int8_peak_gops"):
        for isa in backend.native.available_cpu_isas():
            try:
                isas[isa] = max(float(backend.native.int8_peak_gops(isa, threads)) for _ in range(3))
            except ValueError:
                continue  # an instruction set whose peak nobody needs: it has no int8 dot product
    result["int8_isa_gops"] = isas
    # The ceiling of the instruction set in use: PYOPS_CPU_ISA may have lowered it.
    in_use = backend.native.cpu_isa() if isas else None
    result["int8_gops"] = isas.get(in_use, max(isas.values(), default=None))

    result["read_method"] = "pyops._C.read_bandwidth_gbs" if _native(device, "read") else "torch.sum of int64"
    result["update_method"] = "pyops._C.update_bandwidth_gbs" if _native(device, "update") else "torch add_ of float32"
    result["read_gbs"], result["update_gbs"] = {}, {}
    for kind, nbytes in sizes:
        reads, updates = map(int, kind.split("+")) if kind != "read" else (1, 0)
        table = result["update_gbs"].setdefault(kind, {}) if updates else result["read_gbs"]
        table[nbytes] = max(
            _pass_gbs(device, threads, nbytes, reads, updates, seconds / 4, sync) for _ in range(1 if quick else 3)
        )
    source = torch.ones(COPY_BYTES // 8, device=device)
    target = torch.zeros_like(source)
    result["copy_gbs"] = 2 * source.nbytes / _best_s(lambda: target.copy_(source), seconds, sync) / 1e9
    return result


if __name__ == "__main__":
    where, count, length, *wanted = sys.argv[1:]
    pairs = [word.split(":") for word in wanted]
    print(json.dumps(_here(where, int(count), length == "quick", [(kind, int(size)) for kind, size in pairs])))
