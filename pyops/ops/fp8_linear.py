"""fp8 linear: y[m, n] = act(Σ_k s_x · c_x[m, k] · s_w · c_w[n, k] + bias[n] + residual[m, n]), c_x and c_w in e4m3

    row     act(s_x[m] · s_w[n] · Σ_k c_x[m, k] · c_w[n, k] + …)
    block   act(Σ_g s_x[m, g] · s_w[n // 128, g] · Σ_{k ∈ g} c_x[m, k] · c_w[n, k] + …),   g = k // 128

The dimensions of w_scale say which: [N] or [⌈N/128⌉, ⌈K/128⌉].

Shapes   x [..., K], w_q [N, K], w_scale as above, bias [N], residual [..., N] → y [..., N]
dtypes   x, residual and y fp32/bf16/fp16; w_q float8_e4m3fn; w_scale fp32; bias any of the float dtypes. A product of
         two codes is exact in fp32. Products are summed in fp32, with "block" the 128 of a block first and then the
         blocks; the epilogue is computed in fp32 and rounded once.
Layout   w_q row-major, the same on every device. The op itself also takes its bytes, as uint8, for what does not know
         the type (torch.library.opcheck compares tensors).
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument. K is at most 2²⁴ - 16.

The rounding is fixed so that every backend gives the same codes. For a row of x, or a block of 128 of its columns (the
last may be shorter),

    amax = max |x|,   s_x = amax / 448,   c_x = e4m3(clamp(x · (448 / amax), -448, 448))

where the two quotients and the product are rounded to fp32 one after the other, and e4m3 rounds to the nearest code,
ties to the even one: 3 bits of fraction from 2⁻⁶ on, steps of 2⁻⁹ below. 448 is the largest code; e4m3fn has no Inf,
and the clamp stands before the cast so that nothing becomes its NaN. With an amax below 2⁻¹¹⁷, whose s_x would be
subnormal, s_x and the codes are 0. With a given x_scale, s_x = x_scale and c_x = e4m3(clamp(x · (1 / x_scale), ±448)),
the quotient and the product rounded likewise. A row that holds NaN or Inf gives NaN in that row of y, nowhere else.
Weights are quantized in the same way, by row or by blocks of 128 × 128.

Method: e4m3 of Micikevicius et al. 2022 ("FP8 formats for deep learning"); scales per 1×128 and 128×128 and sums on two
levels as in DeepSeek-V3 (2024).
"""

from __future__ import annotations

import math

import torch

from pyops.memory import chunks, has_values
from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.linear_shared import (
    FLOAT_DTYPES,
    added_gradients,
    as_scale,
    check_epilogue,
    check_same_device,
    check_tensors,
    check_x,
    keep_for_backward,
    saturates_at,
)
from pyops.ops.registry import past_autograd, register
from pyops.sizes import ceil_div

SCHEMA = (
    "fp8_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'str activation="none", Tensor? x_scale=None) -> Tensor'
)

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3fn."""
SATURATES = 464.0
"""Halfway to what the next code would be: from beyond here the clamp changes what a value is rounded to."""
SMALLEST_AMAX = 2.0**-117
SMALLEST_SCALE = 2.0**-126
"""Of a static scale: its reciprocal is finite, and it is no subnormal, which a device may read as 0."""
BLOCK = 128
"""Rows and columns that share a scale with granularity "block"."""
GRANULARITIES = ("row", "block")
MAX_K = 2**24 - 16
"""Tiles of 128 rows are addressed with 31 bits within a tile."""

TILE = 1 << 18
"""Outputs that the reference computes at once: 1 MiB of fp32, so that sums over blocks stay in cache."""
DECODED = 1 << 21
"""Weights that the reference decodes at once: 8 MiB of fp32, memory that is used again for the next ones."""


# ---------------------------------------------------------------------------------------------------------- reference


def encode_ref(x: torch.Tensor, dim: int | tuple[int, ...], scale: torch.Tensor | None = None) -> tuple:
    """The codes of x, in its shape, and the scales, of length 1 along `dim`, over which amax is taken.

    NaN or Inf makes the codes that share its scale 0 and the scale NaN.
    """
    x = x.float()
    amax = x.abs().amax(dim, keepdim=True)
    finite = amax.isfinite()
    if scale is None:
        usable = finite & (amax >= SMALLEST_AMAX)
        largest = torch.full_like(amax, LARGEST)  # a tensor: with a number, torch may multiply by a rounded reciprocal
        scale = torch.where(usable, amax / largest, 0.0)
        inverse = torch.where(usable, largest / amax, 0.0)
    else:
        inverse = 1.0 / scale
    codes = (torch.where(finite, x, 0.0) * inverse).clamp_(-LARGEST, LARGEST).to(FP8)
    return codes, torch.where(finite, scale, torch.nan)


def decode_ref(codes: torch.Tensor) -> torch.Tensor:
    """The codes as fp32, exactly. On the CPU torch converts one float8 at a time; this takes a quarter of its time."""
    if codes.device.type != "cpu":
        return codes.float()
    # In fp16 s eeee mmm is s 0eeee mmm0000000, 2⁻⁸ of its value: the sign is spread over two bits, then cleared in one.
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    half.bitwise_or_((half + 0x80).bitwise_and_(0x4000))  # NaN, the code of all ones, gets fp16's largest exponent
    return half.view(torch.float16).float().mul_(256.0)


def quantize_x_ref(x: torch.Tensor, granularity: str, scale: torch.Tensor | None = None) -> tuple:
    """Codes [M, K] of x [M, K], and scales [M] or [M, ⌈K/128⌉]."""
    M, K = x.shape
    if not K:
        return x.new_empty(M, 0, dtype=FP8), x.new_zeros((M,) if granularity == "row" else (M, 0), dtype=torch.float32)
    if granularity == "row":
        codes, scale = encode_ref(x, 1, None if scale is None else scale.reshape(-1, 1).expand(M, 1))
        return codes, scale[:, 0]
    blocks = ceil_div(K, BLOCK)
    padded = torch.nn.functional.pad(x, (0, blocks * BLOCK - K)).view(M, blocks, BLOCK)
    codes, scale = encode_ref(padded, 2)
    return codes.view(M, blocks * BLOCK)[:, :K], scale[:, :, 0]


def fp8_linear_ref(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] float8_e4m3fn, or its bytes
    w_scale: torch.Tensor,  # [N] or [⌈N/128⌉, ⌈K/128⌉] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
    x_scale: torch.Tensor | None = None,  # one element, or one for each row
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    weight = weight.view(FP8)
    (N, K), M = weight.shape, math.prod(x.shape[:-1])  # not reshape(-1, K), which K = 0 refuses
    codes, s_x = quantize_x_ref(x.reshape(M, K), "row" if w_scale.dim() == 1 else "block", x_scale)
    # Codes are multiplied and the sums scaled, not the other way round: they are exact in bf16 and TF32 too, so y does
    # not depend on torch's setting for the precision of fp32 matmuls.
    c_x = decode_ref(codes)
    acc = c_x.new_empty(M, N)
    columns = max(min(TILE // max(M, 1), DECODED // max(K, 1)), 1)
    for n in range(0, N, columns):
        own = slice(n, n + columns)
        c_w = decode_ref(weight[own])
        if w_scale.dim() == 1:
            acc[:, own] = (c_x @ c_w.T).mul_(s_x[:, None]).mul_(w_scale[own])
        else:
            blocks = torch.arange(n, n + c_w.shape[0], device=weight.device) // BLOCK
            acc[:, own] = _block_sums_ref(c_x, s_x, c_w, w_scale[blocks])
    r = None if residual is None else residual.reshape(M, N)
    y = epilogue_ref(acc, bias, r, activation, x.dtype)
    # An op's result must be no view, or autograd refuses y.relu_().
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))


def _block_sums_ref(c_x, s_x, c_w, s_w):
    """Σ_g s_x[m, g] · s_w[n, g] · Σ_{k ∈ g} c_x[m, k] · c_w[n, k]."""
    sums = c_x.new_zeros(c_x.shape[0], c_w.shape[0])
    for g, k in enumerate(range(0, c_x.shape[1], BLOCK)):
        part = c_x[:, k : k + BLOCK] @ c_w[:, k : k + BLOCK].T
        sums.addcmul_(part.mul_(s_x[:, g, None]), s_w[:, g])
    return sums


def quantize_fp8(w: torch.Tensor, granularity: str = "row") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] to e4m3: (codes float8_e4m3fn [N, K], scale fp32 [N] or [⌈N/128⌉, ⌈K/128⌉]).

    The scale is the largest magnitude of an output channel ("row") or of a block of 128 × 128 ("block"), divided by
    448. Raises TypeError for a dtype or type, ValueError if w is not 2-D or holds NaN or Inf, or for an unknown
    granularity.
    """
    if not isinstance(w, torch.Tensor) or not w.is_floating_point() or w.element_size() == 1:
        raise TypeError(f"w must be a tensor of fp32, bf16, fp16 or fp64, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2:
        raise ValueError(f"w must be [N, K], got shape {tuple(w.shape)}")
    check_granularity(granularity)
    w = w.detach()
    N, K = w.shape
    codes = torch.empty(N, K, dtype=FP8, device=w.device)
    scale = torch.zeros(scale_shape(N, K, granularity), dtype=torch.float32, device=w.device)
    step = BLOCK if granularity == "block" else 1
    for a, b in chunks(scale.shape[0], step * K, w.device) if K else ():  # rows, or rows of blocks
        own = slice(a * step, b * step)
        codes[own], scale[a:b] = quantize_w_ref(w[own], granularity)
    if has_values(scale) and not bool(scale.isfinite().all()):
        raise ValueError("w holds NaN or Inf and cannot be quantized")
    return codes, scale


def quantize_w_ref(w: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` of a few rows, unchecked; with granularity "block" a multiple of 128 of them, or the last."""
    if granularity == "row":
        return quantize_x_ref(w, "row")
    N, K = w.shape
    n, k = scale_shape(N, K, granularity)
    padded = torch.nn.functional.pad(w, (0, k * BLOCK - K, 0, n * BLOCK - N)).view(n, BLOCK, k, BLOCK)
    codes, scale = encode_ref(padded, (1, 3))
    return codes.view(n * BLOCK, k * BLOCK)[:N, :K], scale[:, 0, :, 0]


def dequantize_fp8(w_q: torch.Tensor, w_scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """w_scale · w_q as [N, K], the product rounded to fp32 and then to `dtype`; w_scale [N] or [⌈N/128⌉, ⌈K/128⌉].

    Raises TypeError or ValueError, naming the argument, for a dtype or shape that no fp8 weight has.
    """
    check_weight(w_q, w_scale)
    w = decode_ref(w_q)
    if w_scale.dim() == 1:
        return w.mul_(w_scale[:, None]).to(dtype)
    scale = w_scale.repeat_interleave(BLOCK, dim=0)[: w.shape[0]]  # [N, ⌈K/128⌉]
    return w.mul_(scale.repeat_interleave(BLOCK, dim=1)[:, : w.shape[1]]).to(dtype)


def scale_shape(N: int, K: int, granularity: str) -> tuple[int, ...]:
    """The shape of w_scale for a weight [N, K]."""
    return (N,) if granularity == "row" else (ceil_div(N, BLOCK), ceil_div(K, BLOCK))


# --------------------------------------------------------------------------------------------------- fake and autograd


def _fake(x, weight, w_scale, bias=None, residual=None, activation="none", x_scale=None):
    check_same_device(x, weight, w_scale, bias, residual, x_scale)
    torch._check(weight.dim() == 2, lambda: f"weight must be [N, K], got shape {tuple(weight.shape)}")
    N, K = weight.shape
    torch._check(x.shape[-1] == K, lambda: f"x has K={x.shape[-1]}, weight K={K}")
    granularity = "row" if w_scale.dim() == 1 else "block"
    expected = scale_shape(N, K, granularity)
    torch._check(w_scale.shape == expected, lambda: f"w_scale is {tuple(w_scale.shape)}, expected {tuple(expected)}")
    return x.new_empty((*x.shape[:-1], N))


def _setup_context(ctx, inputs, output):
    x, weight, w_scale, bias, residual, activation, x_scale = inputs
    saved = keep_for_backward(ctx, x, bias, residual, activation, clamps=x_scale is not None)
    ctx.save_for_backward(weight, w_scale, x_scale, *saved)


def _backward(ctx, grad):
    """Straight through the rounding: dx = dz · w, zero where a static scale clamped; the weight is frozen."""
    weight, w_scale, x_scale, x, bias, residual = ctx.saved_tensors
    z = grad if ctx.activation == "none" else _op(x, weight, w_scale, bias, residual, "none", x_scale)
    dz = activation_backward(grad, z, ctx.activation)  # [..., N] fp32
    dx = None
    needs = (*ctx.needs_input_grad, False, False, False, False)  # the dispatcher leaves trailing defaults out
    if needs[0]:
        dx = dz.to(ctx.x_dtype) @ dequantize_fp8(weight.view(FP8), w_scale, ctx.x_dtype)
        if x_scale is not None:
            dx = torch.where(x.abs() <= saturates_at(x, x_scale, SATURATES), dx, 0.0)
    return dx, None, None, *added_gradients(ctx, dz, grad, *needs[3:5]), None, None


_op = register(SCHEMA, fp8_linear_ref, _fake, backward=_backward, setup_context=_setup_context, triton=True)
dispatch = past_autograd(_op, _setup_context, _backward, differentiable=(0, 3, 4))


# ----------------------------------------------------------------------------------------------------- public function


def fp8_linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """y = act(dequant(quant(x) · w_qᵀ) + bias + residual); the equation and its rounding stand in this module's head.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        w_q, w_scale: from `quantize_fp8`: float8_e4m3fn [N, K]; fp32, [N] for scales by row, [⌈N/128⌉, ⌈K/128⌉] for
            scales by block. x is quantized row by row, or each row in blocks of 128, accordingly.
        bias: [N], any float dtype.
        residual: [..., N] in x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        x_scale: None quantizes x by its own maxima. A positive number, a tensor with one element, or one with an
            element for each row of x, gives the scale (static quantization, by row only): values beyond ±448·x_scale
            saturate.

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    x_scale = as_scale(x, x_scale)
    check_args(x, w_q, w_scale, bias, residual, activation, x_scale)
    return dispatch(x, w_q, w_scale, bias, residual, activation, x_scale)


def check_granularity(granularity: str) -> None:
    """Raise ValueError for what is not in GRANULARITIES."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}")


def check_weight(w_q: torch.Tensor, w_scale: torch.Tensor) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the two are an fp8 weight."""
    check_tensors(("w_q", w_q), ("w_q", w_q, (FP8,)), ("w_scale", w_scale, (torch.float32,)))
    if w_q.dim() != 2:
        raise ValueError(f"w_q must be [N, K], got shape {tuple(w_q.shape)}")
    row, block = (scale_shape(*w_q.shape, granularity) for granularity in GRANULARITIES)
    if tuple(w_scale.shape) not in (row, block):
        raise ValueError(f"w_scale is {tuple(w_scale.shape)}; w_q {tuple(w_q.shape)} needs {row} or {block}")


def check_args(x, w_q, w_scale, bias, residual, activation, x_scale) -> None:
    """Raise the TypeError or ValueError that `fp8_linear` documents, for tensors of an x_scale too."""
    check_weight(w_q, w_scale)
    check_tensors(
        ("w_q", w_q),
        ("x", x, FLOAT_DTYPES),
        ("bias", bias, FLOAT_DTYPES),
        ("residual", residual, FLOAT_DTYPES),
        ("x_scale", x_scale, (torch.float32,)),
        optional=("bias", "residual", "x_scale"),
    )
    check_x(x, MAX_K)
    N, K = w_q.shape
    if x.shape[-1] != K:
        raise ValueError(f"x has K={x.shape[-1]}; w_q is {(N, K)}")
    check_epilogue(x, N, bias, residual, activation)
    if x_scale is not None:
        if w_scale.dim() != 1:
            raise ValueError("x_scale goes with scales by row, w_scale [N]; blocks of x are quantized by their maxima")
        check_x_scale(x_scale, math.prod(x.shape[:-1]))


def check_x_scale(x_scale: torch.Tensor, rows: int) -> None:
    """Raise ValueError unless a static scale has one element, or one a row, that a scale can be."""
    if x_scale.numel() not in (1, rows):
        raise ValueError(f"x_scale has {x_scale.numel()} elements; expected 1 or {rows}, one for each row")
    # Not on other devices, where looking would wait for them.
    if x_scale.device.type == "cpu" and x_scale.numel() and has_values(x_scale):
        low, high = (float(bound) for bound in x_scale.aminmax())  # both NaN if one is
        if not (low >= SMALLEST_SCALE and high < math.inf):
            raise ValueError(f"x_scale goes from {low} to {high}; it must be finite and at least 2**-126")
