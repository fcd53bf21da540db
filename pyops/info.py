"""`pyops.info()`: what runs in this process, what does not, and how to get it."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from pyops import backend
from pyops._version import __version__
from pyops.ops import registry


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run kernels."""

    name: str
    active: bool
    why: str
    """What makes it active, or why it is missing."""
    get: str | None
    """How to get it, if it is missing."""


@dataclasses.dataclass(frozen=True)
class Info:
    """What `pyops.info()` found; `print` it, or take `to_dict()`."""

    version: str
    torch: str
    python: str
    cpu: str
    cores: int
    threads: int
    isa: str | None
    """Instruction set that the CPU kernels use; None without the compiled extension."""
    isas: list[str]
    """Those that PYOPS_CPU_ISA can force on this machine, ascending."""
    gpus: list[str]
    forced: str | None
    """PYOPS_BACKEND."""
    backends: list[Backend]
    ops: dict[str, dict[str, str]]
    """For each op: which kernel serves cpu and cuda tensors."""

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        isa = f"{self.isa} (available: {', '.join(self.isas)}; PYOPS_CPU_ISA forces one)" if self.isa else "-"
        lines = [
            f"pyops    {self.version}, torch {self.torch}, Python {self.python}",
            f"CPU      {self.cpu}, {self.cores} cores, {self.threads} threads",
            f"ISA      {isa}",
            f"GPU      {', '.join(self.gpus) or 'none that torch sees'}",
            f"forced   {f'PYOPS_BACKEND={self.forced}' if self.forced else 'nothing (PYOPS_BACKEND is not set)'}",
            "",
            "backends",
        ]
        for b in self.backends:
            lines.append(f"  {b.name:<8} {'active' if b.active else 'missing':<8} {b.why}")
            if b.get:
                lines.append(f"  {'':<8} {'':<8} to get it: {b.get}")
        lines += ["", "ops"]
        width = max((len(name) for name in self.ops), default=0)
        for name, kernels in self.ops.items():
            lines.append(
                f"  {name:<{width}}  " + "   ".join(f"{device}: {kernel}" for device, kernel in kernels.items())
            )
        return "\n".join(lines)


def info() -> Info:
    """What is active in this process and why: versions, CPU and instruction set, backends, the kernel of each op."""
    native = backend.native
    cuda = torch.cuda.is_available()
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=native.cpu_isa() if native else None,
        isas=native.available_cpu_isas() if native else [],
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        forced=backend.forced,
        backends=[_cpp(), _triton(), _cuda()],
        ops={name: {device: _kernel(name, device) for device in ("cpu", "cuda")} for name in registry.names},
    )


def _cpp() -> Backend:
    if backend.native is None:
        return Backend("cpp", False, backend.native_missing or "", _unforce() or backend.HOW_TO_BUILD)
    facts = backend.native.build_info()
    return Backend("cpp", True, f"built with {facts['compiler']} for torch >= {facts['torch_target']}", None)


def _triton() -> Backend:
    missing = backend.triton_missing()
    if missing is None:
        why = "in Triton's interpreter, on CPU tensors" if backend.triton_interpreted() else "on CUDA tensors"
        return Backend("triton", True, why, None)
    needs = (
        "pip install triton" if "not installed" in missing else "a CUDA build of torch on a machine with an NVIDIA GPU"
    )
    return Backend("triton", False, missing, _unforce() or needs)


def _cuda() -> Backend:
    if backend.native is None:
        return Backend("cuda", False, backend.native_missing or "", _unforce() or backend.HOW_TO_BUILD_CUDA)
    if not backend.native.build_info()["cuda"]:
        return Backend("cuda", False, "this build holds no CUDA C++ kernels", backend.HOW_TO_BUILD_CUDA)
    if not torch.cuda.is_available():
        return Backend("cuda", False, "torch sees no CUDA device", "a CUDA build of torch and an NVIDIA GPU")
    return Backend("cuda", True, "CUDA C++ kernels are in this build", None)


def _unforce() -> str | None:
    return f"unset PYOPS_BACKEND (it is {backend.forced})" if backend.forced else None


def _kernel(name: str, device: str) -> str:
    """Which kernel PyTorch's dispatcher would call for a tensor on `device`."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyops::{name}", device.upper()):
        return "ref"
    if device == "cpu":
        if backend.forced in (None, "cpp"):
            return f"cpp ({backend.native.cpu_isa()})" if backend.native else "ref"
        return "triton (interpreter)" if backend.forced == "triton" and backend.triton_interpreted() else "refused"
    if backend.forced in ("cpp", "cuda"):
        return "refused"
    return "triton" if backend.triton_missing() is None else f"triton, not usable: {backend.triton_missing()}"


def cpu_model() -> str:
    """Name of this machine's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
