"""What `sparse_conv2d`, `sparse_linear` and their modules refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import torch

from pyops.ops.epilogue import check_activation
from pyops.ops.sparse_weight import Ints, SparseWeight

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_pair(name: str, value: Any, least: int = 1, count: int = 2) -> tuple[int, ...]:
    """`value`, or the same number `count` times; TypeError or ValueError unless all are integers, `least` or more."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"{name} is {value!r}; expected an integer or {count} of them")
    if len(numbers) != count:
        raise ValueError(f"{name} is {value!r}; expected one number or {count}")
    if min(numbers) < least:
        raise ValueError(f"{name} is {value!r}; the least allowed is {least}")
    return numbers


def check_padding(padding: Any, kernel: Ints, stride: Ints, dilation: Ints) -> tuple[int, int, int, int]:
    """Any form of padding as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f"padding={padding!r} is not one of same, valid")
        if any(u != 1 for u in stride):
            raise ValueError(f'padding="same" needs stride=1, got {tuple(stride)}')
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return check_pair("padding", padding, 0, 4)
    vertical, horizontal = check_pair("padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


def check_weight(x: Any, weight: Any) -> None:
    """Raise unless x is a tensor and weight a `SparseWeight` on its device, of allowed dtypes."""
    if not isinstance(weight, SparseWeight):
        raise TypeError(
            f"weight must be a SparseWeight, got {type(weight).__name__}; SparseWeight.from_dense makes one"
        )
    _check_tensor("x", x, None)
    _check_tensor("weight.values", weight.values, x)


def check_args(
    x: Any,
    weight_shape: Ints,
    bias: Any,
    residual: Any,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    activation: str,
) -> None:
    """Raise the TypeError or ValueError that `sparse_conv2d` documents; padding is (top, bottom, left, right)."""
    _check_tensor("x", x, None)
    O, Cg, R, S = weight_shape
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
    if x.shape[1] != Cg * groups:
        raise ValueError(
            f"x has {x.shape[1]} channels; weight {tuple(weight_shape)} with groups={groups} needs {Cg * groups}"
        )
    size = []
    for n, extent, k, u, before, after, d in (
        ("height", x.shape[2], R, stride[0], padding[0], padding[1], dilation[0]),
        ("width", x.shape[3], S, stride[1], padding[2], padding[3], dilation[1]),
    ):
        padded, window = extent + before + after, d * (k - 1) + 1
        if padded < window:
            raise ValueError(f"x has {n} {padded} with its padding; the kernel reaches over {window}")
        size.append((padded - window) // u + 1)
    _check_addends(x, bias, residual, O, (x.shape[0], O, *size))
    check_activation(activation)


def check_linear_args(x: Any, weight_shape: Ints, bias: Any, residual: Any, activation: str) -> None:
    """Raise the TypeError or ValueError that `sparse_linear` documents."""
    _check_tensor("x", x, None)
    N, K, R, S = weight_shape
    if (R, S) != (1, 1):
        raise ValueError(f"weight has shape {tuple(weight_shape)}; a linear layer needs [N, K, 1, 1]")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x is {tuple(x.shape)}; weight {tuple(weight_shape)} needs [..., {K}]")
    _check_addends(x, bias, residual, N, (*x.shape[:-1], N))
    check_activation(activation)


def _check_addends(x: torch.Tensor, bias: Any, residual: Any, O: int, y_shape: tuple[int, ...]) -> None:
    if bias is not None:
        _check_tensor("bias", bias, x)
        if bias.shape != (O,):
            raise ValueError(f"bias is {tuple(bias.shape)}; expected ({O},)")
    if residual is not None:
        _check_tensor("residual", residual, x)
        if residual.shape != y_shape:
            raise ValueError(f"residual is {tuple(residual.shape)}; expected {tuple(y_shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}, x {x.dtype}; they must agree")


def _check_tensor(name: str, t: Any, x: torch.Tensor | None) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if t.is_nested else t.layout}")
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {t.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
    if x is not None and t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}")
