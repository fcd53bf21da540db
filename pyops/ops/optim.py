"""One optimizer step over many tensors, and everything around it in the same pass.

For each parameter p with gradient g, states and scalars of its rule (`optim_rules.py`):

    g ← multiplier·g                                unscaling and clipping; -g with `maximize`
    p ← (1 - lr·weight_decay)·p   or   g ← g + weight_decay·p
    p, states ← rule(p, g, states, scalars)
    p ← sign(p)·max(|p| - lr·l1, 0)                 with l1
    p, states ← 0 where mask is 0                   with a mask
    ema ← ema + (1 - ema_decay)·(p - ema)           with an average; p itself in its first step
    g ← 0                                           with zero_grad

Arithmetic is in fp32, for fp64 parameters in fp64; p and g are fp32, bf16, fp16 or fp64 of any strides. States are
fp32, bf16 (stochastically rounded) or 8 bits with scales (`optim_codec.py`), those of fp64 parameters fp64; averages
are fp32 or fp64. bf16 parameters are rounded to nearest, or stochastically. If `found_inf` is not 0 nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyops.ops import optim_codec as codec
from pyops.ops.optim_rules import COMMON, RULES, Hyper, Rule
from pyops.ops.registry import register

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STREAMS_PER_PARAM = 8
"""Streams of random bits that a parameter has: j rounds its j-th state, PARAM_STREAM the parameter."""
PARAM_STREAM = 3
FIRST_STATE, FIRST_EMA = 1, 2
"""Bits of `first`: the parameter's states, its average, were made in this step."""

SCHEMA = (
    "optim_step(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] scalars, "
    "float[] hyper, Tensor(e!)[] scales, Tensor(f!)[] ema, Tensor[] masks, int[] first, Tensor? lr, "
    "Tensor? multiplier, Tensor? found_inf, bool zero_grad, bool stochastic_rounding, int key, int stream) -> ()"
)
NORM_SCHEMA = "optim_sum_squares(Tensor[] tensors) -> Tensor"


# ------------------------------------------------------------------------------------------------------ reference


def hyper_dict(rule: Rule, hyper: list[float], lr: Tensor | None) -> Hyper:
    """The hyper-parameters of a call by name; a tensor lr takes the place of the float."""
    h: Hyper = dict(zip((*COMMON, *rule.hyper), hyper, strict=True))
    if lr is not None:
        h["lr"] = lr.item() if lr.device.type == "cpu" else lr.double()
    return h


def advance(rule: Rule, h: Hyper, scalars: list[Tensor]) -> tuple:
    """Count the step in `scalars`, return the coefficients; both stay on the device where that is not the CPU."""
    old = {n: t.item() if t.device.type == "cpu" else t.double() for n, t in zip(rule.scalars, scalars, strict=True)}
    new = rule.advance(h, old)
    for name, tensor in zip(rule.scalars, scalars, strict=True):
        tensor.fill_(new[name])
    return rule.coefficients(h, new)


def optim_step_ref(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scalars: list[Tensor],
    hyper: list[float],
    scales: list[Tensor],
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
    r = RULES[rule]
    h = hyper_dict(r, hyper, lr)
    k = len(r.states)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        c = advance(r, h, scalars[i * len(r.scalars) : (i + 1) * len(r.scalars)])
        fresh = first[i] if first else 0
        if fresh & FIRST_STATE and r.first:
            c = r.first(c)
        streams = (stream + i) * STREAMS_PER_PARAM
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        own, own_scales = states[i * k : (i + 1) * k], scales[i * k : (i + 1) * k] or [None] * k
        wide = [_load(s, q, dtype) for s, q in zip(own, own_scales, strict=True)]
        new = updated(r, h, p.to(dtype), g.to(dtype), wide, c, multiplier)
        if masks and masks[i].numel():
            keep = masks[i].to(torch.bool)
            new = torch.where(keep, new, 0.0)
            wide = [torch.where(keep, w, 0.0) for w in wide]
        for j, (state, scale, value) in enumerate(zip(own, own_scales, wide, strict=True)):
            _store(state, scale, value, key, streams + j)
        finish(p, new, ema[i] if ema else None, h, fresh, (key, streams) if stochastic_rounding else None)
        if zero_grad:
            g.zero_()


def finish(
    p: Tensor, new: Tensor, average: Tensor | None, h: Hyper, first: int, random: tuple[int, int] | None
) -> None:
    """Put `new` into p, rounded as `random` (key, stream of the parameter) says, and into p's average."""
    if average is not None:
        average.copy_(new if first & FIRST_EMA else average + (new - average) * (1 - h["ema_decay"]))
    if p.dtype == torch.bfloat16 and random is not None:
        new = codec.round_to_bf16(new, codec.bits_like(p, random[0], random[1] + PARAM_STREAM))
    p.copy_(new)


def updated(
    r: Rule, h: Hyper, p: Tensor, g: Tensor, states: list[Tensor], c: tuple, multiplier: Tensor | None
) -> Tensor:
    """The new p by the rule and what surrounds it, unmasked; the states change in place. All in one dtype."""
    if multiplier is not None:
        g = g * multiplier.to(g.dtype)
    if h["maximize"]:
        g = -g
    if h["weight_decay"] and not r.decays:
        if h["decoupled"]:
            p = p * (1 - h["lr"] * h["weight_decay"])
        else:
            g = g + h["weight_decay"] * p
    p = r.update(p, g, states, c)
    if h["l1"]:
        p = p.sign() * (p.abs() - h["lr"] * h["l1"]).clamp_(min=0)
    return p


def _load(state: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The state as a tensor of its own in the dtype of the arithmetic, or the state itself where it has that dtype."""
    return codec.dequantize(state, scale) if scale is not None and scale.numel() else state.to(dtype)


def _store(state: Tensor, scale: Tensor | None, value: Tensor, key: int, stream: int) -> None:
    if scale is not None and scale.numel():
        bits = codec.random_bits(key, stream, state.numel(), state.device, codec.CUT_BITS)
        codes, s = codec.quantize(value, state.dtype, bits)
        state.copy_(codes)
        scale.copy_(s)
    elif state.dtype == torch.bfloat16:
        state.copy_(codec.round_to_bf16(value, codec.bits_like(state, key, stream)))
    elif value is not state:
        state.copy_(value)


def _fake(rule, params, grads, states, scalars, hyper, scales, ema, masks, first, *rest) -> None:
    n = len(params)
    r = RULES[rule]
    for name, tensors, count in (
        ("grads", grads, n),
        ("states", states, n * len(r.states)),
        ("scalars", scalars, n * len(r.scalars)),
        ("hyper", hyper, len(COMMON) + len(r.hyper)),
    ):
        torch._check(len(tensors) == count, lambda name=name, t=tensors, c=count: f"{name} has {len(t)} items, not {c}")
    for name, items, allowed in (
        ("scales", scales, (0, n * len(r.states))),
        ("ema", ema, (0, n)),
        ("masks", masks, (0, n)),
        ("first", first, (0, n)),
    ):
        torch._check(len(items) in allowed, lambda name=name, t=items, a=allowed: f"{name} has {len(t)} items, not {a}")


def optim_sum_squares_ref(tensors: list[Tensor]) -> Tensor:
    """Σ x² over all elements of all tensors, fp64 [], on the device of the first."""
    device = tensors[0].device if tensors else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        total += t.double().square().sum()
    return total


def _norm_fake(tensors: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")


optim_step_op = register(SCHEMA, optim_step_ref, _fake, file="optim", native=True, triton=True)
_sum_squares = register(NORM_SCHEMA, optim_sum_squares_ref, _norm_fake, file="optim", native=True, triton=True)


# ------------------------------------------------------------------------------------------------ public functions


def optim_step(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    scalars: Mapping[str, Sequence[Tensor]],
    hyper: Mapping[str, float],
    *,
    scales: Mapping[str, Sequence[Tensor]] | None = None,
    ema: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    first: Sequence[int] = (),
    multiplier: Tensor | None = None,
    found_inf: Tensor | None = None,
    zero_grad: bool = False,
    stochastic_rounding: bool = False,
    key: int = 0,
    stream: int = 0,
) -> None:
    """Step `params` in place by a rule of `RULES`, without an optimizer object: the equation in this module's head.

    Args:
        rule: a name in `pyops.ops.optim_rules.RULES`.
        params: fp32, bf16, fp16 or fp64, any shapes and strides, all on one device.
        grads: one for each parameter, of its shape.
        states: for each name in the rule's `states`, one tensor for each parameter, of its shape: fp32, bf16, or int8
            (uint8 where the rule says `unsigned`) with scales; fp64 for fp64 parameters.
        scalars: for each name in the rule's `scalars`, one 0-dim tensor for each parameter; "step" counts from 0.
        hyper: "lr", and as far as they are not 0 "weight_decay", "decoupled", "maximize", "l1", "ema_decay" and those
            of the rule's `hyper`.
        scales: as `states`, fp32 of shape `optim_codec.scale_shape`, for 8-bit states.
        ema: averages, fp32 or fp64, one for each parameter, or none at all.
        masks: 0/1 of the parameters' shapes, an empty tensor for a parameter without one; or none at all.
        first: FIRST_STATE | FIRST_EMA for each parameter whose states or average are new; or none at all.
        multiplier: of every gradient, 0-dim.
        found_inf: 0-dim; nothing changes if it is not 0.
        zero_grad: set the gradients to zero.
        stochastic_rounding: round bf16 parameters stochastically.
        key, stream: fix the random bits; 32 bits for the step, and the position of the first parameter.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    r, n = RULES[rule], len(params)
    known = (*COMMON, *r.hyper)
    if "lr" not in hyper or not set(hyper) <= set(known):
        raise ValueError(f"hyper has {', '.join(hyper)}; rule {rule!r} takes {', '.join(known)}, lr always")
    for name, given, wanted in (("states", states, r.states), ("scalars", scalars, r.scalars)):
        if set(given) != set(wanted):
            raise ValueError(f"{name} has {', '.join(given) or 'nothing'}; rule {rule!r} needs {', '.join(wanted)}")
    groups = {f"states[{name!r}]": states[name] for name in r.states}
    groups |= {f"scalars[{name!r}]": scalars[name] for name in r.scalars} | {"grads": grads}
    groups |= {name: t for name, t in (("ema", ema), ("masks", masks), ("first", first)) if len(t)}
    for name, tensors in groups.items():
        if len(tensors) != n:
            raise ValueError(f"{name} has {len(tensors)} items for {n} params")
    for name, tensors in groups.items():
        if name.startswith(("states", "grads", "ema")):
            for p, t in zip(params, tensors, strict=True):
                if t.shape != p.shape or t.device != p.device:
                    raise ValueError(f"{name}: {tuple(t.shape)} on {t.device} for {tuple(p.shape)} on {p.device}")
    given_scales = scales or {}
    none = torch.empty(0, device=params[0].device if n else "cpu")
    flat_scales = [given_scales.get(name, [none] * n)[i] for i in range(n) for name in r.states] if scales else []
    optim_step_op(
        rule,
        list(params),
        list(grads),
        [states[name][i] for i in range(n) for name in r.states],
        [scalars[name][i] for i in range(n) for name in r.scalars],
        [float(hyper.get(name, 0.0)) for name in known],
        flat_scales,
        list(ema),
        list(masks),
        list(first),
        None,
        multiplier,
        found_inf,
        zero_grad,
        stochastic_rounding,
        key,
        stream,
    )


def optim_sum_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x² over all elements of all tensors, fp64 [], the same for every number of threads."""
    return _sum_squares(list(tensors))
