"""CPU launcher of `adafactor_step`: how the matrices of each parameter lie in memory, and what is laid out otherwise.

`csrc/adafactor.h` says how they are worked on. A dense parameter is walked through in the order of its memory if that
keeps its matrices together, as [outer, R, C, inner] or [outer, C, R, inner] where outer and inner count matrices: so do
contiguous, transposed and channels_last ones. Anything else is walked through row by row, by its strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyops import backend
from pyops.ops.adafactor import ADAFACTOR, epsilon_of, state_shapes
from pyops.ops.optim import FIRST_EMA, PARAM_DTYPES, STREAMS_PER_PARAM, Hyper, advance, hyper_dict
from pyops.ops.optim_native import CODES, count_changes, is_dense


class Walk(NamedTuple):
    """The order in which a parameter's elements are gone through."""

    order: list[int] | None
    """Dimensions, the outermost first; None if as they are."""
    sizes: list[int]
    """Of the dimensions in that order."""
    shape: list[int]
    """outer, rows, columns, inner."""
    transposed: bool = False
    """True if `rows` are the last dimension."""

    def of(self, t: Tensor) -> Tensor:
        """The view of t with its dimensions in that order."""
        return t if self.order is None else t.permute(self.order)


def walk_of(p: Tensor) -> Walk:
    """How the kernel goes through p."""
    sizes = list(p.shape)
    if len(sizes) < 2:
        return Walk(None, sizes, [1, 1, p.numel(), 1])
    if not p.is_contiguous() and is_dense(p):
        found = _walk_in(p, sorted(range(p.dim()), key=lambda i: (-p.stride(i), i)))
        if found is not None:
            return found
    return Walk(None, sizes, [math.prod(sizes[:-2]), *sizes[-2:], 1])


def _walk_in(p: Tensor, order: list[int]) -> Walk | None:
    """The walk through the dimensions in `order`; None if it would leave a matrix and come back to it."""
    dim, sizes = p.dim(), [p.shape[i] for i in order]
    own = [at for at, i in enumerate(order) if i >= dim - 2 and p.shape[i] != 1]
    begin, end = (own[0], own[-1] + 1) if own else (dim, dim)
    if any(order[at] < dim - 2 and sizes[at] != 1 for at in range(begin, end)):
        return None
    transposed = len(own) == 2 and order[begin] == dim - 1
    rows, columns = p.shape[:-3:-1] if transposed else p.shape[-2:]
    return Walk(order, sizes, [math.prod(sizes[:begin]), rows, columns, math.prod(sizes[end:])], transposed)


def adafactor_step(
    params,
    grads,
    states,
    steps,
    hyper,
    eps1,
    ema,
    masks,
    first,
    lr,
    multiplier,
    found_inf,
    zero_grad,
    stochastic_rounding,
    key,
    stream,
) -> None:
    """The op on CPU tensors."""
    if found_inf is not None and found_inf.item() != 0:
        return
    h = hyper_dict(ADAFACTOR, hyper, lr)
    factor = 1.0 if multiplier is None else multiplier.item()
    rest = iter(states)
    own = [[next(rest) for _ in range(2 if p.dim() > 1 else 1)] for p in params]
    for i, p in enumerate(params):
        _check(p, grads[i], own[i], steps[i], ema[i] if ema else None, masks[i] if masks else None)
    table = backend.native.AdafactorTable()
    rows, kept = [], []
    copies: list[tuple[Tensor, Tensor]] = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        average, mask = ema[i] if ema else None, masks[i] if masks else None
        kept += add_item(table, p, g, own[i], average, mask, stream + i, copies)
        rows.append(row(h, advance(ADAFACTOR, h, [steps[i]]), eps1, factor, first[i] if first else 0))
    pointers = [g.data_ptr() for g in grads]
    table.step(rows, list(range(len(rows))), pointers, zero_grad, stochastic_rounding, key & 0xFFFFFFFF)
    for state, copy in copies:
        state.copy_(copy)
    count_changes(params, states, ema, grads if zero_grad else ())


def add_item(
    table,
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    average: Tensor | None,
    mask: Tensor | None,
    stream: int,
    copies: list[tuple[Tensor, Tensor]],
) -> list[Tensor | None]:
    """Put a parameter into an `AdafactorTable`. `stream` counts parameters.

    The table keeps addresses: whoever calls this keeps what is returned. To `copies` it adds (state, copy) of states
    that lie otherwise than the table wants; they are to be copied back after the step.
    """
    walk = walk_of(p)
    seen = [walk.of(p), walk.of(g), None if average is None else walk.of(average), None]
    factors: list[Tensor | None] = [None, None]
    if p.dim() > 1:
        for at, state in enumerate(states):
            factors[at] = view = walk.of(state)
            if not view.is_contiguous():
                factors[at] = view.contiguous()
                copies.append((view, factors[at]))
    else:
        seen[3] = states[0]
    if mask is None or not mask.numel():
        mask = None
    else:
        mask = walk.of(mask if mask.dtype in (torch.uint8, torch.bool) else mask != 0).contiguous()
    operands = [*seen, mask, *(reversed(factors) if walk.transposed else factors)]
    table.add(
        p.numel(),
        stream * STREAMS_PER_PARAM,
        walk.sizes,
        [None if t is None else (t.data_ptr(), CODES[t.dtype]) for t in operands],
        [[] if t is None or t.is_contiguous() else list(t.stride()) for t in seen],
        walk.shape,
        walk.transposed,
        epsilon_of(p, None),
    )
    return operands


def row(h: Hyper, c: tuple, eps1: float | None, multiplier: float, first: int) -> tuple[float | None, list[float]]:
    """What the table's step wants to know of the parameters that have these scalars."""
    weight, largest_step, decay, eps2, d = c
    return eps1, [
        -multiplier if h["maximize"] else multiplier,
        *(weight, eps2, largest_step, d, decay),
        h["lr"] * h["l1"],
        1.0 if first & FIRST_EMA else 1 - h["ema_decay"],
    ]


def _check(
    p: Tensor, g: Tensor, states: list[Tensor], step: Tensor, average: Tensor | None, mask: Tensor | None
) -> None:
    """Raise ValueError for what would make the kernel read or write beyond a tensor."""
    shape, device = p.shape, p.device
    if p.dtype not in PARAM_DTYPES or g.dtype not in PARAM_DTYPES:
        raise ValueError(f"params, grads are {p.dtype}, {g.dtype}; allowed: {', '.join(map(str, PARAM_DTYPES))}")
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    expected = [("grads", g, shape, g.dtype)]
    for (name, own), t in zip(state_shapes(shape).items(), states, strict=True):
        expected.append((f"states ({name})", t, own, wide))
    if average is not None:
        expected.append(("ema", average, shape, wide))
    if mask is not None and mask.numel():
        expected.append(("masks", mask, shape, mask.dtype))
    for name, t, own, dtype in expected:
        if t.shape != own or t.dtype != dtype or t.device != device:
            raise ValueError(
                f"{name}: {t.dtype} {tuple(t.shape)} on {t.device} for {p.dtype} {tuple(shape)} on {device}; "
                f"needed: {dtype} {tuple(own)}"
            )
    if step.numel() != 1 or step.device != device:
        raise ValueError(f"steps: {tuple(step.shape)} on {step.device}; allowed: one number on the CPU")
