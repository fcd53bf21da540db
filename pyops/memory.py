"""Large buffers in the CPU's memory."""

from __future__ import annotations

import torch

from pyops import backend


def has_values(t: torch.Tensor) -> bool:
    """False while tracing, and for fake and meta tensors."""
    return type(t) is torch.Tensor and not t.is_meta and not torch.compiler.is_compiling()


def put_on_huge_pages(t: torch.Tensor, filled: bool = True) -> None:
    """Ask for 2 MiB pages under a dense tensor that will be streamed; `filled`: it has values already, which stay.

    Only a hint: nothing happens on other devices, without the compiled extension and where the kernel says no.
    """
    if backend.native is not None and t.device.type == "cpu" and has_values(t):
        backend.native.advise_huge_pages(t.data_ptr(), t.nbytes, filled)
