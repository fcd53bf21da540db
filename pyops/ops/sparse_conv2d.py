"""Sparse convolution: y[n, o, i, j] = act(Σ_{c, r, s} W[o, c, r, s] · x[n, c', i·u + r·d - top, j·u + s·d - left]
                                          + bias[o] + residual[n, o, i, j])

with W the blocks of a sparse weight (`ops/sparse_weight.py` has its layout), u the stride, d the dilation, c' the c-th
input channel of o's group, and x zero outside of the image. Linear layers are 1×1 convolutions.

Shapes   x [N, C, H, W], W [O, C/groups, R, S] as values [B, bo, bc] and their indices, bias [O],
         residual [N, O, OH, OW] → y [N, O, OH, OW] with OH = ⌊(H + top + bottom - d·(R - 1) - 1) / u⌋ + 1
dtypes   x, residual and y fp32/bf16/fp16/fp64, the three alike; values and bias any of them. Sums and epilogue in fp32,
         fp64 if x or the weight is; rounded once.
Layout   x of any strides. y is channels_last if x is channels_last and not contiguous too, else contiguous.
         padding is (top, bottom, left, right).
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

Backward: dx is the convolution with the transposed structure (`sparse_conv2d_dx`), dW is computed at the kept blocks
only (`sparse_conv2d_dw`). Both are linear in each argument, and each one's gradient is one of the three ops again.

Error bound: at most twice the error of plain PyTorch in x's dtype, plus eps · √K of the largest sum of magnitudes, with
K = C/groups · R · S.

Method: direct sparse convolution, Park et al. 2017 (arXiv:1608.01409); blocks as in Elsen et al. 2020 (1911.09723).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.registry import library, refuse_tangents, register
from pyops.ops.sparse_checks import check_args, check_linear_args, check_padding, check_pair, check_weight
from pyops.ops.sparse_packed import PACKED_DTYPES, PackedCache, is_channels_last, is_plain
from pyops.ops.sparse_weight import Ints, SparseWeight, block_rows, gather_blocks, scatter_blocks

_WEIGHT = "Tensor values, Tensor crow_indices, Tensor col_indices, int[] weight_shape, int[] block"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
SCHEMA = (
    f"sparse_conv2d(Tensor x, {_WEIGHT}, Tensor? bias=None, Tensor? residual=None, int[] stride=[1,1], "
    'int[] padding=[0,0,0,0], int[] dilation=[1,1], int groups=1, str activation="none", Tensor? packed=None) -> Tensor'
)
SCHEMA_DX = f"sparse_conv2d_dx(Tensor grad, {_WEIGHT}, SymInt[] x_shape, {_WINDOW}, Tensor? packed=None) -> Tensor"
SCHEMA_DW = (
    "sparse_conv2d_dw(Tensor grad, Tensor x, Tensor crow_indices, Tensor col_indices, int[] weight_shape, int[] block, "
    f"{_WINDOW}) -> Tensor"
)
SCHEMA_PACK = (
    f"sparse_conv2d_pack({_WEIGHT}, {_WINDOW}, SymInt[] x_shape, bool channels_last, bool with_values=True, "
    "int[] tiling=[]) -> Tensor"
)
SCHEMA_PACK_DX = f"sparse_conv2d_pack_dx({_WEIGHT}, {_WINDOW}, SymInt[] x_shape, bool channels_last) -> Tensor"


# ---------------------------------------------------------------------------------------------------------- reference


def sparse_conv2d_ref(
    x: torch.Tensor,  # [N, C, H, W]
    values: torch.Tensor,  # [B, bo, bc]
    crow_indices: torch.Tensor,  # [OB + 1] int32
    col_indices: torch.Tensor,  # [B] int32
    weight_shape: Ints,  # O, C / groups, R, S
    block: Ints,  # bo, bc
    bias: torch.Tensor | None = None,  # [O]
    residual: torch.Tensor | None = None,  # [N, O, OH, OW]
    stride: Ints = (1, 1),
    padding: Ints = (0, 0, 0, 0),  # top, bottom, left, right
    dilation: Ints = (1, 1),
    groups: int = 1,
    activation: str = "none",
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    wide = _wide(x, values)
    w = scatter_blocks(values.to(wide), crow_indices, col_indices, weight_shape, block, groups)
    y = empty_y(x, weight_shape, stride, padding, dilation)
    if y.numel() and w.numel():
        acc = F.conv2d(padded(x.to(wide), padding), w, None, stride, 0, dilation, groups)
    else:
        acc = torch.zeros_like(y, dtype=wide)  # torch's convolution refuses to sum nothing
    b = None if bias is None else bias.view(-1, 1, 1)
    return y.copy_(epilogue_ref(acc, b, residual, activation, x.dtype))


def sparse_conv2d_dx_ref(
    grad: torch.Tensor,  # [N, O, OH, OW]
    values: torch.Tensor,  # [B, bo, bc]
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_shape: Ints,
    block: Ints,
    x_shape: Ints,  # N, C, H, W
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of x [N, C, H, W], of grad's dtype and memory format."""
    wide = _wide(grad, values)
    w = scatter_blocks(values.to(wide), crow_indices, col_indices, weight_shape, block, groups)
    dx = empty_image(grad, x_shape)
    if not (dx.numel() and grad.numel() and w.numel()):
        return dx.zero_()
    N, C, H, W = x_shape
    top, bottom, left, right = padding
    shape = (N, C, H + top + bottom, W + left + right)
    full = torch.nn.grad.conv2d_input(shape, w, grad.to(wide), stride, 0, dilation, groups)
    return dx.copy_(full[:, :, top : top + H, left : left + W])


def sparse_conv2d_dw_ref(
    grad: torch.Tensor,  # [N, O, OH, OW]
    x: torch.Tensor,  # [N, C, H, W]
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_shape: Ints,
    block: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> torch.Tensor:
    """The gradient of values [B, bo, bc], fp32 (fp64 if grad or x is); zero in the padding of a block."""
    wide = _wide(grad, x)
    if not (grad.numel() and x.numel() and col_indices.numel()):
        return grad.new_zeros((col_indices.shape[0], *block), dtype=wide)
    x = padded(x.to(wide), padding)
    dense = torch.nn.grad.conv2d_weight(x, list(weight_shape), grad.to(wide), stride, 0, dilation, groups)
    return gather_blocks(dense, crow_indices, col_indices, block, groups)


def output_size(
    x_shape: Ints, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[int, int, int, int]:
    """The shape of y, [N, O, OH, OW]."""
    N, _, H, W = x_shape
    O, _, R, S = weight_shape
    OH = (H + padding[0] + padding[1] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    OW = (W + padding[2] + padding[3] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    return N, O, OH, OW


def _wide(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def padded(x: torch.Tensor, padding: Ints) -> torch.Tensor:
    """x with zeros around its images."""
    top, bottom, left, right = padding
    y = F.pad(x, (left, right, top, bottom)) if any(padding) else x
    # One channel is NCHW and channels_last at once; with the strides of the latter oneDNN reads the wrong pixels.
    return y.reshape(-1).view(y.shape) if y.shape[1] == 1 and y.numel() else y


def empty_image(x: torch.Tensor, shape: Ints) -> torch.Tensor:
    """Uninitialized, of x's dtype, device and memory format."""
    form = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=form)


def empty_y(x, weight_shape, stride, padding, dilation) -> torch.Tensor:
    """y, uninitialized."""
    return empty_image(x, output_size(x.shape, weight_shape, stride, padding, dilation))


# --------------------------------------------------------------------------------------------------- fake and autograd


def _check_fake(tensors, crow_indices, col_indices, weight_shape, block, groups) -> None:
    first = tensors[0]
    for t in (*tensors, crow_indices, col_indices):  # of mixed devices the dispatcher may choose meta: here
        torch._check(t is None or t.device == first.device, lambda: f"all tensors must be on {first.device}")
    rows = block_rows(weight_shape, block, groups)
    torch._check(crow_indices.dim() == 1 and col_indices.dim() == 1, lambda: "crow_indices and col_indices must be 1-D")
    torch._check(crow_indices.shape[0] == rows + 1, lambda: f"crow_indices must have {rows + 1} elements")


def _check_fake_values(values, col_indices, block) -> None:
    torch._check(values.dim() == 3, lambda: f"values must be [B, bo, bc], got shape {tuple(values.shape)}")
    torch._check(values.shape[0] == col_indices.shape[0], lambda: "values and col_indices must have as many blocks")
    for size, expected in zip(values.shape[1:], block, strict=True):
        torch._check(size == expected, lambda: f"values has shape {tuple(values.shape)}, block is {tuple(block)}")


def _check_fake_x(x_shape, weight_shape, groups) -> None:
    torch._check(len(x_shape) == 4, lambda: f"x must be [N, C, H, W], got {len(x_shape)} dimensions")
    C = weight_shape[1] * groups
    torch._check(x_shape[1] == C, lambda: f"x has {x_shape[1]} channels, the weight is for {C}")


def fake_conv2d(
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
):
    """The fake kernel of `sparse_conv2d`."""
    _check_fake((x, values, bias, residual, packed), crow_indices, col_indices, weight_shape, block, groups)
    _check_fake_values(values, col_indices, block)
    _check_fake_x(x.shape, weight_shape, groups)
    y = empty_y(x, weight_shape, stride, padding, dilation)
    torch._check(bias is None or bias.shape[0] == weight_shape[0], lambda: f"bias must be [{weight_shape[0]}]")
    if residual is not None:
        for a, b in zip(residual.shape, y.shape, strict=True):
            torch._check(a == b, lambda: f"residual is {tuple(residual.shape)}, y {tuple(y.shape)}")
    return y


def _fake_dx(
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
):
    _check_fake((grad, values, packed), crow_indices, col_indices, weight_shape, block, groups)
    _check_fake_values(values, col_indices, block)
    _check_fake_x(x_shape, weight_shape, groups)
    return empty_image(grad, x_shape)


def _fake_dw(grad, x, crow_indices, col_indices, weight_shape, block, stride, padding, dilation, groups):
    _check_fake((grad, x), crow_indices, col_indices, weight_shape, block, groups)
    _check_fake_x(x.shape, weight_shape, groups)
    return grad.new_empty((col_indices.shape[0], *block), dtype=_wide(grad, x))


def _setup_context(ctx, inputs, output, needs=None):
    x, values, crow, col, shape, block, bias, residual, stride, padding, dilation, groups, ctx.activation, packed = (
        inputs
    )
    ctx.weight = (shape, block)
    ctx.window = (stride, padding, dilation, groups)
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    curved = ctx.activation != "none"
    ctx.packed = packed if curved else None
    ctx.packed_dx = None
    needs = needs or (*ctx.needs_input_grad, False, False)  # the dispatcher leaves trailing defaults out
    saved = (x if curved or needs[1] else None, bias if curved else None, residual if curved else None)
    ctx.save_for_backward(values, crow, col, *saved)


def _backward(ctx, grad):
    return _gradients(ctx, grad, (*ctx.needs_input_grad, *[False] * 14))


def _gradients(ctx, grad, needs):
    values, crow, col, x, bias, residual = ctx.saved_tensors
    shape, block = ctx.weight
    z = grad
    if ctx.activation != "none":
        z = _op(x, values, crow, col, shape, block, bias, residual, *ctx.window, "none", ctx.packed)
    dz = activation_backward(grad, z, ctx.activation)  # fp32 or fp64
    g = dz.to(grad.dtype)
    dx = dvalues = dbias = None
    if needs[0]:
        dx = _op_dx(g, values, crow, col, shape, block, ctx.x_shape, *ctx.window, ctx.packed_dx)
    if needs[1]:
        dvalues = _op_dw(g, x, crow, col, shape, block, *ctx.window).to(values.dtype)
    if needs[6]:
        dbias = dz.sum((0, 2, 3)).to(ctx.bias_dtype)
    return dx, dvalues, None, None, None, None, dbias, g if needs[7] else None, *[None] * 6


def _setup_context_dx(ctx, inputs, output):
    grad, values, crow, col, shape, block, _, stride, padding, dilation, groups, _ = inputs
    ctx.weight, ctx.window = (shape, block), (stride, padding, dilation, groups)
    ctx.save_for_backward(grad, values, crow, col)


def _backward_dx(ctx, v):
    """dx is linear in grad and in values: v [N, C, H, W] takes x's place."""
    grad, values, crow, col = ctx.saved_tensors
    v = v.to(grad.dtype)
    dgrad = dvalues = None
    if ctx.needs_input_grad[0]:
        dgrad = _op(v, values, crow, col, *ctx.weight, None, None, *ctx.window, "none", None)
    if ctx.needs_input_grad[1]:
        dvalues = _op_dw(grad, v, crow, col, *ctx.weight, *ctx.window).to(values.dtype)
    return dgrad, dvalues, *[None] * 10


def _setup_context_dw(ctx, inputs, output):
    grad, x, crow, col, shape, block, stride, padding, dilation, groups = inputs
    ctx.weight, ctx.window = (shape, block), (stride, padding, dilation, groups)
    ctx.save_for_backward(grad, x, crow, col)


def _backward_dw(ctx, v):
    """dW is linear in grad and in x: v [B, bo, bc] takes the values' place, where it counts."""
    grad, x, crow, col = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = _op(x, v, crow, col, *ctx.weight, None, None, *ctx.window, "none", None).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        dx = _op_dx(grad, v, crow, col, *ctx.weight, x.shape, *ctx.window, None).to(x.dtype)
    return dgrad, dx, *[None] * 8


_op = register(
    SCHEMA,
    sparse_conv2d_ref,
    fake_conv2d,
    backward=_backward,
    setup_context=_setup_context,
    triton=True,
    native=True,
)
_op_dx = register(
    SCHEMA_DX,
    sparse_conv2d_dx_ref,
    _fake_dx,
    backward=_backward_dx,
    setup_context=_setup_context_dx,
    triton=True,
    native=True,
    file="sparse_conv2d",
)
_op_dw = register(
    SCHEMA_DW,
    sparse_conv2d_dw_ref,
    _fake_dw,
    backward=_backward_dw,
    setup_context=_setup_context_dw,
    native=True,
    file="sparse_conv2d",
)


def _fake_pack(values, *rest):
    return values.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


# No reference: only the CPU kernels have a packed form, and only `PackedCache` asks for it.
for _schema in (SCHEMA_PACK, SCHEMA_PACK_DX):
    library.define(_schema)
    torch.library.register_fake(f"pyops::{_schema.split('(', 1)[0]}", _fake_pack, lib=library)


# ----------------------------------------------------------------------------------------------------- public functions


def sparse_conv2d(
    x: torch.Tensor,
    weight: SparseWeight,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Ints = 1,
    padding: int | Ints | str = 0,
    dilation: int | Ints = 1,
    groups: int | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = act(conv2d(x, weight) + bias + residual); the equation stands in this module's head.

    Args:
        x: [N, C, H, W] or [C, H, W], fp32, bf16, fp16 or fp64, any strides.
        weight: a `SparseWeight` of shape [O, C/groups, R, S]; its values may be trained.
        bias: [O], any of the dtypes.
        stride, dilation: a positive number, or one for each direction.
        padding: zeros around the image: a number, (vertical, horizontal), (top, bottom, left, right), "valid" for none,
            or "same" for an output of x's size (stride 1; an odd zero goes to the bottom and right).
        groups: None takes the weight's, another number than that raises.
        residual: y's shape and x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Returns:
        [N, O, OH, OW], or [O, OH, OW] for a single image, in x's dtype; channels_last if x is. Differentiable in x,
        weight.values, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    check_weight(x, weight)
    stride, dilation = check_pair("stride", stride), check_pair("dilation", dilation)
    padding = check_padding(padding, weight.shape[2:], stride, dilation)
    if groups is not None and groups != weight.groups:
        raise ValueError(f"groups is {groups}; the weight was made for groups={weight.groups}")
    single = x.dim() == 3
    if single:
        x = x[None]
        residual = residual[None] if isinstance(residual, torch.Tensor) else residual
    check_args(x, weight.shape, bias, residual, stride, padding, dilation, weight.groups, activation)
    y = apply(x, weight, bias, residual, stride, padding, dilation, activation)
    return y[0] if single else y


def sparse_linear(
    x: torch.Tensor,
    weight: SparseWeight,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = act(x · Wᵀ + bias + residual), the 1×1 convolution of x's rows.

    Args:
        x: [..., K] fp32, bf16, fp16 or fp64, any strides.
        weight: a `SparseWeight` of shape [N, K, 1, 1] and groups=1, as `SparseWeight.from_dense` makes of [N, K].
        bias: [N], any of the dtypes.
        residual: [..., N] in x's dtype, added before the activation.
        activation: as in `sparse_conv2d`.

    Returns:
        [..., N] in x's dtype, contiguous. Differentiable in x, weight.values, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    check_weight(x, weight)
    check_linear_args(x, weight.shape, bias, residual, activation)
    if weight.groups != 1:
        raise ValueError(f"weight has groups={weight.groups}; a linear layer needs groups=1")
    image = rows_as_image(x)
    r = None if residual is None else rows_as_image(residual)
    y = apply(image, weight, bias, r, (1, 1), (0, 0, 0, 0), (1, 1), activation)
    return image_as_rows(y, x.shape[:-1])


def rows_as_image(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as the channels_last image [1, K, M, 1] of its M rows; no rows are no images, [0, K, 1, 1]."""
    M, K = math.prod(x.shape[:-1]), x.shape[-1]
    image = x.reshape(1, M, 1, K) if M else x.reshape(0, 1, 1, K)
    return image.permute(0, 3, 1, 2)


def image_as_rows(y: torch.Tensor, leading: Ints) -> torch.Tensor:
    """The inverse of `rows_as_image`, contiguous."""
    return y.permute(0, 2, 3, 1).reshape(*leading, y.shape[1]).contiguous()


def apply(x, weight: SparseWeight, bias, residual, stride, padding, dilation, activation) -> torch.Tensor:
    """The op on arguments that are known to be right, with the weight's packed form where there is one."""
    w = weight
    tensors = (w.values, w.crow_indices, w.col_indices, w.block_mask)
    window = (stride, padding, dilation, w.groups)
    return with_packed(w.packed, x, *tensors, w.shape, w.block, bias, residual, *window, activation)


def with_packed(
    cache: PackedCache,
    x,
    values,
    crow,
    col,
    block_mask,
    shape,
    block,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
) -> torch.Tensor:
    """The op on arguments that are known to be right, with the packed form of the weight that `cache` keeps."""
    weight = (values, crow, col, shape, block)
    packed = cache.get(x, *weight, stride, padding, dilation, groups)
    packed_dx = cache.get_dx(x, *weight, stride, padding, dilation, groups)
    if block_mask is not None and values.requires_grad and torch.is_grad_enabled():
        values = values * block_mask  # so that fill-in has no gradient
    window = (stride, padding, dilation, groups)
    return dispatch(x, values, crow, col, shape, block, bias, residual, *window, activation, packed, packed_dx)


class _Function(torch.autograd.Function):
    """The formula registered with the op, without the dispatcher's way to it, and with the packed form for dx."""

    @staticmethod
    def forward(ctx, packed_dx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            y = _op(*args)
        _setup_context(ctx, args, y, ctx.needs_input_grad[1:])
        ctx.packed_dx = packed_dx
        return y

    @staticmethod
    def backward(ctx, grad):
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:])


_profiling = torch.autograd._profiler_enabled


def dispatch(
    x,
    values,
    crow,
    col,
    shape,
    block,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
    packed,
    packed_dx=None,
):
    """The op, for arguments that are known to be right, past the dispatcher's autograd layer where that is possible."""
    args = (x, values, crow, col, shape, block, bias, residual, stride, padding, dilation, groups, activation, packed)
    if torch.compiler.is_compiling():
        return _op(*args)
    if forward_ad._current_level >= 0:
        refuse_tangents("sparse convolution", x, values, bias, residual)
    if torch._C._are_functorch_transforms_active():
        return _op(*args)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _Function.apply(packed_dx, *args)
    # A packed form means the CPU kernels; the dispatcher's way to them takes as long as a small layer.
    if (
        packed is not None
        and is_plain(x)
        and (bias is None or (bias.dtype in PACKED_DTYPES and is_plain(bias)))
        and (residual is None or is_plain(residual))
        and not _profiling()
    ):
        from pyops.ops.sparse_conv2d_native import direct  # not before the first call: it imports this module

        y = direct(x, bias, residual, shape, stride, padding, dilation, activation, packed)
        if y is not None:
            return y
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)
