"""The CPU kernels of `ops/sparse_conv2d.py`: fp32 and bf16 go to the extension, other dtypes to the reference."""

from __future__ import annotations

import torch

from pyops import backend
from pyops.ops.registry import library
from pyops.ops.sparse_conv2d import output_size, sparse_conv2d_dw_ref, sparse_conv2d_dx_ref, sparse_conv2d_ref
from pyops.ops.sparse_packed import PACKED_DTYPES, has_native, has_native_dx, is_channels_last

library.define(
    "sparse_conv2d_native(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices, int[] weight_shape, "
    "int[] block, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, "
    "str activation, Tensor? packed) -> Tensor"
)
library.define(
    "sparse_conv2d_dx_native(Tensor grad, Tensor values, Tensor crow_indices, Tensor col_indices, int[] weight_shape, "
    "int[] block, int[] x_shape, int[] stride, int[] padding, int[] dilation, int groups, Tensor? packed) -> Tensor"
)
library.define(
    "sparse_conv2d_dw_native(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] weight_shape, "
    "int[] block, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
_native = torch.ops.pyops.sparse_conv2d_native.default
_native_dx = torch.ops.pyops.sparse_conv2d_dx_native.default
_native_dw = torch.ops.pyops.sparse_conv2d_dw_native.default


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
    narrow = all(t is None or t.dtype in PACKED_DTYPES for t in (x, values, bias))
    if narrow and has_native(weight_shape, stride, dilation):
        return _native(*args, groups, activation, packed)
    return sparse_conv2d_ref(*args, groups, activation)


def direct(x, bias, residual, weight_shape, stride, padding, dilation, activation, packed) -> torch.Tensor | None:
    """The CPU kernels, past the dispatcher; None if they cannot use this packed form of the weight.

    x, bias and residual are plain (`is_plain`): what they hold is what lies at their data_ptr.
    """
    last = is_channels_last(x)
    x = x if last else x.contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    size = output_size(x.shape, weight_shape, stride, padding, dilation)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    if residual is not None and not (residual.is_contiguous(memory_format=form) and is_channels_last(residual) == last):
        residual = torch.empty_like(y).copy_(residual)
    done = backend.native.sparse_conv2d(
        packed.data_ptr(),
        packed.numel(),
        weight_shape,
        x.shape,
        padding,
        last,
        x.dtype == torch.bfloat16,
        activation,
        x.data_ptr(),
        y.data_ptr(),
        y.numel(),
        0 if bias is None else bias.data_ptr(),
        bias is not None and bias.dtype == torch.bfloat16,
        0 if residual is None else residual.data_ptr(),
    )
    return y if done else None


def sparse_conv2d_dx(
    grad,
    values,
    crow_indices,
    col_indices,
    weight_shape,
    block,
    x_shape,
    stride,
    padding,
    dilation,
    groups,
    packed=None,
) -> torch.Tensor:
    """`sparse_conv2d_dx` on CPU tensors."""
    args = (grad, values, crow_indices, col_indices, weight_shape, block, x_shape, stride, padding, dilation, groups)
    if grad.dtype in PACKED_DTYPES and values.dtype in PACKED_DTYPES and has_native_dx(weight_shape, stride, dilation):
        return _native_dx(*args, packed)
    return sparse_conv2d_dx_ref(*args)


def sparse_conv2d_dw(
    grad, x, crow_indices, col_indices, weight_shape, block, stride, padding, dilation, groups
) -> torch.Tensor:
    """`sparse_conv2d_dw` on CPU tensors."""
    args = (grad, x, crow_indices, col_indices, weight_shape, block, stride, padding, dilation, groups)
    if grad.dtype in PACKED_DTYPES and x.dtype == grad.dtype and has_native(weight_shape, stride, dilation):
        return _native_dw(*args)
    return sparse_conv2d_dw_ref(*args)
