"""What can be folded into a step beside the update rule, and the checks of every argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

STATE_DTYPES = ("float32", "bfloat16", "int8")


class StepOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer of `pyops.optim` takes beside those of its namesake in `torch.optim`.

    max_grad_norm: clip the gradients by their global norm, as `torch.nn.utils.clip_grad_norm_` does, without writing
        them back. The norm is then in `optimizer.grad_norm`. It is that of this optimizer's gradients, over all ranks
        if they are DTensors. Where each rank's has but a part of them (`ZeroRedundancyOptimizer`, FSDP1), clip before.
    error_if_nonfinite: raise RuntimeError, before anything changes, if that norm is NaN or infinite; under a GradScaler
        the step is skipped instead. None (default) means: if `max_grad_norm` is set. The check reads one number from
        the device.
    ema_decay: keep ema ← ema_decay·ema + (1 - ema_decay)·p of every parameter as its state "ema", 4 bytes an element;
        see `averaged_parameters`. The first step copies p.
    masks: 0/1 tensors by parameter, or a module whose parameters `torch.nn.utils.prune` has pruned (looked up anew at
        every step). What is masked stays exactly zero: parameter, states and average.
    zero_grad: set the gradients to zero in the same pass.
    state_dtype: "float32"; "bfloat16", rounded stochastically; or "int8", one byte an element and a scale for each 128.
        In "int8" tensors under 4096 elements, or with slices of under 32 elements along dimension 0, keep fp32.
    stochastic_rounding: round bf16 parameters up or down with the probability that keeps their expectation.
    seed: of both stochastic roundings. With the count of steps, which `state_dict` holds, it fixes every random bit.
    l1: weight of an L1 penalty, by its proximal step p ← sign(p)·max(|p| - lr·l1, 0). May differ between groups.
    """

    max_grad_norm: float | None
    error_if_nonfinite: bool | None
    ema_decay: float | None
    masks: Mapping[Tensor, Tensor] | torch.nn.Module | None
    zero_grad: bool
    state_dtype: str
    stochastic_rounding: bool
    seed: int
    l1: float


@dataclass
class Options:
    """The options of one optimizer; those of `StepOptions` that are neither of a group nor the masks."""

    max_grad_norm: float | None = None
    error_if_nonfinite: bool | None = None
    ema_decay: float | None = None
    zero_grad: bool = False
    state_dtype: str = "float32"
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("zero_grad", "stochastic_rounding"):
            _check_bool(name, getattr(self, name))
        if self.error_if_nonfinite is not None:
            _check_bool("error_if_nonfinite", self.error_if_nonfinite)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, high=math.inf)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, high=1.0)
        if self.state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype={self.state_dtype!r} is not one of {', '.join(STATE_DTYPES)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is {self.seed!r}; allowed: an int")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; allowed: 0 to 2**64 - 1")

    @property
    def random(self) -> bool:
        """True if steps draw random bits."""
        return self.stochastic_rounding or self.state_dtype != "float32"


def parse(owner: str, given: StepOptions) -> tuple[Options, float, Any]:
    """(options, l1, masks) of the keyword arguments `given` to the class `owner`."""
    for name in given:
        if name not in StepOptions.__annotations__:
            raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
    rest: dict[str, Any] = dict(given)
    l1, masks = rest.pop("l1", 0.0), rest.pop("masks", None)
    check_number("l1", l1)
    return Options(**rest), l1, masks


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed: True or False")


def check_number(name: str, value: Any, high: float | None = None) -> None:
    """Raise unless `value` is a number from 0 to `high`, by default finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; allowed: a number")
    if not 0 <= value <= (math.inf if high is None else high) or (high is None and math.isinf(value)):
        raise ValueError(f"{name} is {value}; allowed: 0 to {'any finite number' if high is None else high}")


# --------------------------------------------------------------------- arguments that torch.optim has, checked as there

_SPOKEN = {"lr": "learning rate", "eps": "epsilon value"}


def check_lr(lr: float | Tensor, name: str = "lr") -> None:
    """Raise ValueError unless `lr` is not negative and, as a tensor, of one element."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid {_SPOKEN.get(name, name)}: {lr}")


def check_not_negative(**values: float | Tensor) -> None:
    """Raise ValueError for one that is negative or NaN."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {_SPOKEN.get(name, name + ' value')}: {value}")


def check_betas(betas: tuple[float | Tensor, float | Tensor]) -> None:
    """Raise ValueError unless both are in [0, 1)."""
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")


def check_implementation(defaults: dict[str, Any]) -> None:
    """Raise for combinations of `fused`, `foreach` and `differentiable` that cannot be."""
    if defaults.get("fused"):
        if defaults.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        if defaults.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if defaults.get("differentiable"):
        raise NotImplementedError(
            "differentiable=True: the step of pyops.optim has no derivative; torch.optim has optimizers that do"
        )
