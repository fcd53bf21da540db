"""A step on the CPU makes no temporary of a parameter's size."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optim_cases import RICH, case_id, ours

from pyops import backend

PEAK = Path("/proc/self/clear_refs")  # 5 written to it sets the peak, VmHWM, to what is resident now
ROWS, COLUMNS = 4096, 2048
SIZE = 4 * ROWS * COLUMNS

pytestmark = pytest.mark.skipif(
    backend.native is None or not PEAK.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="wants the compiled kernels, glibc and Linux's account of memory",
)


def resident(field: str) -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def grown(run: Callable[[], object]) -> int:
    """By how many bytes the resident memory rose at most during `run`."""
    ctypes.CDLL(None).malloc_trim(0)  # what other tests freed is resident until then, and taken again would not show
    PEAK.write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def test_a_temporary_is_seen():
    x = torch.ones(ROWS, COLUMNS)
    assert grown(lambda: (x + 1).sum()) > 0.9 * SIZE


EVERYTHING = {"max_grad_norm": 1.0, "ema_decay": 0.9, "zero_grad": True, "l1": 1e-3}


@pytest.mark.parametrize("around", [{}, EVERYTHING, {**EVERYTHING, "state_dtype": "int8"}], ids=case_id)
@pytest.mark.parametrize(("name", "options"), [*RICH, ("Adafactor", {})], ids=case_id)
def test_step(name, options, around):
    p = torch.ones(ROWS, COLUMNS, requires_grad=True)
    q = torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    masks = {"masks": {p: torch.ones(ROWS, COLUMNS, dtype=torch.bool)}} if around else {}
    optimizer = ours(name)([p, q], **options, **around, **masks)
    for t in (p, q):
        t.grad = torch.full_like(t, 0.01)
    for _ in range(2):  # the first makes states, the second the table
        optimizer.step()
    assert grown(optimizer.step) < SIZE / 8
