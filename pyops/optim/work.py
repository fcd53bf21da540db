"""What a step does, call by call of the op. `table.py` does the same for CPU tensors without reading them anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pyops.ops.optim import optim_sum_squares
from pyops.optim.collect import Call, real
from pyops.optim.distributed import all_reduce, local

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer


class Work(Protocol):
    """One step over what was collected."""

    calls: list[Call]

    def sum_squares(self) -> Tensor:
        """Of all gradients, fp64 []."""

    def step(self, optimizer: FusedOptimizer, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        """Step every parameter with its gradient times `multiplier`, unless found_inf is not 0."""


class Calls:
    """Runs the op for each call; sparse gradients have a path of their own."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls

    def sum_squares(self) -> Tensor:
        """Of all gradients, fp64 [], on the first one's device."""
        parts: dict[tuple, list[Tensor]] = {}
        for call in self.calls:
            if call.sparse:
                parts.setdefault((call.device, None), []).extend(real(g.coalesce().values()) for g in call.grads)
            elif call.specs:
                for g, spec in zip(call.grads, call.specs, strict=True):
                    parts.setdefault((call.device, spec), []).append(g)
            else:
                parts.setdefault((call.device, None), []).extend(call.grads)
        sums = [all_reduce(optim_sum_squares(grads), spec) for (_, spec), grads in parts.items()]
        return sum((s.to(self.calls[0].device) for s in sums[1:]), start=sums[0])

    def step(self, optimizer: FusedOptimizer, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        """One call of the op after the other."""
        o = optimizer.options
        for call in self.calls:
            factor, inf = _on(multiplier, call.device), _on(found_inf, call.device)
            if call.sparse:
                _run_sparse(optimizer, call, factor)
                continue
            optimizer._run(call, factor, inf, key)
            for average, mask in call.newly_masked:
                average.masked_fill_(mask == 0, 0)
            optimizer._masks.settle(call.originals)
            # What kernels write through pointers, autograd does not see.
            torch.autograd.graph.increment_version(call.originals)
            if o.zero_grad:
                for g in call.copied:
                    local(g).zero_()
                torch.autograd.graph.increment_version([p.grad for p in call.originals])


def _run_sparse(optimizer: FusedOptimizer, call: Call, multiplier: Tensor | None) -> None:
    sign = -1 if call.group["maximize"] else 1
    for p, g in zip(call.originals, call.grads, strict=True):
        scaled = g * sign if multiplier is None else g * (multiplier * sign).to(g.dtype)
        optimizer._sparse_step(p, scaled, call.group)
        if optimizer.options.zero_grad:
            g.zero_()


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device)
