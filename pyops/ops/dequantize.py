"""Packed weights as dense matrices, which gradients are multiplied with.

    int4_dequantize   w[n, k] = s[n, g] · (q[n, k] - z[n, g]), computed in fp32, rounded once to `dtype`
    int8_dequantize   w[n, k] = s[n] · q[n, k], likewise

Shapes   a weight packed by `pack_int4` or `pack_int8`, with its scales and zero points → [N, K] in `dtype`: fp32, bf16
         or fp16. Neither has a gradient.
Errors   ValueError where the packed tensors are not for N, K and group_size.
"""

from __future__ import annotations

import torch

from pyops.ops.int4_weight import dequantize_int4, unpack_int4
from pyops.ops.registry import register


def int4_dequantize_ref(weight, w_scale, w_zero, group_size, out_features, in_features, dtype) -> torch.Tensor:
    """The equation in plain PyTorch."""
    canonical = unpack_int4(weight, w_scale, w_zero, out_features, in_features, group_size)
    return dequantize_int4(*canonical, in_features, group_size, dtype)


def _fake_int4(weight, w_scale, w_zero, group_size, out_features, in_features, dtype):
    return weight.new_empty((out_features, in_features), dtype=dtype)


def int8_dequantize_ref(weight, w_scale, in_features, dtype) -> torch.Tensor:
    """The same in plain PyTorch."""
    from pyops.ops.int8_linear import unpack_int8  # which needs this op for its gradient

    return (unpack_int8(weight, w_scale.shape[0], in_features) * w_scale[:, None]).to(dtype)


def _fake_int8(weight, w_scale, in_features, dtype):
    return weight.new_empty((w_scale.shape[0], in_features), dtype=dtype)


int4_dequantize = register(
    "int4_dequantize(Tensor weight, Tensor w_scale, Tensor? w_zero, int group_size, int out_features, "
    "int in_features, ScalarType dtype) -> Tensor",
    int4_dequantize_ref,
    _fake_int4,
)
int8_dequantize = register(
    "int8_dequantize(Tensor weight, Tensor w_scale, int in_features, ScalarType dtype) -> Tensor",
    int8_dequantize_ref,
    _fake_int8,
)


def dense_int8(weight, w_scale, in_features, dtype) -> torch.Tensor:
    """s[n] · q[n, k] of a weight that is packed or not."""
    if weight.dim() == 3:
        return int8_dequantize(weight, w_scale, in_features, dtype)
    return (weight * w_scale[:, None]).to(dtype)
