"""The CPU kernels of `ops/int8_sparse_conv2d.py`: fp32 and bf16 go to the extension, fp16 to the reference."""

from __future__ import annotations

import torch

from pyops.ops.int8_sparse_conv2d import int8_sparse_conv2d_ref, with_defaults
from pyops.ops.registry import library
from pyops.ops.sparse_packed import PACKED_DTYPES, has_native

library.define(
    "int8_sparse_conv2d_native(Tensor x, Tensor values, Tensor w_scale, Tensor crow_indices, Tensor col_indices, "
    "int[] weight_shape, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, Tensor? x_scale, Tensor? packed) -> Tensor"
)
_native = torch.ops.pyops.int8_sparse_conv2d_native.default


def int8_sparse_conv2d(*args) -> torch.Tensor:
    """`int8_sparse_conv2d` on CPU tensors."""
    args = with_defaults(args)
    x, bias = args[0], args[6]
    fits = x.dtype in PACKED_DTYPES and (bias is None or bias.dtype in PACKED_DTYPES)
    fits = fits and has_native(args[5], args[8], args[10])  # weight_shape, stride, dilation
    return _native(*args) if fits else int8_sparse_conv2d_ref(*args)
