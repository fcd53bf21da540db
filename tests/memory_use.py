"""How much memory something takes, as Linux counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

PEAK = Path("/proc/self/clear_refs")  # 5 written to it sets the peak, VmHWM, to what is resident now
M_MMAP_THRESHOLD = -3  # of glibc's mallopt

needs_account_of_memory = pytest.mark.skipif(
    not PEAK.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="wants glibc and Linux's account of memory",
)


def take_from_heap(most: int) -> None:
    """Blocks of up to so many bytes come from glibc's heap, larger ones are pages of their own; holds until changed.

    Left alone glibc moves this bound with what was freed before, and the holes of a heap that large tensors share stay
    resident: what a test sees would depend on the tests before it.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, most)


def resident(field: str = "VmRSS") -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def settled() -> int:
    """Bytes that are resident when what was freed is given back."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory is resident until then, and taken again would not show
    return resident()


def grown(run: Callable[[], object]) -> int:
    """By how many bytes the resident memory rose at most during `run`."""
    take_from_heap(2**17)
    before = settled()
    PEAK.write_text("5")
    run()
    return resident("VmHWM") - before
