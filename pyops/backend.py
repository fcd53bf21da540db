"""Which kernels can run in this process, and why the others cannot.

`PYOPS_BACKEND` forces one of `ref` (plain PyTorch), `cpp` (the compiled CPU kernels), `triton` or `cuda`. It is read
once, at import. A forced backend that is missing raises; nothing falls back silently. Without it every device gets the
best kernel that is there: compiled C++ on CPU, Triton on CUDA, plain PyTorch elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from types import ModuleType

CHOICES = ("ref", "cpp", "triton", "cuda")

forced: str | None = os.environ.get("PYOPS_BACKEND") or None
if forced is not None and forced not in CHOICES:
    raise ValueError(f"PYOPS_BACKEND={forced!r} is not one of {', '.join(CHOICES)}")

native: ModuleType | None = None
"""`pyops._C`, the compiled extension, or None."""
native_missing: str | None = None
"""Why `native` is None."""


def _load_native() -> None:
    global native, native_missing
    if forced == "triton" and not triton_installed():
        raise ImportError("PYOPS_BACKEND=triton, but the package triton is not installed: pip install triton")
    if forced in ("ref", "triton"):
        native_missing = f"switched off by PYOPS_BACKEND={forced}"
        return
    try:
        _C = importlib.import_module("pyops._C")
    except ImportError as error:
        native_missing = f"the compiled extension did not load: {error}"
        if not isinstance(error, ModuleNotFoundError):  # it is there and broken: a torch of another build, say
            warnings.warn(f"pyops runs on its slow reference: {native_missing}", stacklevel=2)
        if forced is not None:
            raise ImportError(f"PYOPS_BACKEND={forced}, but {native_missing}. {HOW_TO_BUILD}") from error
        return
    if forced == "cuda" and not _C.build_info()["cuda"]:
        raise ImportError("PYOPS_BACKEND=cuda, but this build holds no CUDA kernels. " + HOW_TO_BUILD_CUDA)
    _C.cpu_isa()  # a bad PYOPS_CPU_ISA raises here, at import
    native = _C


HOW_TO_BUILD = "Build it with a C++17 compiler: pip install --no-build-isolation -e . (in the checkout)"
HOW_TO_BUILD_CUDA = "No op has CUDA C++ kernels yet; Triton serves CUDA tensors"


def triton_installed() -> bool:
    """True if the package triton is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def triton_missing() -> str | None:
    """Why Triton kernels cannot run here, or None if they can. Does not import Triton."""
    if forced in ("ref", "cpp", "cuda"):
        return f"switched off by PYOPS_BACKEND={forced}"
    if not triton_installed():
        return "the package triton is not installed"
    if triton_interpreted():
        return None
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def triton_interpreted() -> bool:
    """True if Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_load_native()
