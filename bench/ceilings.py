"""What this machine can do at best: arithmetic peaks and memory bandwidth, measured in a process of its own.

fp32_gflops     torch.mm, 2048³ (fp32)
int8_isa_gops   register-only loops of the compiled extension, one for each instruction set that it knows
int8_gops       the highest of those, None without the extension
int_mm_gops     torch._int_mm, 2048³: what a library reaches
read_gbs        bytes in the working set → GB/s (the extension's loop; without it the sum of an int64 tensor)
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
from pyops.bench.machine import wait_until_quiet
from pyops.bench.pool import child_environment

COPY_BYTES = 128 * 2**20


def measure(device: str, threads: int, quick: bool, working_sets: Iterable[float]) -> dict[str, Any]:
    """The ceilings at `threads` threads, from a fresh process; {"error": why} if that fails.

    Bandwidth is measured for each of `working_sets` (bytes, rounded to two digits): what fits a cache is read faster.
    """
    if not quick:
        wait_until_quiet(30.0, 0.15)
    sizes = sorted({int(float(f"{size:.1e}")) for size in working_sets})
    options = [device, str(threads), "quick" if quick else "full", *map(str, sizes)]
    command = [sys.executable, "-m", "pyops.bench.ceilings", *options]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True)
    if done.returncode:
        return {"error": f"exit status {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}"}
    return json.loads(done.stdout.splitlines()[-1])


def read_bandwidth(ceilings: dict[str, Any], working_set: float) -> float | None:
    """GB/s for reading a working set of so many bytes: that of the nearest size which was measured."""
    table = {int(size): gbs for size, gbs in ceilings.get("read_gbs", {}).items()}
    if not table:
        return None
    return table[min(table, key=lambda size: abs(math.log(size / working_set)))]


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


def _here(device: str, threads: int, quick: bool, sizes: list[int]) -> dict[str, Any]:
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

    native_read = device == "cpu" and hasattr(backend.native, "read_bandwidth_gbs")
    result["read_method"] = "pyops._C.read_bandwidth_gbs" if native_read else "torch.sum of int64"
    result["read_gbs"] = {}
    for nbytes in sizes:
        if native_read:
            part = max(nbytes, 4096 * threads)  # a page a thread at least
            gbs = max(float(backend.native.read_bandwidth_gbs(part, threads)) for _ in range(1 if quick else 3))
        else:
            data = torch.ones(max(nbytes // 8, 1), dtype=torch.int64, device=device)
            gbs = nbytes / _best_s(data.sum, seconds / 4, sync) / 1e9
        result["read_gbs"][nbytes] = gbs
    source = torch.ones(COPY_BYTES // 8, device=device)
    target = torch.zeros_like(source)
    result["copy_gbs"] = 2 * source.nbytes / _best_s(lambda: target.copy_(source), seconds, sync) / 1e9
    return result


if __name__ == "__main__":
    where, count, length, *read_sizes = sys.argv[1:]
    print(json.dumps(_here(where, int(count), length == "quick", [int(size) for size in read_sizes])))
