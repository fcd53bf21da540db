"""Adamax; the drop-in for `torch.optim.Adamax`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import ADAMAX
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adamax(FusedOptimizer):
    """Adam with the infinity norm in place of the second moment.

        g ← g + weight_decay·p
        m ← m + (1 - β₁)·(g - m);   u ← max(β₂·u, |g| + eps)
        p ← p - lr/(1 - β₁ᵗ) · m/u

    Args: as `torch.optim.Adamax`. `options`: `StepOptions`.
    State: `step`, `exp_avg`, `exp_inf`: 8 bytes a parameter, 4 as bfloat16, 2.06 as int8.
    Source: Kingma & Ba 2014, arXiv:1412.6980.
    """

    rules = (ADAMAX,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_betas(betas)
        check_not_negative(eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)
