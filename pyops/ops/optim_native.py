"""CPU launchers of `optim_step` and `optim_sum_squares`: tensors into the compiled extension's table, and away.

`csrc/optim.h` says how a tensor is worked on. Here its operands are laid out for it: as dense runs in one common order
where they have one, else by their strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyops import backend
from pyops.ops import optim_codec as codec
from pyops.ops.optim import FIRST_EMA, FIRST_STATE, PARAM_DTYPES, STREAMS_PER_PARAM, hyper_dict
from pyops.ops.optim_rules import RULES, Hyper, Rule

COEFFICIENTS = 8
CODES = {
    dtype: code
    for code, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8))
}
CODES[torch.bool] = CODES[torch.uint8]


def is_dense(t: Tensor) -> bool:
    """True if the elements fill their memory without gaps and overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def add_entry(
    table,
    rule: Rule,
    p: Tensor,
    g: Tensor,
    states: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scalars: Sequence[Tensor],
    ema: Tensor | None,
    mask: Tensor | None,
    stream: int,
    group: int = 0,
    first: int = 0,
    kept: list[Tensor] | None = None,
) -> int:
    """Put a parameter into an `OptimTable`; returns its index. `stream` counts parameters.

    The table keeps addresses: whoever calls this keeps the tensors, and what is appended to `kept`.
    """
    _check(rule, p, g, states, scales, scalars, ema, mask)
    narrow = any(s is not None and s.numel() for s in scales)
    operands = [p, g, *states, *[None] * (3 - len(states)), ema]
    given = [t for t in operands if t is not None]
    if all(t.is_contiguous() for t in given):
        one_order = True
    else:
        one_order = not narrow and all(t.stride() == p.stride() for t in given) and is_dense(p)
    if mask is not None:
        mask = _laid_out(mask, p if one_order else None)
        kept.append(mask)
    strides = [[] if t is None or one_order or t.is_contiguous() else list(t.stride()) for t in operands]
    row = p.numel() // p.shape[0] if narrow and p.dim() > 1 and p.numel() else p.numel()
    return table.add(
        rule.name,
        p.numel(),
        max(row, 1),
        stream * STREAMS_PER_PARAM,
        list(p.shape),
        [None if t is None else (t.data_ptr(), CODES[t.dtype]) for t in (*operands, mask)],
        strides,
        [s.data_ptr() if s is not None and s.numel() else 0 for s in scales],
        [(t.data_ptr(), t.dtype == torch.float64) for t in scalars],
        group,
        first,
    )


def _check(rule, p, g, states, scales, scalars, ema, mask) -> None:
    """Raise ValueError for what would make the kernel read or write beyond a tensor."""
    for name, t in (
        ("grads", g),
        *((f"states ({n})", s) for n, s in zip(rule.states, states, strict=True)),
        ("ema", ema),
    ):
        if t is not None and (t.shape != p.shape or t.device != p.device or t.dtype not in CODES):
            raise ValueError(
                f"{name}: {t.dtype} {tuple(t.shape)} on {t.device} does not fit {p.dtype} {tuple(p.shape)}"
            )
    if p.dtype not in PARAM_DTYPES or g.dtype not in PARAM_DTYPES:
        raise ValueError(f"params, grads are {p.dtype}, {g.dtype}; allowed: {', '.join(map(str, PARAM_DTYPES))}")
    if mask is not None and mask.shape != p.shape:
        raise ValueError(f"masks: {tuple(mask.shape)} does not fit {tuple(p.shape)}")
    for t in scalars:
        if t.numel() != 1 or t.dtype not in (torch.float32, torch.float64) or t.device.type != "cpu":
            raise ValueError(f"scalars: {t.dtype} {tuple(t.shape)} on {t.device}; allowed: one fp32 or fp64 on the CPU")
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    if ema is not None and ema.dtype != wide:
        raise ValueError(f"ema is {ema.dtype}; averages of {p.dtype} parameters are {wide}")
    for name, t, scale in zip(rule.states, states, scales or [None] * len(states), strict=True):
        scaled = scale is not None and scale.numel() > 0
        if scaled != (t.dtype in (torch.int8, torch.uint8)) and t.numel():
            raise ValueError(f"scales: state {name} is {t.dtype}; those of 8 bits have scales, others none")
        if scaled and (tuple(scale.shape) != codec.scale_shape(p.shape) or not scale.is_contiguous()):
            raise ValueError(
                f"scales: {tuple(scale.shape)} for {name}, expected {codec.scale_shape(p.shape)}, contiguous"
            )
        if scaled and (scale.dtype != torch.float32 or wide != torch.float32 or not t.is_contiguous()):
            raise ValueError(f"scales: 8-bit state {name} must be contiguous, with fp32 scales and no fp64 parameter")
        if t.dtype not in (wide, torch.int8, torch.uint8, torch.bfloat16) or (
            wide == torch.float64 and t.dtype != wide
        ):
            raise ValueError(f"states: {name} is {t.dtype}, of a {p.dtype} parameter")


def _laid_out(mask: Tensor, p: Tensor | None) -> Tensor:
    """The mask as bytes in the order in which the kernel walks: that of p's memory, or row by row."""
    mask = mask if mask.dtype in (torch.uint8, torch.bool) else mask != 0
    if p is None:
        return mask.contiguous()
    return mask if mask.stride() == p.stride() else torch.empty_like(p, dtype=mask.dtype).copy_(mask)


def row(rule: Rule, h: Hyper, first: int, values: Sequence[float], multiplier: float) -> list[float]:
    """What the table's step wants to know of the parameters that have these scalars."""
    new = rule.advance(h, dict(zip(rule.scalars, values, strict=True)))
    c = rule.coefficients(h, new)
    if first & FIRST_STATE and rule.first:
        c = rule.first(c)
    lr, decay = h["lr"], 0.0 if rule.decays else h["weight_decay"]
    return [
        *c,
        *[0.0] * (COEFFICIENTS - len(c)),
        -multiplier if h["maximize"] else multiplier,
        1 - lr * decay if h["decoupled"] else 1.0,
        0.0 if h["decoupled"] else decay,
        lr * h["l1"],
        1.0 if first & FIRST_EMA else 1 - h["ema_decay"],
        *(new[name] for name in rule.scalars),
    ]


def count_changes(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that these tensors were written to, which the dispatcher does not do for an op from Python."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)


def optim_step(
    rule,
    params,
    grads,
    states,
    scalars,
    hyper,
    scales,
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
    if (found_inf is not None and found_inf.item() != 0) or not params:
        return
    r = RULES[rule]
    h = hyper_dict(r, hyper, lr)
    k, n = len(r.states), len(r.scalars)
    table = backend.native.OptimTable()
    kept: list[Tensor] = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        add_entry(
            table,
            r,
            p,
            g,
            states[i * k : (i + 1) * k],
            scales[i * k : (i + 1) * k],
            scalars[i * n : (i + 1) * n],
            ema[i] if ema else None,
            masks[i] if masks and masks[i].numel() else None,
            stream + i,
            first=first[i] if first else 0,
            kept=kept,
        )
    table.cut({})
    factor = 1.0 if multiplier is None else multiplier.item()
    rows = [row(r, h, started, values, factor) for _, started, values in table.combinations()]
    table.step(rows, zero_grad, stochastic_rounding, key & 0xFFFFFFFF)
    count_changes(params, states, ema, grads if zero_grad else ())


def optim_sum_squares(tensors) -> Tensor:
    """The op on CPU tensors."""
    table = backend.native.OptimTable()
    for t in tensors:
        add_entry(table, RULES["sgd"], t, t, (), (), (), None, None, 0)
    table.cut({})
    return torch.tensor(table.sum_squares(), dtype=torch.float64)
