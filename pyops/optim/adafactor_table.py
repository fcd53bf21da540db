"""Adafactor's steps on CPU tensors as two tables of pointers: one that watches the tensors, one that steps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from pyops import backend
from pyops.ops import adafactor_native, optim_native
from pyops.ops import optim as op
from pyops.ops.adafactor import ADAFACTOR
from pyops.ops.optim_rules import SGD
from pyops.optim.table import Table

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer
    from pyops.optim.collect import Call


class FactoredTable(Table):
    """Stands for the `Call`s of an Adafactor until something moves."""

    def __init__(self, optimizer: FusedOptimizer, calls: list[Call]) -> None:
        self._items = backend.native.AdafactorTable()
        self._copies: list[tuple[Tensor, Tensor]] = []  # of states that do not lie as the kernel wants them
        self._views: list[Tensor | None] = []
        self._rest: dict[int, Iterator[Tensor]] = {i: iter(call.states) for i, call in enumerate(calls)}
        super().__init__(optimizer, calls)

    def _add(self, group: int, call: Call, i: int) -> int:
        p, g = call.params[i], call.grads[i]
        states = [next(self._rest[group]) for _ in ADAFACTOR.shapes_of(p.shape)]
        average, mask = call.ema[i] if call.ema else None, call.masks[i] if call.masks else None
        stream = call.stream + i
        self._views += adafactor_native.add_item(self._items, p, g, states, average, mask, stream, self._copies)
        # As the rule without states: that table only watches, counts and adds up the gradient's squares.
        first = call.first[i] if call.first else 0
        counters = [call.scalars[i]]
        return optim_native.add_entry(self._native, SGD, p, g, (), (), counters, None, None, stream, group, first)

    def step(self, optimizer: FusedOptimizer, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        """Step every parameter, as the op would call by call."""
        if found_inf is not None and found_inf.item() != 0:
            return
        factor = 1.0 if multiplier is None else multiplier.item()
        hypers = [op.hyper_dict(ADAFACTOR, *optimizer._hyper(call)) for call in self.calls]
        rows, counts = [], []
        for group, first, (step,) in self._native.combinations():
            h, counted = hypers[group], {"step": step + 1}
            eps1 = self.calls[group].group["eps"][0]
            rows.append(adafactor_native.row(h, ADAFACTOR.coefficients(h, counted), eps1, factor, first))
            counts.append([step + 1])
        o, grads = optimizer.options, self._native.gradients()
        for state, copy in self._copies:
            copy.copy_(state)
        self._items.step(rows, self._native.which(), grads, o.zero_grad, o.stochastic_rounding, key)
        for state, copy in self._copies:
            state.copy_(copy)
        self._native.count(counts)
        optim_native.count_changes(self.params, [p.grad for p in self.params] if o.zero_grad else ())
