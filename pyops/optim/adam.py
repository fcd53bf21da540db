"""Adam and AdamW; the drop-ins for `torch.optim.Adam` and `torch.optim.AdamW`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.optim_rules import ADAM, ADAM_AMSGRAD, Rule
from pyops.optim.base import FusedOptimizer
from pyops.optim.options import StepOptions, check_betas, check_lr, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adam(FusedOptimizer):
    """Adam, and AdamW with `decoupled_weight_decay`.

        g ← g + weight_decay·p               decoupled: p ← p - lr·weight_decay·p
        m ← m + (1 - β₁)·(g - m);   v ← β₂·v + (1 - β₂)·g²
        p ← p - lr/(1 - β₁ᵗ) · m / (√v/√(1 - β₂ᵗ) + eps)      with `amsgrad`, the largest v so far

    Args: as `torch.optim.Adam`. `lr` and `betas` may be tensors of one element; `betas` are read on the host.
        `options`: `StepOptions`.
    State: `step`, `exp_avg`, `exp_avg_sq` (`max_exp_avg_sq`): 8 bytes a parameter, 4 as bfloat16, 2.06 as int8 (half as
        much again with `amsgrad`).
    Source: Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101 (decoupled decay);
        Reddi et al. 2018, "On the Convergence of Adam and Beyond" (amsgrad).
    """

    rules = (ADAM, ADAM_AMSGRAD)
    sparse_hint = ", please consider SparseAdam instead"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        if foreach and not capturable:
            for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
                if isinstance(value, Tensor):
                    raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
        check_lr(lr)
        check_betas(betas)
        check_not_negative(eps=eps, weight_decay=weight_decay)
        if not any(all(isinstance(b, kind) for b in betas) for kind in (float, Tensor)):
            raise ValueError("betas must be either both floats or both Tensors")
        defaults = {
            "lr": lr,
            "betas": tuple(b.squeeze() if isinstance(b, Tensor) else b for b in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return ADAM_AMSGRAD if group["amsgrad"] else ADAM


class AdamW(Adam):
    """Adam with decoupled weight decay: p ← p - lr·weight_decay·p before each update. See `Adam`.

    Args: as `torch.optim.AdamW`. `options`: `StepOptions`.
    State: as `Adam`.
    Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            *(params, lr, betas, eps, weight_decay, amsgrad),
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch: checkpoints of an Adam do not change what this class is."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
