"""Fake quantization: the values that a quantized kernel computes with, in fp32, with a gradient.

    forward    x̂ = s · (q(x) - z)    with the integers and scales of the kernels, whose own functions are called
    backward   dL/dx = dL/dx̂ · 1[x in the range that s was made for]    straight through the rounding

The scale is a constant for the gradient. Where it follows the values (the largest magnitude of a row, the minimum and
maximum of a group), every value lies in its range and the gradient passes everywhere, also where a value at the end of
a range is rounded past the last code and clamped, by about half a step: zero there would keep the very values that make
the scale from ever being trained. Where a scale is given, the gradient is zero for what saturates.

Method: straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432); fake quantization in training as in Jacob et
al. 2018 (arXiv:1712.05877).
"""

from __future__ import annotations

import math

import torch

from pyops.ops.fp8_linear import BLOCK, dequantize_fp8, quantize_w_ref, quantize_x_ref
from pyops.ops.int4_quantize import quantize_groups
from pyops.ops.int4_weight import dequantize_groups
from pyops.ops.int8_linear import QMAX, quantize_rows_ref
from pyops.ops.registry import register


def straight_through(x: torch.Tensor, rounded: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
    """`rounded`, exactly, with the gradient of x where `inside` (everywhere if None), zero elsewhere.

    All three have one shape; `rounded` is fp32 without a gradient, x of any float dtype. NaN or Inf in x gives NaN.
    """
    passed = x if inside is None else torch.where(inside, x, 0.0)
    return rounded + (passed - passed.detach())  # plus 0, which is exact


def fake_int8_rows(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] as `quantize_rows_ref` rounds it: each row by its own largest magnitude, or by `scale` []; fp32."""
    with torch.no_grad():
        K = x.shape[-1]
        q, used = quantize_rows_ref(x.reshape(math.prod(x.shape[:-1]), K), scale)
        rounded = (q.float() * used[:, None]).view(x.shape)
        inside = None if scale is None else x.float().abs() <= (QMAX + 0.5) * scale  # as in the gradient of the op
    return straight_through(x, rounded, inside)


def fake_int4_ref(w: torch.Tensor, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> torch.Tensor:
    """w [N, K] as `quantize_int4` rounds it with the method "rtn", fp32 [N, K], without a gradient; unchecked."""
    K = w.shape[1]
    G = group_size if group_size > 0 else max(K, 1)
    if not w.numel():
        return w.new_empty(w.shape, dtype=torch.float32)
    return dequantize_groups(*quantize_groups(w, G, symmetric, "rtn", scale_dtype), G)


def _fake(w, group_size, symmetric, scale_dtype):
    return w.new_empty(w.shape, dtype=torch.float32)


# An op, which torch.compile calls as it is: fused, the rounding of a scale to bf16 would be left out, and with it the
# integers that the converted layer has.
_op = register(
    "fake_int4(Tensor w, int group_size, bool symmetric, ScalarType scale_dtype) -> Tensor", fake_int4_ref, _fake
)


def fake_int4(
    w: torch.Tensor, group_size: int, *, symmetric: bool = False, scale_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """w [N, K] as `quantize_int4` rounds it with the method "rtn"; fp32 [N, K]."""
    return straight_through(w, _op(w.detach(), group_size, symmetric, scale_dtype))


def fake_fp8_input(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """x [..., K] as `fp8_linear` rounds it: by row, or by blocks of 128 columns of a row; fp32 [..., K]."""
    with torch.no_grad():
        K = x.shape[-1]
        codes, scale = quantize_x_ref(x.reshape(math.prod(x.shape[:-1]), K), granularity)
        scale = scale[:, None] if granularity == "row" else scale.repeat_interleave(BLOCK, dim=1)[:, :K]
        rounded = (codes.float() * scale).view(x.shape)
    return straight_through(x, rounded)


def fake_fp8_weight(w: torch.Tensor, granularity: str) -> torch.Tensor:
    """w [N, K] as `quantize_fp8` rounds it; fp32 [N, K]."""
    with torch.no_grad():
        rounded = dequantize_fp8(*quantize_w_ref(w, granularity)) if w.numel() else w.float()
    return straight_through(w, rounded)
