"""What the quantized linear ops have in common: what their arguments are asked, and gradients beside the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pyops import backend
from pyops.ops.epilogue import check_activation

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of x, bias and residual."""
KERNELS_CHECK = backend.native is not None and backend.forced in (None, "cpp")
"""The kernels for CPU tensors are those in C++, which check their arguments themselves."""
_compiling = torch.compiler.is_compiling

# -------------------------------------------------------------------------------------------------------------- checks


def check_tensors(
    like: tuple[str, torch.Tensor], *named: tuple[str, Any, tuple[torch.dtype, ...]], optional: tuple[str, ...] = ()
) -> None:
    """Raise TypeError for what is no tensor of an allowed dtype, ValueError for one that is elsewhere than `like`.

    `named` are (name, tensor, allowed dtypes), of which the `optional` ones may be None. `like` is (name, tensor), one
    of `named` where it has not been looked at yet, before all others.
    """
    for name, t, allowed in named:
        if t is None and name in optional:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in allowed:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: {', '.join(map(str, allowed))}")
        if t.device != like[1].device:
            raise ValueError(f"{name} is on {t.device}, {like[0]} on {like[1].device}")


def call_checked(dispatch: Callable, check_args: Callable, args: tuple, checked_by_kernel: bool) -> torch.Tensor:
    """dispatch(*args) after check_args(*args).

    `checked_by_kernel`: what the C++ kernel would take is what `check_args` lets pass. Then nothing is asked
    beforehand, which takes as long as the call of a small layer, and only what failed is asked to say why.
    """
    if checked_by_kernel and KERNELS_CHECK and type(args[0]) is torch.Tensor and args[0].is_cpu and not _compiling():
        try:
            return dispatch(*args)
        except Exception:
            check_args(*args)
            raise
    check_args(*args)
    return dispatch(*args)


def check_x(x: torch.Tensor, most: int) -> None:
    """Raise ValueError unless x is [..., K] with K up to `most`."""
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    if x.shape[-1] > most:
        raise ValueError(f"x has K={x.shape[-1]}; allowed: up to {most}")


def check_epilogue(x: torch.Tensor, N: int, bias, residual, activation: str) -> None:
    """Raise TypeError or ValueError unless these, tensors by now, can be added to x · wᵀ [..., N]."""
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({N},)")
    if residual is not None:
        if residual.shape != (*x.shape[:-1], N):
            raise ValueError(f"residual is {tuple(residual.shape)}; expected {(*x.shape[:-1], N)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}, x {x.dtype}; they must agree")
    check_activation(activation)


def check_same_device(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """For fake kernels: of mixed devices the dispatcher may choose meta, and call them."""
    for t in others:
        torch._check(t is None or t.device == x.device, lambda: f"all tensors must be on x's device, {x.device}")


def as_scale(x: Any, x_scale: Any) -> Any:
    """A number as an fp32 tensor beside x; anything else as it is, to be checked."""
    if isinstance(x, torch.Tensor) and isinstance(x_scale, (int, float)) and not isinstance(x_scale, bool):
        return torch.full((), x_scale, dtype=torch.float32, device=x.device)
    return x_scale


# ----------------------------------------------------------------------------------------------------------- gradients


def keep_for_backward(ctx, x, bias, residual, activation: str, clamps: bool = False) -> tuple:
    """Note on `ctx` what every formula asks; returns the (x, bias, residual) to be saved, None for what is not needed.

    Only with an activation the sums are computed again; `clamps` says that x itself is asked for besides.
    """
    ctx.activation, ctx.K, ctx.x_dtype = activation, x.shape[-1], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    curved = activation != "none"
    return x if curved or clamps else None, bias if curved else None, residual if curved else None


def added_gradients(ctx, dz: torch.Tensor, grad: torch.Tensor, bias: bool, residual: bool) -> tuple:
    """(dbias, dresidual) of dz [..., N] fp32, None where they are not asked for."""
    dbias = dresidual = None
    if bias:
        dbias = dz.reshape(math.prod(dz.shape[:-1]), dz.shape[-1]).sum(0).to(ctx.bias_dtype)
    if residual:
        dresidual = dz.to(grad.dtype)
    return dbias, dresidual


def saturates_at(x: torch.Tensor, x_scale: torch.Tensor, largest: float) -> torch.Tensor:
    """The magnitudes, against x [..., K], beyond which a static scale of one element, or one a row, clamps."""
    return largest * (x_scale if x_scale.numel() == 1 else x_scale.reshape(*x.shape[:-1], 1))
