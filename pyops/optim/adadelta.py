"""Adadelta; the drop-in for `torch.optim.Adadelta`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import ADADELTA
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adadelta(FusedOptimizer):
    """Adadelta.

        g ← g + weight_decay·p
        v ← rho·v + (1 - rho)·g²
        δ = √(u + eps)/√(v + eps)·g;   u ← rho·u + (1 - rho)·δ²
        p ← p - lr·δ

    Args: as `torch.optim.Adadelta`. `options`: `StepOptions`.
    State: `step`, `square_avg`, `acc_delta`: 8 bytes a parameter, 4 as bfloat16, 2.06 as int8.
    Source: Zeiler 2012, arXiv:1212.5701.
    """

    rules = (ADADELTA,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        check_lr(lr)
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"Invalid rho value: {rho}")
        check_not_negative(eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)
