"""Adagrad; the drop-in for `torch.optim.Adagrad`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import ADAGRAD
from pyops.optim import ema
from pyops.optim.base import FusedOptimizer, number
from pyops.optim.collect import Collector
from pyops.optim.options import StepOptions, check_lr, check_not_negative
from pyops.optim.state import WIDE

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adagrad(FusedOptimizer):
    """Adagrad.

        g ← g + weight_decay·p
        v ← v + g²
        p ← p - lr/(1 + (t - 1)·lr_decay) · g/(√v + eps)

    Args: as `torch.optim.Adagrad`; gradients may be sparse. `options`: `StepOptions`.
    State: `step`, `sum`, made at once: 4 bytes a parameter, 2 as bfloat16, 1.03 as int8.
    Source: Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
    """

    rules = (ADAGRAD,)
    takes_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(lr_decay=lr_decay, weight_decay=weight_decay)
        check_not_negative(initial_accumulator_value=initial_accumulator_value, eps=eps)
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)
        self._make_all_states()

    @torch.no_grad()
    def _make_all_states(self) -> None:
        collector = Collector(self)
        for group in self.param_groups:
            for p in group["params"]:
                collector.make_states(p, group, ADAGRAD)
                if self.options.ema_decay is not None:  # checkpoints load what they find, and find states
                    self.state[p][ema.KEY] = p.detach().to(WIDE[p.dtype], copy=True)

    def _initial(self, name: str, p: Tensor) -> complex:
        if name != "sum":
            return super()._initial(name, p)
        value = self.defaults["initial_accumulator_value"]
        return complex(value, value) if p.is_complex() else value

    def share_memory(self) -> None:
        """Move the sums of squares into shared memory, for training by several processes."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()

    def _sparse_step(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "sum" not in state:
            Collector(self).make_states(p, group, ADAGRAD)
        total, step = state["sum"], state["step"].add_(1)
        step_size = number(group["lr"]) / (1 + (step.item() - 1) * group["lr_decay"])
        g = g.coalesce()  # the update is not linear, so that every index may come only once
        index, values = tuple(g.indices()), g.values().to(total.dtype)
        total[index] = v = total[index] + values.square()
        p[index] -= (step_size * values / (v.sqrt() + group["eps"])).to(p.dtype)
