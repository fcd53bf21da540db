"""Large buffers in the CPU's memory."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from pyops import backend

CHUNK = 1 << 17
"""Elements of a weight that are worked on at a time: what is made on the way stays in the cache, and is small."""
CHUNK_ELSEWHERE = 1 << 24
"""On other devices, whose calls should be long."""


def has_values(t: torch.Tensor) -> bool:
    """False while tracing, and for fake and meta tensors and those of other subclasses."""
    return type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta and not torch.compiler.is_compiling()


def put_on_huge_pages(t: torch.Tensor, filled: bool = True) -> None:
    """Ask for 2 MiB pages under a dense tensor that will be streamed; `filled`: it has values already, which stay.

    Only a hint: nothing happens on other devices, without the compiled extension and where the kernel says no.
    """
    if backend.native is not None and t.device.type == "cpu" and has_values(t):
        backend.native.advise_huge_pages(t.data_ptr(), t.nbytes, filled)


def chunks(count: int, elements: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of runs of the `count` rows or panels, of so many elements each, that make a chunk."""
    at_once = max(1, (CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE) // max(elements, 1))
    for first in range(0, count, at_once):
        yield first, min(first + at_once, count)


def all_finite(t: torch.Tensor) -> bool:
    """False if it holds NaN or Inf; makes no temporary of its size. `t` must have values."""
    return not t.numel() or all(bool(bound.isfinite()) for bound in t.aminmax())  # NaN if one is


def give_back_freed() -> None:
    """Give the pages of freed memory that glibc holds for later back to the system; nothing where it is not glibc."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no such function, or no such library
        ctypes.CDLL(None).malloc_trim(0)
