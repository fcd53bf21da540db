"""A step on the CPU makes no temporary of a parameter's size."""

from __future__ import annotations

import pytest
import torch
from memory_use import grown, needs_account_of_memory
from optim_cases import RICH, case_id, ours

from pyops import backend

ROWS, COLUMNS = 4096, 2048
SIZE = 4 * ROWS * COLUMNS

pytestmark = [
    needs_account_of_memory,
    pytest.mark.usefixtures("no_holes_in_heap"),
    pytest.mark.skipif(backend.native is None, reason="wants the compiled kernels"),
]


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
