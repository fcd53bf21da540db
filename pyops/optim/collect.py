"""From parameter groups to the arguments of the op: what has a gradient, is checked and gets its states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyops.ops.optim import FIRST_EMA, FIRST_STATE
from pyops.ops.optim_rules import Rule
from pyops.optim import distributed, ema
from pyops.optim.checkpoint import owners, scalar_dtype
from pyops.optim.options import check_implementation
from pyops.optim.state import SCALE, WIDE, make, stored_dtype, write

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer

CAPTURABLE_DEVICES = ("cuda", "xpu", "hpu", "xla", "privateuseone")


@dataclass
class Call:
    """The arguments of one call of the op: what of a group is on one device. Lists of plain, local, real tensors."""

    rule: Rule
    group: dict[str, Any]
    stream: int
    """Position of the first parameter among all of the optimizer."""
    device: torch.device
    sparse: bool = False
    """True if the gradients are sparse: these have a path of their own, and only `originals` and `grads` are filled."""
    originals: list[Tensor] = field(default_factory=list)
    """The parameters as the group has them."""
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)
    ema: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    newly_masked: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(average, mask) where the mask is new: the op would let such an average decay to zero."""
    copied: list[Tensor] = field(default_factory=list)
    """Gradients that were not placed as their parameters are: `grads` has copies of them."""
    specs: list[distributed.Spec | None] = field(default_factory=list)
    """How DTensors are laid out; empty if there are none."""


class Collector:
    """Builds the calls of one step.

    States that are not there yet are made; `unmake` takes them back if the step does not happen, for else the next one
    would not know that it is their first.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.name = type(optimizer).__name__
        self.averaged = optimizer.options.ema_decay is not None
        self.made: list[tuple[Tensor, str]] = []
        self._nothing: dict[torch.device, Tensor] = {}

    def calls(self) -> list[Call]:
        """One for each group, device and kind of gradient."""
        calls: list[Call] = []
        position = 0
        for group in self.optimizer.param_groups:
            check_implementation(group)
            rule = self.optimizer._rule(group)
            kinds: dict[tuple, Call] = {}
            times: dict[Tensor, int] = {}
            for p in group["params"]:
                g = p.grad
                if g is not None:
                    times[p] = time = times.get(p, 0) + 1  # torch steps a parameter that is listed twice, twice
                    device = p.device
                    kind = device, g.is_sparse, time
                    call = kinds.get(kind)
                    if call is None:
                        call = kinds[kind] = Call(rule, group, position, device, g.is_sparse)
                    self._check(call, p, g)
                    call.originals.append(p)
                    if call.sparse:
                        call.grads.append(g)
                    else:
                        self._add(call, p, g)
                position += 1
            calls += kinds.values()
        for call in calls:
            _trim(call)
        return calls

    def _add(self, call: Call, p: Tensor, g: Tensor) -> None:
        rule, masks = call.rule, self.optimizer._masks
        shapes = rule.shapes_of(p.shape)
        state = self.optimizer.state[p] if shapes or rule.scalars or self.averaged else {}
        made = len(self.made)
        if not all(name in state for name in (*rule.scalars, *shapes)):
            self.make_states(p, call.group, rule)
        first = FIRST_STATE if len(self.made) > made else 0
        # What the op gets is nearly always the tensor itself, and this is done for every parameter at every step.
        as_is = type(p) in distributed.PLAIN and not p.is_complex()
        given = _itself if as_is else real
        for name in rule.scalars:
            call.scalars.append(state[name])
        for name, shape in shapes.items():
            call.states.append(given(self._fitting(state[name], p, call.device, name, shape)))
            scale = state.get(name + SCALE)
            call.scales.append(self._none(call.device) if scale is None else distributed.local(scale))
        mask, is_new = masks.get(p) if masks else (None, False)
        call.masks.append(self._none(call.device) if mask is None else mask)
        if self.averaged:
            if not ema.begun(state):
                if ema.KEY not in state:
                    self._put(p, ema.KEY, make(p, WIDE[p.dtype])[0])
                first |= FIRST_EMA
            call.ema.append(given(self._fitting(state[ema.KEY], p, call.device, ema.KEY, p.shape)))
            if is_new and not first & FIRST_EMA:
                call.newly_masked.append((call.ema[-1], mask))
        call.first.append(first)
        call.params.append(given(p))
        placed = g if as_is else distributed.placed_as(g, p)
        if placed.is_neg() or placed.is_conj():  # its memory holds something else
            placed = placed.resolve_conj().resolve_neg()
        if placed is not g:
            call.copied.append(g)
        call.grads.append(given(placed))
        call.specs.append(None if as_is else distributed.spec_of(p))

    def make_states(self, p: Tensor, group: dict[str, Any], rule: Rule) -> None:
        """Make those scalars and states of p that are not there."""
        state, optimizer = self.optimizer.state[p], self.optimizer
        for name in rule.scalars:
            if name not in state:
                device = p.device if group.get("capturable") else "cpu"
                self._put(p, name, torch.full((), optimizer._initial(name, p), dtype=scalar_dtype(), device=device))
        for name, shape in rule.shapes_of(p.shape).items():
            if name not in state:
                unsigned = name in rule.unsigned
                state_dtype = "float32" if rule.shapes else optimizer.options.state_dtype
                tensor, scale = make(p, stored_dtype(p, state_dtype, unsigned), shape)
                value = optimizer._initial(name, p)
                if value:
                    write(tensor, scale, torch.full_like(distributed.local(p), value, dtype=WIDE[p.dtype]))
                self._put(p, name, tensor)
                if scale is not None:
                    self._put(p, name + SCALE, scale)

    def unmake(self) -> None:
        """Take back what was made."""
        for p, name in self.made:
            self.optimizer.state[p].pop(name)
            if not self.optimizer.state[p]:
                del self.optimizer.state[p]

    def _put(self, p: Tensor, name: str, tensor: Tensor) -> None:
        self.optimizer.state[p][name] = tensor
        self.made.append((p, name))

    def _none(self, device: torch.device) -> Tensor:
        if device not in self._nothing:
            self._nothing[device] = torch.empty(0, device=device)
        return self._nothing[device]

    def _check(self, call: Call, p: Tensor, g: Tensor) -> None:
        """Raise, as torch would, for what no rule can step."""
        problem: str | None = None
        if p.is_complex() and not self.optimizer.takes_complex:
            raise RuntimeError(f"{self.name} does not support complex parameters")
        if g.layout != torch.strided:
            self._check_sparse(g, call.group)
        elif p.dtype not in WIDE or g.dtype not in WIDE or p.is_complex() != g.is_complex():
            allowed = "fp32, bf16, fp16, fp64 and complex parameters with such gradients"
            problem = f"it is {p.dtype}, its gradient {g.dtype}; allowed: {allowed}"
        elif g.device != call.device:
            problem = f"it is on {call.device}, its gradient on {g.device}"
        elif g.shape != p.shape:
            problem = f"it has shape {tuple(p.shape)}, its gradient {tuple(g.shape)}"
        elif call.group.get("fused") and p.is_complex():
            problem = "`fused=True` requires all the params to be floating point Tensors"
        elif type(p) not in distributed.PLAIN:
            problem = distributed.check_grad(p, g)
            if problem is None and call.rule.whole_tensor and distributed.is_sharded(distributed.spec_of(p)):
                raise NotImplementedError(
                    f"{self.name}: {self._label(p)} is a sharded DTensor, and this rule needs norms of whole tensors"
                )
        if problem is not None:
            raise RuntimeError(f"{self.name}: {self._label(p)} cannot be stepped: {problem}")
        if call.group.get("capturable") and p.device.type not in CAPTURABLE_DEVICES:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {list(CAPTURABLE_DEVICES)}."
            )

    def _check_sparse(self, g: Tensor, group: dict[str, Any]) -> None:
        optimizer, o = self.optimizer, self.optimizer.options
        if not optimizer.takes_sparse or not g.is_sparse:
            raise RuntimeError(f"{self.name} does not support sparse gradients{optimizer.sparse_hint}")
        for key, unfit in (
            ("fused", group.get("fused")),
            ("weight_decay", group["weight_decay"] != 0),
            ("ema_decay", self.averaged),
            ("masks", bool(optimizer._masks)),
            ("l1", group.get("l1")),
            ("stochastic_rounding", o.stochastic_rounding),
            ("state_dtype", o.state_dtype != "float32"),
        ):
            if unfit:
                raise RuntimeError(f"{self.name}: {key} option is not compatible with sparse gradients")

    def _fitting(self, state: Tensor, p: Tensor, device: torch.device, name: str, shape: tuple[int, ...]) -> Tensor:
        if state.shape != shape or state.device != device or state.layout != torch.strided:
            raise RuntimeError(
                f"{self.name}: state {name!r} of {self._label(p)} is {tuple(state.shape)} {state.layout} on "
                f"{state.device}, the parameter {tuple(p.shape)} on {device}"
            )
        return state

    def _label(self, p: Tensor) -> str:
        return next(label for q, _, label in owners(self.optimizer.param_groups) if q is p)


def _trim(call: Call) -> None:
    """Empty the lists that say nothing."""
    for name in ("scales", "masks"):
        if not any(t.numel() for t in getattr(call, name)):
            setattr(call, name, [])
    if not any(call.first):
        call.first = []
    if not any(call.specs):
        call.specs = []


def _itself(t: Tensor) -> Tensor:
    return t


def real(t: Tensor) -> Tensor:
    """The local shard, complex numbers as pairs of reals."""
    t = distributed.local(t)
    return torch.view_as_real(t) if t.is_complex() else t
