"""RMSprop; the drop-in for `torch.optim.RMSprop`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import RMSPROP, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM, RMSPROP_MOMENTUM, Rule
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RMSprop(FusedOptimizer):
    """RMSprop, plain or `centered`, with or without momentum.

        g ← g + weight_decay·p
        v ← alpha·v + (1 - alpha)·g²            centered: a ← a + (1 - alpha)·(g - a), and v - a² for v below
        b ← momentum·b + g/(√v + eps)
        p ← p - lr·b

    Args: as `torch.optim.RMSprop`. `options`: `StepOptions`.
    State: `step`, `square_avg` (`momentum_buffer`) (`grad_avg`), each 4 bytes a parameter, 2 as bfloat16, 1.03 as int8.
    Source: Tieleman & Hinton 2012, "Lecture 6.5: rmsprop"; Graves 2013, arXiv:1308.0850 (centered).
    """

    rules = (RMSPROP, RMSPROP_MOMENTUM, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_not_negative(eps=eps, momentum=momentum, weight_decay=weight_decay, alpha=alpha)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        if group["centered"]:
            return RMSPROP_CENTERED_MOMENTUM if group["momentum"] > 0 else RMSPROP_CENTERED
        return RMSPROP_MOMENTUM if group["momentum"] > 0 else RMSPROP
