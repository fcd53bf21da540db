"""RAdam; the drop-in for `torch.optim.RAdam`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import RADAM
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RAdam(FusedOptimizer):
    """Adam that rectifies the variance of its first steps.

        m, v as in `Adam`;   ρ∞ = 2/(1 - β₂) - 1;   ρₜ = ρ∞ - 2·t·β₂ᵗ/(1 - β₂ᵗ)
        ρₜ > 5:   p ← p - lr/(1 - β₁ᵗ) · rₜ·√(1 - β₂ᵗ)·m/(√v + eps),
                  rₜ² = (ρₜ-4)(ρₜ-2)·ρ∞ / ((ρ∞-4)(ρ∞-2)·ρₜ)
        else:     p ← p - lr/(1 - β₁ᵗ) · m

    Args: as `torch.optim.RAdam`. `options`: `StepOptions`.
    State: `step`, `exp_avg`, `exp_avg_sq`: 8 bytes a parameter, 4 as bfloat16, 2.06 as int8.
    Source: Liu et al. 2019, arXiv:1908.03265.
    """

    rules = (RADAM,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
        check_not_negative(eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)
