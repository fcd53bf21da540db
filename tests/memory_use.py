"""How much memory something takes, as Linux counts it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PEAK = Path("/proc/self/clear_refs")  # 5 written to it sets the peak, VmHWM, to what is resident now
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
IS_MMAPPED = 2  # bit of the size that stands before a block
LEAST, MOST = 17, 26  # logarithms of sizes of blocks
MOST_HOLES = 2**32  # bytes; a malloc that gives more is not glibc's, or ignores its bound

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


@contextlib.contextmanager
def without_holes_in_heap() -> Iterator[None]:
    """Blocks of 128 KiB and more are pages of their own, which go back to the system when they are freed.

    Holes that the tests before left in glibc's heap come first, whatever the bound: they are taken.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    take_from_heap(2**LEAST)
    held: list[int] = []
    total = 0
    try:
        for size in (2**log for log in range(MOST, LEAST - 1, -1)):
            while block := libc.malloc(size):
                if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & IS_MMAPPED:
                    libc.free(block)
                    break
                held.append(block)
                total += size
                if total > MOST_HOLES:
                    pytest.skip("malloc does not give large blocks pages of their own")
        yield
    finally:
        for block in held:
            libc.free(block)


def resident(field: str = "VmRSS") -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def settled() -> int:
    """Bytes that are resident when what was freed is given back."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory is resident until then, and taken again would not show
    return resident()


def grown(run: Callable[[], object]) -> int:
    """By how many bytes the resident memory rose at most during `run`; wants the fixture `no_holes_in_heap`."""
    before = settled()
    PEAK.write_text("5")
    run()
    return resident("VmHWM") - before
