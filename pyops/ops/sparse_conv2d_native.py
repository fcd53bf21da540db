"""The CPU kernels of `ops/sparse_conv2d.py`: fp32 and bf16 go to the extension, other dtypes to the reference."""

from __future__ import annotations

import torch

from pyops.ops.registry import library
from pyops.ops.sparse_conv2d import sparse_conv2d_ref
from pyops.ops.sparse_packed import PACKED_DTYPES

library.define(
    "sparse_conv2d_native(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, int[] weight_shape, "
    "int[] block, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, Tensor? packed) -> Tensor"
)
_native = torch.ops.pyops.sparse_conv2d_native.default


def sparse_conv2d(
    x,
    values,
    crow_indices,
    col_indices,
    weight_shape,
    block,
    bias=None,
    residual=None,
    stride=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    groups=1,
    activation="none",
    packed=None,
) -> torch.Tensor:
    """`sparse_conv2d` on CPU tensors."""
    args = (x, values, crow_indices, col_indices, weight_shape, block, bias, residual, stride, padding, dilation)
    if all(t is None or t.dtype in PACKED_DTYPES for t in (x, values, bias)):
        return _native(*args, groups, activation, packed)
    return sparse_conv2d_ref(*args, groups, activation)
