"""Adafactor; the drop-in for `torch.optim.Adafactor`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pyops.ops.adafactor import ADAFACTOR, adafactor_step_op
from pyops.optim.adafactor_table import FactoredTable
from pyops.optim.base import FusedOptimizer
from pyops.optim.collect import Call
from pyops.optim.options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adafactor(FusedOptimizer):
    """Adafactor: second moments of matrices as a row and a column, and steps relative to the size of the parameter.

        w = t^beta2_decay
        row ← row + w·(mean of g² over columns - row);   col ← col + w·(mean of g² over rows - col)
        v = row/max(mean of row, eps1)·col               of fewer than two dimensions: v ← v + w·(g² - v)
        u = g/√max(v, eps1²)
        p ← (1 - lr·weight_decay)·p - min(lr, 1/√t)·max(eps2, RMS(p))/max(1, RMS(u)/d)·u

    Args: as `torch.optim.Adafactor`. `lr` may be a tensor of one element; `eps` is (eps1, eps2), where eps1 None is the
        machine epsilon of each parameter's dtype. `options`: `StepOptions`. Masked gradients count as zeros in all
        means.
    State: `step`, and `row_var` and `col_var` of the last two dimensions, or `variance` of parameters with fewer than
        two. They are fp32 whatever `state_dtype` says (fp64 of fp64 parameters), as they are small already: 8 bytes a
        row or column of a matrix.
    Raises NotImplementedError for sharded DTensors, of which a rank does not have the means; RuntimeError for complex
        parameters and sparse gradients.
    Source: Shazeer & Stern 2018, arXiv:1804.04235, as `torch.optim.Adafactor` changed it.
    """

    rules = (ADAFACTOR,)
    takes_complex = False
    tables = FactoredTable

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Learning rate should be >= 0 but is: {lr}")
        if not beta2_decay <= 0.0:
            raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
        if eps[0] is not None and not eps[0] >= 0.0:
            raise ValueError(f"epsilon1 should be >= 0 but is: {eps[0]}")
        if not eps[1] >= 0.0:
            raise ValueError(f"epsilon2 should be >= 0 but is: {eps[1]}")
        if not d >= 1.0:
            raise ValueError(f"Clipping threshold d should be >= 1 but is: {d}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay should be >= 0 but is: {weight_decay}")
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, options)

    def _hyper(self, call: Call) -> tuple[list[float], Tensor | None]:
        return super()._hyper(replace(call, group={**call.group, "eps2": call.group["eps"][1]}))

    def _run(self, call: Call, multiplier: Tensor | None, found_inf: Tensor | None, key: int) -> None:
        o = self.options
        hyper, lr = self._hyper(call)
        adafactor_step_op(
            *(call.params, call.grads, call.states, call.scalars, hyper, call.group["eps"][0], call.ema, call.masks),
            *(call.first, lr, multiplier, found_inf, o.zero_grad, o.stochastic_rounding, key, call.stream),
        )
