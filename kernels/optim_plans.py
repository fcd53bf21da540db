"""What a call of `optim_step` launches: its tensors by device, dtypes and order in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..ops.optim_codec import scale_shape
from . import optim_tables as tables
from .optim_tables import STATES, Table, is_dense, make_table

P, G, STATE, SCALE, EMA, MASK, BLOCK = (
    constant.value
    for constant in (tables.P, tables.G, tables.STATE, tables.SCALE, tables.EMA, tables.MASK, tables.BLOCK)
)
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODES = {torch.int8: tl.int8, torch.uint8: tl.uint8}
SCALES = {torch.float32: tl.float32}
MASKS = {torch.bool: tl.uint8, torch.uint8: tl.uint8}


class Launch(NamedTuple):
    """Parameters that one kernel serves."""

    dtypes: tuple[tl.dtype | None, ...]
    """Of the tensor in each column of the table, None where there is none."""
    sliced: bool
    """The blocks of 8-bit states end with slices that are no multiples of BLOCK."""
    aligned: bool
    """Every tensor, and every slice with `sliced`, starts on 16 bytes."""
    table: Table


class Part(NamedTuple):
    """What of a call is on one device."""

    device: torch.device
    indices: list[int]
    """Of the parameters in the call."""
    launches: list[Launch]


class Plan(NamedTuple):
    """What a call does."""

    parts: list[Part]
    by_reference: list[int]
    """Parameters that no kernel serves."""
    stand_ins: list[tuple[int, Tensor, Tensor]]
    """(column, operand, tensor in the order and dtype that the kernels expect)"""

    @property
    def transient(self) -> bool:
        """True if the plan holds memory that should not be kept."""
        return bool(self.stand_ins)


def make_plan(
    states_of_rule: int,
    stochastic_rounding: bool,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    scales: Sequence[Tensor],
    ema: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> Plan:
    """The plan of a call with these arguments. Raises ValueError if an operand does not fit its parameter."""
    parts: dict[torch.device, Part] = {}
    rows: dict[tuple, list[list[int]]] = {}
    plan = Plan([], [], [])
    k = states_of_rule
    padding = [None] * (STATES - k)
    no_scales = [None] * STATES
    for i, p in enumerate(params):
        own = slice(i * k, i * k + k)
        operands: list[Tensor | None] = [p, grads[i], *states[own], *padding]
        operands += [*(q if q.numel() else None for q in scales[own]), *padding] if scales else no_scales
        operands += [ema[i] if ema else None, masks[i] if masks and masks[i].numel() else None]
        _check(i, operands)
        dtypes = _dtypes(tuple([None if t is None else t.dtype for t in operands]))
        fits = _fits(operands)
        strides = () if fits or dtypes is None else _order(operands, stochastic_rounding)
        if dtypes is None or strides is None:
            plan.by_reference.append(i)
            continue
        device, size = p.device, p.numel()
        part = parts.get(device)
        if part is None:
            part = parts[device] = Part(device, [], [])
        part.indices.append(i)
        if size == 0:
            continue
        if not fits:
            for column, t in enumerate(operands):
                if t is not None:
                    operands[column] = _stand_in(column, t, strides)
                    if operands[column] is not t:
                        plan.stand_ins.append((column, t, operands[column]))

        length = size
        if p.dim() > 1 and size // p.shape[0] % BLOCK and any(q is not None for q in operands[SCALE:EMA]):
            length = size // p.shape[0]
        sliced = length != size
        addresses = [0 if t is None else t.data_ptr() for t in operands]
        together = 0
        for address in (*addresses[:SCALE], *addresses[EMA:]):
            together |= address
        aligned = together % 16 == 0 and (not sliced or length % 16 == 0)
        kind = device, dtypes, sliced, aligned
        if kind not in rows:
            rows[kind] = []
        rows[kind].append([*addresses, size, length, len(part.indices) - 1, i])
    for (device, dtypes, sliced, aligned), rows_of_kind in rows.items():
        parts[device].launches.append(Launch(dtypes, sliced, aligned, make_table(rows_of_kind, device)))
    plan.parts.extend(parts.values())
    return plan


def _check(i: int, operands: list[Tensor | None]) -> None:
    """Raise ValueError for what would make a kernel reach beyond a tensor."""
    shape, device = operands[P].shape, operands[P].device
    for column, t in enumerate(operands):
        if t is None or (t.shape == shape and t.device == device and not SCALE <= column < EMA):
            continue
        expected = scale_shape(shape) if SCALE <= column < EMA else tuple(shape)
        if tuple(t.shape) != expected or t.device != device:
            name = ["params", "grads", *["states"] * STATES, *["scales"] * STATES, "ema", "masks"][column]
            raise ValueError(
                f"{name}: that of parameter {i} is {tuple(t.shape)} on {t.device}, expected {expected} on {device}"
            )


@functools.cache
def _dtypes(operands: tuple[torch.dtype | None, ...]) -> tuple[tl.dtype | None, ...] | None:
    """Of the operands in Triton; None if no kernel serves them."""
    result: list[tl.dtype | None] = []
    for column, dtype in enumerate(operands):
        coded = STATE <= column < SCALE and operands[column + STATES] is not None
        scale = SCALE <= column < EMA
        allowed = MASKS if column == MASK else CODES if coded else SCALES if scale else FLOATS
        if dtype is None:
            result.append(None)
        elif dtype in allowed:
            result.append(allowed[dtype])
        elif column == MASK:
            result.append(MASKS[torch.bool])
        else:
            return None
    return tuple(result)


def _fits(operands: list[Tensor | None]) -> bool:
    """True if all are as the kernels expect: row-major."""
    mask = operands[MASK]
    return all(t is None or t.is_contiguous() for t in operands) and (mask is None or mask.dtype in MASKS)


def _order(operands: list[Tensor | None], stochastic_rounding: bool) -> tuple[int, ...] | None:
    """Strides in which the operands are worked on, None if there are none that suit all.

    Random bits go by the index in the order of memory of what they round, if that is dense, and 8-bit states by rows.
    """
    p = operands[P]
    row_major = torch.empty(p.shape, device="meta").stride()
    orders = []
    for column in (P, *range(STATE, SCALE)):
        t = operands[column]
        if t is None:
            continue
        if column != P and operands[column + STATES] is not None:
            orders.append(row_major)
        elif t.dtype == torch.bfloat16 and (column != P or stochastic_rounding):
            orders.append(t.stride() if is_dense(t) else row_major)
    if not orders:
        return p.stride() if is_dense(p) else row_major
    return orders[0] if all(_same(p.shape, order, orders[0]) for order in orders) else None


def _stand_in(column: int, t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """What the kernels see for `t`: itself, or an empty tensor of the same shape in their order and dtype."""
    if SCALE <= column < EMA:
        return t if t.is_contiguous() else torch.empty(t.shape, dtype=t.dtype, device=t.device)
    if column == MASK and t.dtype not in MASKS:
        return torch.empty_strided(t.shape, strides, dtype=torch.bool, device=t.device)
    if _same(t.shape, t.stride(), strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)


def _same(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """True if the strides agree where they matter."""
    return all(x == y or size == 1 for x, y, size in zip(a, b, shape, strict=True))


def is_written(column: int, zero_grad: bool) -> bool:
    """True if a step changes the tensors of this column."""
    return column != MASK and (zero_grad or column != G)
