"""The calls of a step on CPU tensors as one table of pointers, kept from step to step.

Collecting the tensors of a thousand parameters in Python takes longer than stepping them. The table of the compiled
extension (`csrc/optim_python.cpp`) is built from what was collected once; before each further step it checks that every
parameter, gradient and state is still what it was built from, a microsecond for a parameter, and is dropped if not.
All groups step in one parallel region.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyops import backend
from pyops.ops import optim as op
from pyops.ops import optim_native
from pyops.ops.optim_rules import Rule
from pyops.optim import distributed
from pyops.optim.collect import real
from pyops.optim.state import SCALE

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer
    from pyops.optim.collect import Call


class Table:
    """Stands for the `Call`s of an optimizer until something moves."""

    def __init__(self, optimizer: FusedOptimizer, calls: list[Call]) -> None:
        self._native = backend.native.OptimTable()
        self._state = optimizer.state
        self._averaged = optimizer.options.ema_decay is not None
        self._rules = [optimizer._rule(group) for group in optimizer.param_groups]
        self._masks: list[Tensor | None] = []
        self._kept: list[Tensor] = []  # masks as the kernel wants them
        # Whose strides could change unnoticed. Other sizes show in the gradient's, which have to be the parameter's.
        self._held: list[Tensor] = []
        self.params: list[Tensor] = []
        self.calls = calls
        self._by_spec: dict[distributed.Spec | None, list[Tensor]] = {}
        entries: dict[Tensor, int] = {}
        for i, call in enumerate(calls):
            for j, p in enumerate(call.originals):
                entries[p] = self._add(i, call, j)
                self._by_spec.setdefault(call.specs[j] if call.specs else None, []).append(p)
            self.params += call.originals
            call.grads = []  # the table must not keep gradients alive that the next backward replaces
        for group, rule in zip(optimizer.param_groups, self._rules, strict=True):
            for p in group["params"]:
                self._watch(optimizer, p, rule, entries.get(p, -1))
        self._native.cut(optimizer.state)
        self._geometry = geometry([*self._local(), *self._native.refresh(optimizer.state, optimizer.param_groups)])

    @classmethod
    def of(cls, optimizer: FusedOptimizer, calls: list[Call]) -> Table | None:
        """The table of these calls, or None where they are not for it: other devices, sparse, complex and such."""
        originals = [p for call in calls for p in call.originals]
        fits = (
            backend.native is not None
            and originals
            and len(set(originals)) == len(originals)
            and not any(call.sparse or call.copied or call.newly_masked for call in calls)
            and not any(call.device.type != "cpu" for call in calls)
            and not any(p.is_complex() for p in originals)
        )
        return cls(optimizer, calls) if fits else None

    def _add(self, group: int, call: Call, i: int) -> int:
        k, n = len(call.rule.states), len(call.rule.scalars)
        p = call.params[i]
        return optim_native.add_entry(
            self._native,
            call.rule,
            p,
            call.grads[i],
            call.states[i * k : (i + 1) * k],
            call.scales[i * k : (i + 1) * k],
            call.scalars[i * n : (i + 1) * n],
            call.ema[i] if call.ema else None,
            call.masks[i] if call.masks and call.masks[i].numel() else None,
            call.stream + i,
            group,
            call.first[i] if call.first else 0,
            self._kept,
        )

    def _watch(self, optimizer: FusedOptimizer, p: Tensor, rule: Rule, entry: int) -> None:
        state = optimizer.state.get(p)
        values, counters = {}, {}
        if entry >= 0 and state:
            wanted = [*rule.states, *(name + SCALE for name in rule.states), "ema"]
            values = {name: state[name] for name in wanted if name in state}
            counters = {name: state[name] for name in rule.scalars}
        self._masks.append(optimizer._masks.get(p)[0] if optimizer._masks else None)
        if entry >= 0 and p.dim() > 1:
            self._held.append(p)
        watched = state if values or counters else None
        self._native.watch(p, distributed.is_dtensor(p), watched, values, counters, entry)

    def _local(self) -> list[Tensor]:
        """What is held, of DTensors what this process has."""
        return self._held if self._by_spec.keys() <= {None} else [distributed.local(t) for t in self._held]

    def holds(self, optimizer: FusedOptimizer) -> bool:
        """True if the next step is over the same tensors by the same rules; gradients may have moved."""
        groups = optimizer.param_groups
        if optimizer.state is not self._state or len(groups) != len(self._rules):
            return False
        if self._averaged != (optimizer.options.ema_decay is not None):
            return False
        if any(optimizer._rule(group) is not rule for group, rule in zip(groups, self._rules, strict=True)):
            return False
        if optimizer._masks:
            optimizer._masks.refresh()
            params = (p for group in groups for p in group["params"])
            if any(optimizer._masks.get(p)[0] is not mask for p, mask in zip(params, self._masks, strict=True)):
                return False
        if not all(_placed(p) for spec, params in self._by_spec.items() if spec for p in params):
            return False
        grads = self._native.refresh(optimizer.state, groups)
        return grads is not None and self._geometry.check(*self._local(), *grads)

    def sum_squares(self) -> Tensor:
        """Of all gradients, fp64 []."""
        if len(self._by_spec) == 1:
            total = torch.tensor(self._native.sum_squares(), dtype=torch.float64)
            return distributed.all_reduce(total, *self._by_spec)
        parts = [(op.optim_sum_squares([real(p.grad) for p in params]), spec) for spec, params in self._by_spec.items()]
        return torch.stack([distributed.all_reduce(part, spec) for part, spec in parts]).sum()

    def step(self, optimizer: FusedOptimizer, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        """Step every parameter, as the op would call by call."""
        if found_inf is not None and found_inf.item() != 0:
            return
        factor = 1.0 if multiplier is None else multiplier.item()
        hypers = [op.hyper_dict(call.rule, *optimizer._hyper(call)) for call in self.calls]
        rows = [
            optim_native.row(self.calls[group].rule, hypers[group], first, values, factor)
            for group, first, values in self._native.combinations()
        ]
        o = optimizer.options
        self._native.step(rows, o.zero_grad, o.stochastic_rounding, key)
        optim_native.count_changes(self.params, [p.grad for p in self.params] if o.zero_grad else ())


class Geometry:
    """Tells whether tensors still have the dtypes, sizes, strides and bits (negated, conjugated) that they had."""

    def __init__(self, *tensors: Tensor) -> None:
        self._seen = [self._of(t) for t in tensors]

    @staticmethod
    def _of(t: Tensor) -> tuple[object, ...]:
        return t.dtype, t.shape, t.stride(), t.is_neg(), t.is_conj()

    def check(self, *tensors: Tensor) -> bool:
        """True if they have."""
        return len(tensors) == len(self._seen) and all(map(operator.eq, map(self._of, tensors), self._seen))


def geometry(tensors: list[Tensor]) -> Geometry:
    """`Geometry`, or what torch's compiler guards its graphs with: the same, and faster."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    try:
        return guards.TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[])
    except (AttributeError, TypeError):  # it is not public: another torch may have another
        return Geometry(*tensors)


def _placed(p: Tensor) -> bool:
    """True unless p, a DTensor, has a gradient that is placed otherwise."""
    g = p.grad
    return g is None or getattr(g, "_spec", None) is p._spec or distributed.spec_of(g) == distributed.spec_of(p)
