"""Arguments of `optim_step` for tests, and the comparison of two sets of them after a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pyops.ops import optim_codec as codec
from pyops.ops.optim_rules import COMMON, RULES

HYPER = {
    "lr": 0.03125,
    "weight_decay": 0.0,
    "decoupled": 0.0,
    "maximize": 0.0,
    "l1": 0.0,
    "ema_decay": 0.9,
    "momentum": 0.9,
    "dampening": 0.25,
    "nesterov": 1.0,
    "beta1": 0.875,
    "beta2": 0.9921875,
    "eps": 1e-6,
    "momentum_decay": 0.004,
    "alpha": 0.96875,
    "lr_decay": 0.01,
    "rho": 0.875,
    "bias_correction": 1.0,
}
CODED = "int8"
"""In place of the dtype of states: int8 or uint8 with scales."""
TENSOR_LISTS = ("params", "grads", "states", "scalars", "scales", "ema", "masks")


@dataclass
class Args:
    """The arguments of the op, in its order."""

    rule: str
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)
    hyper: list[float] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    ema: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    lr: Tensor | None = None
    multiplier: Tensor | None = None
    found_inf: Tensor | None = None
    zero_grad: bool = False
    stochastic_rounding: bool = False
    key: int = 0x9ABCDEF0
    stream: int = 3

    def call(self, op: Callable) -> None:
        """Take a step."""
        op(*(getattr(self, f.name) for f in fields(self)))

    def tensors(self) -> list[Tensor]:
        """All that are in lists."""
        return [t for name in TENSOR_LISTS for t in getattr(self, name)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Args:
        """A copy with every tensor changed."""
        result = copy.copy(self)
        for name in TENSOR_LISTS:
            setattr(result, name, [change(t) for t in getattr(self, name)])
        for name in ("lr", "multiplier", "found_inf"):
            value = getattr(self, name)
            setattr(result, name, None if value is None else change(value))
        return result

    def clone(self) -> Args:
        """A copy whose tensors have the same strides."""
        return self.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t))


def make(
    rule: str,
    shapes: Sequence[tuple[int, ...]] = ((129,), (3, 5), (7,)),
    dtype: torch.dtype | Sequence[torch.dtype] = torch.float32,
    state_dtype: torch.dtype | str | Sequence[torch.dtype | str] = torch.float32,
    grad_dtype: torch.dtype | None = None,
    steps: int | Sequence[int] = 4,
    masked: bool = False,
    averaged: bool = False,
    seed: int = 0,
    **changes,
) -> Args:
    """Tensors of these shapes in the middle of a training; `changes` are other arguments, or hyper-parameters."""
    generator = torch.Generator().manual_seed(seed)
    r = RULES[rule]
    hyper = {name: changes.pop(name, HYPER[name]) for name in (*COMMON, *r.hyper)}
    args = Args(rule, hyper=[float(value) for value in hyper.values()], **changes)
    for i, shape in enumerate(shapes):
        p_dtype, s_dtype = (x if isinstance(x, (torch.dtype, str)) else x[i] for x in (dtype, state_dtype))
        args.params.append(torch.randn(shape, generator=generator).to(p_dtype))
        args.grads.append(torch.randn(shape, generator=generator).to(grad_dtype or p_dtype))
        for name in r.states:
            value = torch.randn(shape, generator=generator) * 0.5
            value = value * value + 2.0**-6 if name in r.unsigned else value * 0.25  # centered RMSprop: v above a²
            state, scale = value.to(torch.float64 if p_dtype == torch.float64 else torch.float32), torch.empty(0)
            if s_dtype == CODED and value.numel():
                bits = torch.full((value.numel(),), codec.NEAREST)
                state, scale = codec.quantize(value, torch.uint8 if name in r.unsigned else torch.int8, bits)
            elif s_dtype != CODED:
                state = state.to(s_dtype)
            args.states.append(state)
            args.scales.append(scale)
        for name in r.scalars:
            step = steps if isinstance(steps, int) else steps[i]
            args.scalars.append(torch.tensor(float(step) if name == "step" else 0.9**step))
        if averaged:
            wide = torch.float64 if p_dtype == torch.float64 else torch.float32
            args.ema.append(torch.randn(shape, generator=generator).to(wide))
        if masked:
            mask = torch.rand(shape, generator=generator) > 0.3
            args.masks.append(torch.empty(0) if i == 1 else mask if i % 2 else mask.to(torch.uint8))
    if all(scale.numel() == 0 for scale in args.scales):
        args.scales = []
    return args


def compare(actual: Args, expected: Args, ulps: float = 0, flips: float = 0.0) -> None:
    """Raise AssertionError unless `actual`, on any device, is what `expected` is.

    Numbers may differ by `ulps` of fp32, relative to the number or to 1; narrow formats, which round stochastically,
    by one step in a fraction `flips` of the elements.
    """
    actual = actual.map(lambda t: t.cpu().as_subclass(Tensor))
    for name in TENSOR_LISTS:
        for i, (a, b) in enumerate(zip(getattr(actual, name), getattr(expected, name), strict=True)):
            what = f"{name}[{i}] {tuple(b.shape)} {b.dtype}"
            assert a.dtype == b.dtype, what
            assert torch.equal(a.isnan(), b.isnan()), what
            narrow = b.dtype in (torch.int8, torch.uint8, torch.bfloat16)
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            off = (a - b).abs() > ulps * 2.0**-23 * b.abs().clamp(min=1)
            if narrow and flips:
                step = 1.0 if getattr(expected, name)[i].dtype.itemsize == 1 else 0.0
                near = (a - b).abs() <= step + 2.0**-7 * b.abs() * (step == 0)
                assert near[off].all(), what
                assert off.sum() <= flips * off.numel() + 1, (what, int(off.sum()))
            else:
                assert not off.any(), (what, a[off][:5].tolist(), b[off][:5].tolist(), int(off.sum()))
