"""SGD; the drop-in for `torch.optim.SGD`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import SGD as PLAIN
from pyops.ops.optim_rules import SGD_MOMENTUM, Rule
from pyops.optim.base import FusedOptimizer, number
from pyops.optim.options import StepOptions, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(FusedOptimizer):
    """Stochastic gradient descent, with momentum and Nesterov's.

        g ← g + weight_decay·p
        b ← momentum·b + (1 - dampening)·g   (b = g in the first step)
        p ← p - lr·b        with `nesterov`: p ← p - lr·(g + momentum·b)

    Args: as `torch.optim.SGD`; gradients may be sparse. `options`: `StepOptions`.
    State: `momentum_buffer` where momentum is not 0: 4 bytes a parameter, 2 as bfloat16, 1.03 as int8.
    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    rules = (PLAIN, SGD_MOMENTUM)
    takes_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return SGD_MOMENTUM if group["momentum"] != 0 else PLAIN

    def _sparse_step(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        if momentum != 0:
            state = self.state[p]
            if "momentum_buffer" not in state:
                b = state["momentum_buffer"] = torch.clone(g)
            else:
                b = state["momentum_buffer"].mul_(momentum).add_(g, alpha=1 - group["dampening"])
            g = g.add(b, alpha=momentum) if group["nesterov"] else b
        p.add_(g, alpha=-number(group["lr"]))
