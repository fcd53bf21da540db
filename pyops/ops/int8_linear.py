"""int8 linear: y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

    q_x[m, k] = round(x[m, k] / s_x[m]),   s_x[m] = max_k |x[m, k]| / 127     (dynamic)
    q_x[m, k] = clamp(round(x[m, k] / s_x[m]), -127, 127)                      (static: s_x is given)

With `smooth` [K], x[m, k] / smooth[k] stands in the place of x[m, k] above, and q_w · s_w is the weight times smooth:
outliers of x are moved into the weight, which is quantized more finely.

Shapes   x [..., K], q_w [N, K], s_w [N], bias [N], residual [..., N], smooth [K] → y [..., N]
dtypes   x, residual and y fp32/bf16/fp16; q_w int8; s_w and smooth fp32; bias any of the float dtypes. Products are
         summed exactly in int32, the epilogue is computed in fp32 and rounded once.
Layout   q_w row-major (canonical), or packed for the CPU kernels, see `pack_int8`.
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

The rounding is fixed so that every backend gives the same integers. Each of these is rounded to fp32, one after the
other: 1 / smooth; x · (1 / smooth), which is x from here on; 127 / max|x|, or 1 / s_x where s_x is given; x times that.
The last is clamped to ±127 (also where it overflowed) and rounded to the nearest integer, ties to even. A row whose
largest magnitude is below 2⁻¹¹⁹ (its reciprocal would overflow) quantizes to zeros where s_x is not given. A row of
which x, or x · (1 / smooth) in fp32, holds NaN or Inf gives NaN in that row of y, and nowhere else.

K is at most 132 104: |q_x · q_w| ≤ 127 · 128, so K · 127 · 128 < 2³¹ and the int32 sum cannot overflow.

Method: symmetric per-token/per-channel W8A8 as in LLM.int8 (Dettmers et al. 2022) and SmoothQuant (Xiao et al. 2023).
"""

from __future__ import annotations

import math

import torch

from pyops import backend
from pyops.memory import chunks, has_values, put_on_huge_pages
from pyops.ops.dequantize import dense_int8
from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.linear_shared import (
    FLOAT_DTYPES,
    added_gradients,
    as_scale,
    call_checked,
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
    "int8_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'str activation="none", Tensor? x_scale=None, Tensor? smooth=None) -> Tensor'
)

QMAX = 127
MAX_K = (2**31 - 1) // (QMAX * 128)
SMALLEST_AMAX = 2.0**-119

PANEL_N = 32
"""Output channels in one packed panel: two AVX-512 registers, one pair of AMX tiles."""
PANEL_K = 64
"""K is padded to this in the packed form: one AMX tile row."""


# ---------------------------------------------------------------------------------------------------------- reference


def quantize_rows_ref(
    x: torch.Tensor, scale: torch.Tensor | None = None, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as int8 [M, K] and their fp32 scales [M]; a row with NaN or Inf gets q = 0 and scale NaN.

    `scale` is the static one, of one element or [M]; what is quantized is x / smooth.
    """
    x = x.float()
    if smooth is not None:
        x = x * (1.0 / smooth)
    amax = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = amax.isfinite()
    if scale is None:
        usable = finite & (amax >= SMALLEST_AMAX)
        qmax = torch.full_like(amax, QMAX)  # a tensor: with a number, torch may multiply by a rounded reciprocal
        scale = torch.where(usable, amax / qmax, 0.0)
        inverse = torch.where(usable, qmax / amax, 0.0)
    else:
        scale = scale.reshape(-1).expand(x.shape[0])
        inverse = 1.0 / scale
    q = (torch.where(finite[:, None], x, 0.0) * inverse[:, None]).round().clamp(-QMAX, QMAX)
    return q.to(torch.int8), torch.where(finite, scale, float("nan"))


def int_matmul_ref(q_x: torch.Tensor, q_w: torch.Tensor) -> torch.Tensor:
    """Σ_k q_x[m, k] · q_w[n, k], exact, int32 [M, N]: fp32 products of 1024 terms stay below 2²⁴ and are exact."""
    acc = torch.zeros(q_x.shape[0], q_w.shape[0], dtype=torch.int32, device=q_x.device)
    for a, b in zip(q_x.split(1024, dim=1), q_w.split(1024, dim=1), strict=True):
        acc += (a.float() @ b.float().T).to(torch.int32)
    return acc


def int8_linear_ref(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] int8, or packed
    w_scale: torch.Tensor,  # [N] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
    x_scale: torch.Tensor | None = None,  # one element, or one for each row
    smooth: torch.Tensor | None = None,  # [K] fp32
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    M, N, K = math.prod(x.shape[:-1]), w_scale.shape[0], x.shape[-1]  # not reshape(-1, K), which K = 0 refuses
    q_w = weight if weight.dim() == 2 else unpack_int8(weight, N, K)
    q_x, s_x = quantize_rows_ref(x.reshape(M, K), x_scale, smooth)
    acc = int_matmul_ref(q_x, q_w) * (s_x[:, None] * w_scale)
    r = None if residual is None else residual.reshape(M, N)
    y = epilogue_ref(acc, bias, r, activation, x.dtype)
    # An op's result must be no view, or autograd refuses y.relu_().
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))


def quantize_int8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] symmetrically for each output channel: (q int8 [N, K], scale fp32 [N]), w ≈ q · scale.

    scale[n] = max_k |w[n, k]| / 127; an all-zero row has scale 0. Raises TypeError for a dtype other than
    fp32/bf16/fp16/fp64, ValueError if w is not 2-D or holds NaN or Inf.
    """
    if not isinstance(w, torch.Tensor) or not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2:
        raise ValueError(f"w must be [N, K], got shape {tuple(w.shape)}")
    w = w.detach()
    N, K = w.shape
    q = torch.empty(N, K, dtype=torch.int8, device=w.device)
    scale = torch.empty(N, dtype=torch.float32, device=w.device)
    for a, b in chunks(N, K, w.device):
        q[a:b], scale[a:b] = quantize_rows_ref(w[a:b])
    if has_values(scale) and not bool(scale.isfinite().all()):
        raise ValueError("w holds NaN or Inf and cannot be quantized")
    return q, scale


def pack_int8(q_w: torch.Tensor) -> torch.Tensor:
    """The form of q_w [N, K] that the CPU kernels read: int8 [⌈N/32⌉, 1 + ⌈K/64⌉·16, 128], exactly invertible.

    A panel holds 32 output channels. Its row 0 is 32 int32: -128·Σ_k q_w[n, k], which cancels the offset of the
    unsigned activations that VNNI needs. Row 1 + j holds k = 4j … 4j+3 as [2][16 n][4 k], so that a row is two
    AVX-512 registers and 16 rows are two AMX tiles. Padding is zero.
    """
    _check_q_w(q_w)
    N, K = q_w.shape
    packed = q_w.new_empty(packed_shape(N, K))
    panels, k4 = packed.shape[0], packed.shape[1] - 1
    put_on_huge_pages(packed, filled=False)
    for a, b in chunks(panels, PANEL_N * k4 * 4, q_w.device):
        own = q_w[a * PANEL_N : b * PANEL_N]
        padded = q_w.new_zeros((b - a) * PANEL_N, k4 * 4)
        padded[: own.shape[0], :K] = own
        sums = -128 * padded.sum(dim=1, dtype=torch.int32)
        packed[a:b, 0] = sums.view(torch.int8).view(b - a, PANEL_N * 4)
        packed[a:b, 1:].view(b - a, k4, PANEL_N, 4).copy_(padded.view(b - a, PANEL_N, k4, 4).transpose(1, 2))
    put_on_huge_pages(packed, filled=True)
    return packed


def unpack_int8(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The canonical q_w [N, K] of `pack_int8`. Raises ValueError if `packed` has not the shape of such a weight."""
    if packed.shape != packed_shape(N, K):
        raise ValueError(f"packed is {tuple(packed.shape)}; N={N} and K={K} need {packed_shape(N, K)}")
    panels, k4 = packed.shape[0], packed.shape[1] - 1
    body = packed[:, 1:].view(panels, k4, PANEL_N, 4).permute(0, 2, 1, 3).reshape(panels * PANEL_N, k4 * 4)
    return body[:N, :K].contiguous()


def packed_shape(N: int, K: int) -> tuple[int, int, int]:
    """The shape of `pack_int8` of an [N, K] weight."""
    return ceil_div(N, PANEL_N), 1 + ceil_div(K, PANEL_K) * (PANEL_K // 4), PANEL_N * 4


# --------------------------------------------------------------------------------------------------- fake and autograd


def fake(x, weight, w_scale, bias=None, residual=None, activation="none", x_scale=None, smooth=None):
    """The result's shape and dtype; of int8_weight_linear too."""
    check_same_device(x, weight, w_scale, bias, residual, x_scale, smooth)
    N, K = w_scale.shape[0], x.shape[-1]
    torch._check(weight.dim() in (2, 3), lambda: f"weight must be [N, K] or packed, got shape {tuple(weight.shape)}")
    if weight.dim() == 2:
        torch._check(weight.shape[0] == N, lambda: f"w_scale has {N} elements, weight {weight.shape[0]} rows")
        torch._check(weight.shape[1] == K, lambda: f"x has K={K}, weight K={weight.shape[1]}")
    if smooth is not None:
        torch._check(smooth.numel() == K, lambda: f"x has K={K}, smooth {smooth.numel()} elements")
    return x.new_empty((*x.shape[:-1], N))


def _setup_context(ctx, inputs, output):
    x, weight, w_scale, bias, residual, activation, x_scale, smooth = inputs
    saved = keep_for_backward(ctx, x, bias, residual, activation, clamps=x_scale is not None)
    ctx.save_for_backward(weight, w_scale, x_scale, smooth, *saved)


def _backward(ctx, grad):
    """Straight through the rounding: dx = dz · (q_w · s_w), zero where a static scale clamped; weights are frozen."""
    weight, w_scale, x_scale, smooth, x, bias, residual = ctx.saved_tensors
    dtype = ctx.x_dtype
    z = grad if ctx.activation == "none" else _op(x, weight, w_scale, bias, residual, "none", x_scale, smooth)
    dz = activation_backward(grad, z, ctx.activation)  # [..., N] fp32
    dx = None
    needs = (*ctx.needs_input_grad, *[False] * 5)  # the dispatcher leaves trailing defaults out
    if needs[0]:
        dx = dz.to(dtype) @ dense_int8(weight, w_scale, ctx.K, dtype)
        if smooth is not None:
            dx = (dx * (1.0 / smooth)).to(dtype)
        if x_scale is not None:
            limit = saturates_at(x, x_scale, QMAX + 0.5)
            if smooth is not None:
                limit = limit * smooth
            dx = torch.where(x.abs() <= limit, dx, 0.0)
    return dx, None, None, *added_gradients(ctx, dz, grad, *needs[3:5]), None, None, None


_op = register(SCHEMA, int8_linear_ref, fake, backward=_backward, setup_context=_setup_context, triton=True)
dispatch = past_autograd(_op, _setup_context, _backward, differentiable=(0, 3, 4))


# ----------------------------------------------------------------------------------------------------- public function


def int8_linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    x_scale: torch.Tensor | float | None = None,
    smooth: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(dequant(quant(x) · w_qᵀ) + bias + residual); the equation and its rounding stand in this module's head.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        w_q: int8 [N, K] from `quantize_int8`, or its packed form from `pack_int8` (what the CPU kernels read; an
            unpacked weight is packed panel by panel at every call).
        w_scale: fp32 [N].
        bias: [N], any float dtype.
        residual: [..., N] in x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        x_scale: None quantizes each row by its own maximum. A positive number, a tensor with one element, or one with
            an element for each row of x, gives the scale (static quantization): values beyond ±127·x_scale saturate.
        smooth: fp32 [K], finite and at least 2**-119: x / smooth is what is quantized (and `x_scale` its scale); w_q is
            the quantized weight times smooth.

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    x_scale = as_scale(x, x_scale)
    args = (x, w_q, w_scale, bias, residual, activation, x_scale, smooth)
    # Kernels do not look at the values of scales.
    return call_checked(dispatch, check_args, args, x_scale is None and smooth is None)


def wants_packed(device: torch.device) -> bool:
    """True if the kernels of `device` read the packed form of a weight."""
    return device.type == "cpu" and backend.native is not None


def _check_q_w(q_w: torch.Tensor) -> None:
    if not isinstance(q_w, torch.Tensor) or q_w.dtype != torch.int8:
        raise TypeError(f"w_q must be an int8 tensor, got {getattr(q_w, 'dtype', type(q_w).__name__)}")
    if q_w.dim() != 2:
        raise ValueError(f"w_q must be [N, K], got shape {tuple(q_w.shape)}")
    if q_w.shape[1] > MAX_K:
        raise ValueError(f"w_q has K={q_w.shape[1]}; above {MAX_K} an int32 sum of products could overflow")


def check_args(x, w_q, w_scale, bias, residual, activation, x_scale=None, smooth=None) -> None:
    """Raise the TypeError or ValueError that `int8_linear` documents, for tensors of an x_scale too."""
    check_tensors(
        ("x", x),
        ("x", x, FLOAT_DTYPES),
        ("w_q", w_q, (torch.int8,)),
        ("w_scale", w_scale, (torch.float32,)),
        ("bias", bias, FLOAT_DTYPES),
        ("residual", residual, FLOAT_DTYPES),
        ("x_scale", x_scale, (torch.float32,)),
        ("smooth", smooth, (torch.float32,)),
        optional=("bias", "residual", "x_scale", "smooth"),
    )
    check_x(x, MAX_K)
    if w_scale.dim() != 1:
        raise ValueError(f"w_scale must be [N], got shape {tuple(w_scale.shape)}")
    N, K = w_scale.shape[0], x.shape[-1]
    if w_q.dim() == 2:
        if w_q.shape != (N, K):
            raise ValueError(f"w_q is {tuple(w_q.shape)}; x with K={K} and w_scale with N={N} need ({N}, {K})")
    elif w_q.shape != packed_shape(N, K):
        raise ValueError(f"packed w_q is {tuple(w_q.shape)}; K={K} and N={N} need {packed_shape(N, K)}")
    check_epilogue(x, N, bias, residual, activation)
    if x_scale is not None:
        check_x_scale(x_scale, math.prod(x.shape[:-1]), "row")
    if smooth is not None:
        if smooth.shape != (K,):
            raise ValueError(f"smooth is {tuple(smooth.shape)}; x with K={K} needs ({K},)")
        check_divisors("smooth", smooth)


def check_x_scale(x_scale: torch.Tensor, count: int, each: str) -> None:
    """Raise ValueError unless a static scale has one element, or `count`, that a scale can be."""
    if x_scale.numel() not in (1, count):
        raise ValueError(f"x_scale has {x_scale.numel()} elements; expected 1 or {count}, one for each {each}")
    check_divisors("x_scale", x_scale)


def check_divisors(name: str, t: torch.Tensor) -> None:
    """Raise ValueError unless every element is one that x can be divided by: finite and at least 2⁻¹¹⁹."""
    # Not on other devices, where looking would wait for them.
    if t.device.type != "cpu" or not t.numel() or not has_values(t):
        return
    low, high = (t.item(),) * 2 if t.numel() == 1 else (float(bound) for bound in t.aminmax())  # NaN if one is
    if not (low >= SMALLEST_AMAX and high < math.inf):
        bad = ~(t.isfinite() & (t >= SMALLEST_AMAX))
        raise ValueError(f"{name} is {t[bad][0].item()}; it must be finite and at least 2**-119")
