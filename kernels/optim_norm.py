"""Σ x² over all elements of many tensors, in fp64: two launches, whatever their number, and no atomics.

A program each squares and adds up one chunk; one last program adds up their sums, always in the same order. Squares
are taken in fp64, which holds that of every fp32 number, and costs nothing beside the reads on devices that have half
as many units for it as for fp32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import optim_tables as tables
from .optim_plans import FLOATS
from .optim_tables import BLOCK, COLUMNS, EDGE, PROGRAM, ROWS, SIZE, SLICE, WARPS, P, Table

DTYPES = {**FLOATS, torch.float64: tl.float64}
LENGTH = 1024
"""Sums that the last program takes at a time."""


@triton.jit(do_not_specialize=["first_program", "rows_of_chunk"])
def _sum_squares_kernel(
    table_ptr,  # [rows, COLUMNS] int64
    chunks_ptr,  # [programs] int64
    sums_ptr,  # fp64, those of this launch from first_program on
    first_program,
    rows_of_chunk,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every tensor starts on 16 bytes
):
    chunk = tl.load(chunks_ptr + tl.program_id(0))
    row_ptr = table_ptr + (chunk >> 32) * COLUMNS
    number = chunk & 0xFFFFFFFF
    size = tl.load(row_ptr + SIZE)
    x_ptr = tl.load(row_ptr + P).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    sums_ptr += first_program + tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if number == EDGE:
        edge = size // BLOCK * BLOCK
        x = tl.load(x_ptr + edge + lanes, mask=lanes < size - edge, other=0.0).to(tl.float64)
        tl.store(sums_ptr, tl.sum(x * x, axis=0))
    else:
        rows = tl.arange(0, ROWS)
        offs = rows[:, None] * BLOCK + lanes[None, :]
        first = number * rows_of_chunk
        count = tl.minimum(size // BLOCK - first, rows_of_chunk).to(tl.int32)
        total = tl.zeros((ROWS, BLOCK), tl.float64)
        for done in range(0, count, ROWS):
            mask = tl.broadcast_to((rows < count - done)[:, None], (ROWS, BLOCK))
            y = tl.load(x_ptr + (first + done) * BLOCK + offs, mask=mask, other=0.0).to(tl.float64)
            total += y * y
        tl.store(sums_ptr, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["n"])
def _add_up_kernel(
    sums_ptr,  # [n] fp64
    total_ptr,  # [] fp64
    n,
    LENGTH: tl.constexpr,
):
    offs = tl.arange(0, LENGTH)
    total = tl.zeros((LENGTH,), tl.float64)
    for start in range(0, n, LENGTH):
        total += tl.load(sums_ptr + start + offs, mask=offs < n - start, other=0.0)
    tl.store(total_ptr, tl.sum(total, axis=0))


class Plan(NamedTuple):
    """(dtype, aligned, table) of each launch."""

    launches: list[tuple[tl.dtype, bool, Table]]
    transient: bool


def _make_plan(tensors: list[Tensor], transient: bool) -> Plan:
    rows: dict[tuple, list[list[int]]] = {}
    for t in tensors:
        if t.numel():
            row = [0] * PROGRAM.value
            row[P.value], row[SIZE.value], row[SLICE.value] = t.data_ptr(), t.numel(), t.numel()
            rows.setdefault((DTYPES[t.dtype], t.data_ptr() % 16 == 0), []).append(row)
    device = tensors[0].device
    return Plan([(*kind, tables.make_table(its_rows, device)) for kind, its_rows in rows.items()], transient)


_plans = tables.Cache()


def optim_sum_squares(tensors: list[Tensor]) -> Tensor:
    """The op `pyops::optim_sum_squares` on CUDA: the same bits at every call, and nothing waits for the device."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    device = tensors[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    here = [t for t in tensors if t.device == device]
    dense = [t if tables.is_dense(t) else t.contiguous() for t in here]  # the order of the elements does not matter
    copied = any(a is not b for a, b in zip(dense, here, strict=True))
    plan = _plans.get(
        device,
        tables.signature(dense),
        functools.partial(_make_plan, dense, copied),
    )
    programs = sum(table.programs for *_, table in plan.launches)
    if programs:
        sums = torch.empty(programs, dtype=torch.float64, device=device)
        first = 0
        with torch.cuda.device_of(total):
            for dtype, aligned, table in plan.launches:
                _sum_squares_kernel[(table.programs,)](
                    table.rows, table.chunks, sums, first, table.rows_of_chunk, dtype, aligned, num_warps=WARPS
                )
                first += table.programs
            _add_up_kernel[(1,)](sums, total, programs, LENGTH=LENGTH)
    for other in dict.fromkeys(t.device for t in tensors if t.device != device):
        total += optim_sum_squares([t for t in tensors if t.device == other]).to(device, non_blocking=True)
    return total
