"""NAdam; the drop-in for `torch.optim.NAdam`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import NADAM
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NAdam(FusedOptimizer):
    """Adam with Nesterov momentum.

        m, v as in `Adam`;   μₜ = β₁·(1 - ½·0.96^(t·momentum_decay))
        p ← p - lr·((1 - μₜ)/(1 - Πμ)·g + μₜ₊₁/(1 - Πμ·μₜ₊₁)·m) / (√(v/(1 - β₂ᵗ)) + eps)

    Args: as `torch.optim.NAdam`. `options`: `StepOptions`.
    State: `step`, `mu_product`, `exp_avg`, `exp_avg_sq`: 8 bytes a parameter, 4 as bfloat16, 2.06 as int8.
    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam".
    """

    rules = (NADAM,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_betas(betas)
        check_not_negative(eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)
