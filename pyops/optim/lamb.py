"""LAMB: Adam with a learning rate for each tensor, for large batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import LAMB as RULE
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LAMB(FusedOptimizer):
    """LAMB.

        m, v as in `Adam`
        u = m/(1 - β₁ᵗ) / (√v/√(1 - β₂ᵗ) + eps) + weight_decay·p
        p ← p - lr·‖p‖/‖u‖·u                 over the whole tensor; the ratio is 1 where a norm is 0

    Args:
        params: parameters, named parameters or groups, as for `torch.optim.Adam`.
        lr: learning rate.
        betas: coefficients of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: part of the update, and so scaled by the ratio.
        bias_correction: False leaves out 1 - β₁ᵗ and 1 - β₂ᵗ, as some implementations do.
        maximize, capturable: as `torch.optim.Adam`.
        options: `StepOptions`.
    State: `step`, `exp_avg`, `exp_avg_sq`: 8 bytes a parameter, 4 as bfloat16, 2.06 as int8.
    Raises NotImplementedError for sharded DTensors: a rank does not have their norms.
    Source: You et al. 2020, arXiv:1904.00962.
    """

    rules = (RULE,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        *,
        maximize: bool = False,
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
            "bias_correction": bias_correction,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)
