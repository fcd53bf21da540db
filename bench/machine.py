"""Which machine the numbers come from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

import pyops
from pyops import backend

ISA_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "sve", "sve2", "sme"),
)


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_s() -> float | None:
    """CPU seconds that the whole machine has spent, stolen time too; None where the system does not tell."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, *rest = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit_s: float, cpus: float) -> float:
    """Wait, at most `limit_s`, until less than `cpus` CPUs are busy; the seconds waited. To be called while idle."""
    began = time.monotonic()
    while (before := busy_s()) is not None and time.monotonic() - began < limit_s:
        time.sleep(0.25)
        if (busy_s() - before) / 0.25 < cpus:
            break
    return time.monotonic() - began


def _cpuinfo() -> tuple[str, list[str]]:
    """Model name and the flags that matter, from /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(re.findall(r"^(model name|flags|Features)\s*:\s*(.*)$", text, re.MULTILINE))
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), [flag for flag in ISA_FLAGS if flag in present]


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return found


def describe(device: str) -> dict[str, Any]:
    """CPU or GPU, software, date; what the compiled extension says of itself where it is present."""
    model, flags = _cpuinfo()
    description: dict[str, Any] = {
        "device": device,
        "cpu": model,
        "isa_flags": flags,
        "cores": cores(),
        "caches": _caches(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyops": pyops.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "backend_forced": backend.forced,
        "native": {"missing": backend.native_missing} if backend.native is None else {},
    }
    for fact in ("build_info", "cpu_isa"):
        if hasattr(backend.native, fact):
            description["native"][fact] = getattr(backend.native, fact)()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        description["gpu"] = properties.name
        description["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        description["cuda"] = torch.version.cuda
    return description


def slug(machine: dict[str, Any]) -> str:
    """A file name for the machine: the GPU, or CPU model, cores and the instruction set that matters most."""
    name = machine.get("gpu") or re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*$", " ", machine["cpu"])
    if "gpu" not in machine:
        order = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "i8mm")
        best = next((flag for flag in order if flag in machine["isa_flags"]), "")
        name = f"{name} {machine['cores']}c {best.split('_int8')[0]}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
