"""One step of Adafactor over many tensors, and everything around it in the same passes.

A parameter p of two or more dimensions is a batch of matrices [R, C], its last two dimensions. With its gradient g, in
step t:

    g ← multiplier·g                                          unscaling and clipping; -g with `maximize`
    g ← 0 where the mask is 0                                 with a mask
    w = t^beta2_decay
    row ← row + w·(mean of g² over C - row)                   [..., R, 1]
    col ← col + w·(mean of g² over R - col)                   [..., 1, C]
    v = row / max(mean of row over R, eps1) · col
    u = g / √max(v, eps1²)
    step = min(lr, 1/√t)·max(eps2, RMS(p)) / max(1, RMS(u)/d)
    p ← (1 - lr·weight_decay)·p - step·u

The other parameters, of one dimension or none, have a variance in full: v ← v + w·(g² - v). RMS is the root of the mean
square over the whole tensor; a NaN counts as smaller than eps2 and 1. eps1 is the machine epsilon of p's dtype unless
given. What follows is as for every rule (`optim.py`): l1, mask (also of the variance), average, zero_grad.

Dtypes and strides are those of `optim.py`; states are fp32, of fp64 parameters fp64. A kernel wants the dimensions of
row_var and col_var in memory in the order of p's, and else works on copies. Empty parameters only count the step.

Source: Shazeer & Stern 2018, arXiv:1804.04235, with the changes of `torch.optim.Adafactor`: means for sums, lr as the
largest step, eps1 where it divides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyops.ops.optim import STREAMS_PER_PARAM, advance, finish, hyper_dict, updated
from pyops.ops.optim_rules import COMMON, Hyper, Number, Rule
from pyops.ops.registry import register

SCHEMA = (
    "adafactor_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, float[] hyper, "
    "float? eps1, Tensor(e!)[] ema, Tensor[] masks, int[] first, Tensor? lr, Tensor? multiplier, Tensor? found_inf, "
    "bool zero_grad, bool stochastic_rounding, int key, int stream) -> ()"
)


def state_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the states of a parameter of `shape`."""
    if len(shape) < 2:
        return {"variance": tuple(shape)}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


# ------------------------------------------------------------------------------------------------------ reference


def _coefficients(h: Hyper, s: dict[str, Number]) -> tuple:
    t, lr = s["step"], h["lr"]
    largest_step = lr.clamp(max=t**-0.5) if isinstance(lr, Tensor) else min(lr, t**-0.5)
    return t ** h["beta2_decay"], largest_step, 1 - lr * h["weight_decay"], h["eps2"], h["d"]


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def _larger(x: Tensor, least: float) -> Tensor:
    """max(x, least), and `least` for NaN."""
    return torch.where(x > least, x, least)


def _adafactor(p: Tensor, g: Tensor, states: list[Tensor], c: tuple) -> Tensor:
    """The equation of this module's head; c ends with eps1."""
    weight, largest_step, decay, eps2, d, eps1 = c
    square = g * g
    if p.dim() > 1:
        row, col = states
        row.lerp_(square.mean(-1, keepdim=True), weight)
        col.lerp_(square.mean(-2, keepdim=True), weight)
        v = row / row.mean(-2, keepdim=True).clamp_(min=eps1) * col
    else:
        v = states[0].lerp_(square, weight)
    u = g * v.clamp(min=eps1 * eps1).rsqrt_()
    step = largest_step * _larger(_rms(p), eps2) / _larger(_rms(u) / d, 1.0)
    return p * decay - u * step.to(p.dtype)


ADAFACTOR = Rule(
    "adafactor",
    ("row_var", "col_var", "variance"),
    ("beta2_decay", "eps2", "d"),
    _coefficients,
    _adafactor,
    unsigned=("row_var", "col_var", "variance"),
    decays=True,
    whole_tensor=True,
    shapes=state_shapes,
)
"""Steps through `adafactor_step`, and is none of `RULES`. Its eps1, which may depend on the dtype, is an argument."""


def epsilon_of(p: Tensor, eps1: float | None) -> float:
    """eps1, by default the machine epsilon of p's dtype."""
    return torch.finfo(p.dtype).eps if eps1 is None else eps1


def adafactor_step_ref(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    hyper: list[float],
    eps1: float | None,
    ema: list[Tensor],
    masks: list[Tensor],
    first: list[int],
    lr: Tensor | None,
    multiplier: Tensor | None,
    found_inf: Tensor | None,
    zero_grad: bool,
    stochastic_rounding: bool,
    key: int,
    stream: int,
) -> None:
    """The equation of this module's head, a tensor at a time."""
    if found_inf is not None and found_inf.item() != 0:
        return
    h = hyper_dict(ADAFACTOR, hyper, lr)
    rest = iter(states)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        own = [next(rest) for _ in state_shapes(p.shape)]
        c = (*advance(ADAFACTOR, h, [steps[i]]), epsilon_of(p, eps1))
        if not p.numel():
            continue
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        keep = masks[i].to(torch.bool) if masks and masks[i].numel() else None
        wide = g.to(dtype) if keep is None else torch.where(keep, g.to(dtype), 0.0)
        new = updated(ADAFACTOR, h, p.to(dtype), wide, own, c, multiplier)
        if keep is not None:
            new = torch.where(keep, new, 0.0)
            if p.dim() < 2:
                own[0].masked_fill_(~keep, 0)
        random = (key, (stream + i) * STREAMS_PER_PARAM) if stochastic_rounding else None
        finish(p, new, ema[i] if ema else None, h, first[i] if first else 0, random)
        if zero_grad:
            g.zero_()


def _fake(params, grads, states, steps, hyper, eps1, ema, masks, first, *rest) -> None:
    n = len(params)
    for name, items, allowed in (
        ("grads", grads, (n,)),
        ("states", states, (sum(len(state_shapes(p.shape)) for p in params),)),
        ("steps", steps, (n,)),
        ("hyper", hyper, (len(COMMON) + len(ADAFACTOR.hyper),)),
        ("ema", ema, (0, n)),
        ("masks", masks, (0, n)),
        ("first", first, (0, n)),
    ):
        torch._check(len(items) in allowed, lambda name=name, t=items, a=allowed: f"{name} has {len(t)} items, not {a}")


adafactor_step_op = register(SCHEMA, adafactor_step_ref, _fake, file="adafactor", native=True)


# ------------------------------------------------------------------------------------------------ public function


def adafactor_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    steps: Sequence[Tensor],
    lr: float = 1e-2,
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    l1: float = 0.0,
    ema: Sequence[Tensor] = (),
    ema_decay: float = 0.0,
    masks: Sequence[Tensor] = (),
    first: Sequence[int] = (),
    multiplier: Tensor | None = None,
    found_inf: Tensor | None = None,
    zero_grad: bool = False,
    stochastic_rounding: bool = False,
    key: int = 0,
    stream: int = 0,
) -> None:
    """Step `params` in place, without an optimizer object: the equation in this module's head.

    Args:
        params: fp32, bf16, fp16 or fp64, any shapes and strides, all on one device.
        grads: one for each parameter, of its shape.
        states: for each parameter its tensors by name, as `state_shapes` says; they start as zeros.
        steps: for each parameter a 0-dim tensor that counts its steps, from 0.
        lr, beta2_decay, eps, d, weight_decay, maximize: as `torch.optim.Adafactor`.
        l1, ema, ema_decay, masks, first, multiplier, found_inf, zero_grad, stochastic_rounding, key, stream: as
            `optim_step`; `first` has FIRST_EMA where an average is new.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.
    """
    n = len(params)
    given = {"grads": grads, "states": states, "steps": steps}
    given |= {name: items for name, items in (("ema", ema), ("masks", masks), ("first", first)) if len(items)}
    for name, items in given.items():
        if len(items) != n:
            raise ValueError(f"{name} has {len(items)} items for {n} params")
    for p, own in zip(params, states, strict=True):
        shapes = state_shapes(p.shape)
        if {name: tuple(t.shape) for name, t in own.items()} != shapes:
            found = ", ".join(f"{name} {tuple(t.shape)}" for name, t in own.items())
            raise ValueError(f"states of a parameter {tuple(p.shape)}: {found or 'none'}; needed: {shapes}")
    for name in ("grads", "ema"):
        for p, t in zip(params, given.get(name, ()), strict=False):
            if t.shape != p.shape or t.device != p.device:
                raise ValueError(f"{name}: {tuple(t.shape)} on {t.device} for {tuple(p.shape)} on {p.device}")
    hyper = (lr, weight_decay, 1.0, float(maximize), l1, ema_decay, beta2_decay, eps[1], d)
    flat = [own[name] for p, own in zip(params, states, strict=True) for name in state_shapes(p.shape)]
    adafactor_step_op(
        *(list(params), list(grads), flat, list(steps), [float(x) for x in hyper], eps[0], list(ema), list(masks)),
        *(list(first), None, multiplier, found_inf, zero_grad, stochastic_rounding, key, stream),
    )
