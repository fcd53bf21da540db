"""int8 sparse convolution: y[n, o, p] = act(s_x[n] · s_w[o] · Σ_{c, t} q_w[o, c, t] · q_x[n, c, p + t] + bias[o]
                                             + residual[n, o, p])

    q_x[n, c, p] = round(x[n, c, p] / s_x[n]),   s_x[n] = max_{c, p} |x[n, c, p]| / 127      (dynamic)
    q_x[n, c, p] = clamp(round(x[n, c, p] / s_x[n]), -127, 127)                               (static: s_x is given)

with q_w the blocks of a sparse weight (`ops/sparse_weight.py`) of 1 output × 4 input channels (pattern "ic_block4"),
t its taps, and the window of `ops/sparse_conv2d.py`: stride, padding, dilation and groups; q_x is 0 outside the image.

Shapes   x [N, C, H, W], q_w [O, C/groups, R, S] as values [B, 1, 4] and their indices, s_w [O], bias [O],
         residual [N, O, OH, OW] → y [N, O, OH, OW]
dtypes   x, residual and y fp32/bf16/fp16; values int8; s_w fp32; bias any float dtype. Products are summed exactly in
         int32, the epilogue is computed in fp32 and rounded once.
Layout   x of any strides. y is channels_last if x is channels_last and not contiguous too, else contiguous.
         padding is (top, bottom, left, right).
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

The rounding is that of `ops/int8_linear.py`, with an image in the place of a row: every backend gives the same
integers, and an image that holds NaN or Inf gives NaN in that image of y, and nowhere else.

K = C/groups · R · S is at most 132 104, so that no int32 sum can overflow.

Method: one scale per tensor of activations and per channel of weights as in Jacob et al. 2018 (arXiv:1712.05877), the
tensor an image; direct sparse convolution, Park et al. 2017 (1608.01409).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.int8_linear import FLOAT_DTYPES, MAX_K, QMAX, check_x_scale, quantize_int8, quantize_rows_ref
from pyops.ops.linear_shared import as_scale
from pyops.ops.registry import refuse_tangents, register
from pyops.ops.sparse_checks import check_args, check_padding, check_pair
from pyops.ops.sparse_conv2d import empty_y, fake_conv2d, padded
from pyops.ops.sparse_packed import PackedCache
from pyops.ops.sparse_weight import PATTERNS, Ints, SparseWeight, gather_blocks, scatter_blocks

SCHEMA = (
    "int8_sparse_conv2d(Tensor x, Tensor values, Tensor w_scale, Tensor crow_indices, Tensor col_indices, "
    "int[] weight_shape, Tensor? bias=None, Tensor? residual=None, int[] stride=[1,1], int[] padding=[0,0,0,0], "
    'int[] dilation=[1,1], int groups=1, str activation="none", Tensor? x_scale=None, Tensor? packed=None) -> Tensor'
)

PATTERN = "ic_block4"
BLOCK = PATTERNS[PATTERN]


# ---------------------------------------------------------------------------------------------------------- reference


def quantize_images_ref(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, C, H, W] as int8 of its shape, and the fp32 scale [N] of each image; see `quantize_rows_ref`."""
    rows = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    q, s_x = quantize_rows_ref(rows, scale)
    return q.view(x.shape), s_x


def int8_sparse_conv2d_ref(
    x: torch.Tensor,  # [N, C, H, W]
    values: torch.Tensor,  # [B, 1, 4] int8
    w_scale: torch.Tensor,  # [O] fp32
    crow_indices: torch.Tensor,  # [O + 1] int32
    col_indices: torch.Tensor,  # [B] int32
    weight_shape: Ints,  # O, C / groups, R, S
    bias: torch.Tensor | None = None,  # [O]
    residual: torch.Tensor | None = None,  # [N, O, OH, OW]
    stride: Ints = (1, 1),
    padding: Ints = (0, 0, 0, 0),  # top, bottom, left, right
    dilation: Ints = (1, 1),
    groups: int = 1,
    activation: str = "none",
    x_scale: torch.Tensor | None = None,  # one element, or one for each image
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    q_x, s_x = quantize_images_ref(x, x_scale)
    q_w = scatter_blocks(values.double(), crow_indices, col_indices, weight_shape, BLOCK, groups)
    y = empty_y(x, weight_shape, stride, padding, dilation)
    if y.numel() and q_w.numel():  # integers below 2⁵³ are exact in fp64, in whatever order they are summed
        acc = F.conv2d(padded(q_x.double(), padding), q_w, None, stride, 0, dilation, groups).float()
    else:
        acc = torch.zeros_like(y, dtype=torch.float32)  # torch's convolution refuses to sum nothing
    scaled = acc * (s_x[:, None] * w_scale)[:, :, None, None]
    b = None if bias is None else bias.view(-1, 1, 1)
    return y.copy_(epilogue_ref(scaled, b, residual, activation, x.dtype))


def quantize_sparse(weight: SparseWeight) -> tuple[SparseWeight, torch.Tensor]:
    """Quantize a sparse weight symmetrically for each output channel: (int8 weight, scale fp32 [O]), w ≈ q · scale.

    The result has blocks of 1 × 4; of a weight with other blocks, those that its mask reaches into are stored whole,
    with fill-in. scale[o] = max |w[o]| / 127; a row of zeros has scale 0. Raises TypeError if `weight` is no
    `SparseWeight` with floating-point values, ValueError if it holds NaN or Inf.
    """
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight must be a SparseWeight, got {type(weight).__name__}")
    if not weight.values.is_floating_point():
        raise TypeError(f"weight.values has dtype {weight.values.dtype}; expected a floating-point dtype")
    dense = weight.to_dense().detach()
    if weight.block != BLOCK:
        weight = SparseWeight.from_dense(dense, weight.mask(), pattern=PATTERN, groups=weight.groups)
    q, scale = quantize_int8(dense.reshape(dense.shape[0], math.prod(dense.shape[1:])))
    structure = (weight.crow_indices, weight.col_indices)
    values = gather_blocks(q.view(dense.shape), *structure, BLOCK, weight.groups)
    return dataclasses.replace(weight, values=values), scale


# --------------------------------------------------------------------------------------------------- fake and autograd


_DEFAULTS = (None, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "none", None, None)


def with_defaults(args: tuple) -> tuple:
    """All 15 arguments of the op; the dispatcher leaves trailing defaults out."""
    return (*args, *_DEFAULTS[len(args) - 6 :])


def _fake(*args):
    x, values, w_scale, crow, col, weight_shape, bias, residual, *window, activation, x_scale, packed = with_defaults(
        args
    )
    for t in (w_scale, x_scale):  # of mixed devices the dispatcher may choose meta: here
        torch._check(t is None or t.device == x.device, lambda: f"all tensors must be on x's device, {x.device}")
    torch._check(w_scale.shape[0] == weight_shape[0], lambda: f"w_scale must be [{weight_shape[0]}]")
    return fake_conv2d(x, values, crow, col, weight_shape, BLOCK, bias, residual, *window, activation, packed)


def _setup_context(ctx, inputs, output):
    x, values, w_scale, crow, col, ctx.shape, bias, residual, *ctx.window, ctx.activation, x_scale, _ = inputs
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    curved = ctx.activation != "none"
    saved = (x if curved or x_scale is not None else None, bias if curved else None, residual if curved else None)
    ctx.save_for_backward(values, w_scale, crow, col, x_scale, *saved)


def _backward(ctx, grad):
    """Straight through the rounding: dx = dz ⋆ (q_w · s_w), zero where a static scale clamped; weights are frozen."""
    values, w_scale, crow, col, x_scale, x, bias, residual = ctx.saved_tensors
    z = grad
    if ctx.activation != "none":
        z = _op(x, values, w_scale, crow, col, ctx.shape, bias, residual, *ctx.window, "none", x_scale)
    dz = activation_backward(grad, z, ctx.activation)  # fp32
    needs = (*ctx.needs_input_grad, *[False] * 15)  # the dispatcher leaves trailing defaults out
    dx = dbias = dresidual = None
    if needs[0]:
        g = (dz * w_scale[:, None, None]).to(grad.dtype)
        weight = (values.to(grad.dtype), crow, col, ctx.shape, BLOCK)
        dx = torch.ops.pyops.sparse_conv2d_dx(g, *weight, ctx.x_shape, *ctx.window)
        if x_scale is not None:
            dx = torch.where(x.abs() <= (QMAX + 0.5) * x_scale.reshape(-1, 1, 1, 1), dx, 0.0)
    if needs[6]:
        dbias = dz.sum((0, 2, 3)).to(ctx.bias_dtype)
    if needs[7]:
        dresidual = dz.to(grad.dtype)
    return dx, *[None] * 5, dbias, dresidual, *[None] * 7


_op = register(SCHEMA, int8_sparse_conv2d_ref, _fake, backward=_backward, setup_context=_setup_context, native=True)


# ----------------------------------------------------------------------------------------------------- public function


def int8_sparse_conv2d(
    x: torch.Tensor,
    weight: SparseWeight,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int | Ints = 1,
    padding: int | Ints | str = 0,
    dilation: int | Ints = 1,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """y = act(dequant(conv2d(quant(x), weight)) + bias + residual); the equation stands in this module's head.

    Args:
        x: [N, C, H, W] or [C, H, W], fp32, bf16 or fp16, any strides.
        weight: an int8 `SparseWeight` of shape [O, C/groups, R, S], from `quantize_sparse`.
        w_scale: fp32 [O].
        bias: [O], any float dtype.
        stride, dilation, padding: as in `sparse_conv2d`.
        residual: y's shape and x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        x_scale: None quantizes each image by its own maximum. A positive number, a tensor with one element, or one with
            an element for each image, gives the scale (static quantization): values beyond ±127·x_scale saturate.

    Returns:
        [N, O, OH, OW], or [O, OH, OW] for a single image, in x's dtype; channels_last if x is. Differentiable in x,
        bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    check_int8_weight(weight, w_scale)
    stride, dilation = check_pair("stride", stride), check_pair("dilation", dilation)
    padding = check_padding(padding, weight.shape[2:], stride, dilation)
    single = isinstance(x, torch.Tensor) and x.dim() == 3
    if single:
        x = x[None]
        residual = residual[None] if isinstance(residual, torch.Tensor) else residual
    x_scale = as_scale(x, x_scale)
    window = (stride, padding, dilation, weight.groups)
    structure = (weight.values, w_scale, weight.crow_indices, weight.col_indices, weight.shape)
    check_call(x, *structure, bias, residual, *window, activation, x_scale)
    y = with_packed(weight.packed, x, *structure, bias, residual, *window, activation, x_scale)
    return y[0] if single else y


def check_int8_weight(weight: SparseWeight, w_scale: torch.Tensor) -> None:
    """Raise the TypeError or ValueError that `int8_sparse_conv2d` documents for its weight."""
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight must be a SparseWeight, got {type(weight).__name__}; quantize_sparse makes one")
    if weight.values.dtype != torch.int8:
        raise TypeError(f"weight.values has dtype {weight.values.dtype}, expected torch.int8; quantize_sparse makes it")
    if not isinstance(w_scale, torch.Tensor) or w_scale.dtype != torch.float32:
        raise TypeError(f"w_scale must be an fp32 tensor, got {getattr(w_scale, 'dtype', type(w_scale).__name__)}")
    if w_scale.shape != (weight.shape[0],):
        raise ValueError(f"w_scale is {tuple(w_scale.shape)}; expected ({weight.shape[0]},)")
    K = math.prod(weight.shape[1:])
    if K > MAX_K:
        raise ValueError(f"weight has K={K}; above {MAX_K} an int32 sum of products could overflow")


def check_call(
    x, values, w_scale, crow, col, shape, bias, residual, stride, padding, dilation, groups, activation, x_scale
) -> None:
    """Raise the TypeError or ValueError that `int8_sparse_conv2d` documents for what goes through a right weight."""
    check_args(x, shape, bias, residual, stride, padding, dilation, groups, activation)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
    if x_scale is not None and (not isinstance(x_scale, torch.Tensor) or x_scale.dtype != torch.float32):
        raise TypeError(f"x_scale must be an fp32 tensor, got {getattr(x_scale, 'dtype', type(x_scale).__name__)}")
    for name, t in (("weight.values", values), ("w_scale", w_scale), ("x_scale", x_scale)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}")
    if x_scale is not None:
        check_x_scale(x_scale, x.shape[0], "image")


def with_packed(
    cache: PackedCache,
    x,
    values,
    w_scale,
    crow,
    col,
    shape,
    bias,
    residual,
    stride,
    padding,
    dilation,
    groups,
    activation,
    x_scale=None,
) -> torch.Tensor:
    """The op on arguments that are known to be right, with the packed form of the weight that `cache` keeps."""
    window = (stride, padding, dilation, groups)
    packed = cache.get(x, values, crow, col, shape, BLOCK, *window)
    args = (x, values, w_scale, crow, col, shape, bias, residual, *window, activation, x_scale, packed)
    if torch.compiler.is_compiling():
        return _op(*args)
    if forward_ad._current_level >= 0:
        refuse_tangents("sparse convolution", x, bias, residual)
    if torch._C._are_functorch_transforms_active():
        return _op(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual)):
        return _Function.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


class _Function(torch.autograd.Function):
    """The formula registered with the op, without the dispatcher's way to it."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            y = _op(*args)
        _setup_context(ctx, args, y)
        return y

    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))
