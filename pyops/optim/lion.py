"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import LION
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(FusedOptimizer):
    """Lion.

        p ← p - lr·weight_decay·p
        p ← p - lr·sign(β₁·m + (1 - β₁)·g)
        m ← β₂·m + (1 - β₂)·g

    Args:
        params: parameters, named parameters or groups, as for `torch.optim.Adam`.
        lr: learning rate, a third to a tenth of AdamW's.
        betas: of the update, and of the momentum.
        weight_decay: decoupled; three to ten times AdamW's.
        maximize, capturable: as `torch.optim.Adam`.
        options: `StepOptions`.
    State: `step`, `exp_avg`: 4 bytes a parameter, 2 as bfloat16, 1.03 as int8.
    Source: Chen et al. 2023, arXiv:2302.06675.
    """

    rules = (LION,)
    decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        check_betas(betas)
        check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, options)
