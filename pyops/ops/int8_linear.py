"""int8 linear: y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

    q_x[m, k] = round(x[m, k] / s_x[m]),   s_x[m] = max_k |x[m, k]| / 127     (dynamic)
    q_x[m, k] = clamp(round(x[m, k] / s_x[m]), -127, 127)                      (static: s_x is given)

Shapes   x [..., K], q_w [N, K], s_w [N], bias [N], residual [..., N] → y [..., N]
dtypes   x, residual and y fp32/bf16/fp16; q_w int8; s_w fp32; bias any of the float dtypes. Products are summed exactly
         in int32, the epilogue is computed in fp32 and rounded once.
Layout   q_w row-major (canonical), or packed for the CPU kernels, see `pack_int8`.
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

The rounding is fixed so that every backend gives the same integers: 127 / max|x| and x · (127 / max|x|) are rounded to
fp32 one after the other, then to the nearest integer, ties to even. A row whose largest magnitude is below 2⁻¹¹⁹ (its
reciprocal would overflow) quantizes to zeros. A row that holds NaN or Inf gives NaN in that row of y, and nowhere else.

K is at most 132 104: |q_x · q_w| ≤ 127 · 128, so K · 127 · 128 < 2³¹ and the int32 sum cannot overflow.

Method: symmetric per-token/per-channel W8A8 as in LLM.int8 (Dettmers et al. 2022) and SmoothQuant (Xiao et al. 2023).
"""

from __future__ import annotations

import math

import torch

from pyops import backend
from pyops.memory import has_values, put_on_huge_pages
from pyops.ops.epilogue import activation_backward, check_activation, epilogue_ref
from pyops.ops.registry import register

SCHEMA = (
    "int8_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'str activation="none", Tensor? x_scale=None) -> Tensor'
)

QMAX = 127
MAX_K = (2**31 - 1) // (QMAX * 128)
SMALLEST_AMAX = 2.0**-119
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PANEL_N = 32
"""Output channels in one packed panel: two AVX-512 registers, one pair of AMX tiles."""
PANEL_K = 64
"""K is padded to this in the packed form: one AMX tile row."""


# ---------------------------------------------------------------------------------------------------------- reference


def quantize_rows_ref(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as int8 [M, K] and their fp32 scales [M]; a row with NaN or Inf gets q = 0 and scale NaN."""
    x = x.float()
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
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    M, N, K = math.prod(x.shape[:-1]), w_scale.shape[0], x.shape[-1]  # not reshape(-1, K), which K = 0 refuses
    q_w = weight if weight.dim() == 2 else unpack_int8(weight, N, K)
    q_x, s_x = quantize_rows_ref(x.reshape(M, K), x_scale)
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
    q, scale = quantize_rows_ref(w.detach())
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
    panels, k4 = -(-N // PANEL_N), -(-K // PANEL_K) * (PANEL_K // 4)
    padded = q_w.new_zeros(panels * PANEL_N, k4 * 4)
    padded[:N, :K] = q_w
    packed = q_w.new_empty(packed_shape(N, K))
    put_on_huge_pages(packed, filled=False)
    packed[:, 0] = (-128 * padded.sum(dim=1, dtype=torch.int32)).view(torch.int8).view(panels, PANEL_N * 4)
    packed[:, 1:].view(panels, k4, PANEL_N, 4).copy_(padded.view(panels, PANEL_N, k4, 4).transpose(1, 2))
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
    return -(-N // PANEL_N), 1 + -(-K // PANEL_K) * (PANEL_K // 4), PANEL_N * 4


# --------------------------------------------------------------------------------------------------- fake and autograd


def _fake(x, weight, w_scale, bias=None, residual=None, activation="none", x_scale=None):
    for t in (weight, w_scale, bias, residual, x_scale):  # of mixed devices the dispatcher may choose meta: here
        torch._check(t is None or t.device == x.device, lambda: f"all tensors must be on x's device, {x.device}")
    N, K = w_scale.shape[0], x.shape[-1]
    torch._check(weight.dim() in (2, 3), lambda: f"weight must be [N, K] or packed, got shape {tuple(weight.shape)}")
    if weight.dim() == 2:
        torch._check(weight.shape[0] == N, lambda: f"w_scale has {N} elements, weight {weight.shape[0]} rows")
        torch._check(weight.shape[1] == K, lambda: f"x has K={K}, weight K={weight.shape[1]}")
    return x.new_empty((*x.shape[:-1], N))


def _setup_context(ctx, inputs, output):
    x, weight, w_scale, bias, residual, ctx.activation, x_scale = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.K, ctx.x_dtype = x.shape[-1], x.dtype
    curved = ctx.activation != "none"
    needs_x = curved or x_scale is not None
    saved = (x if needs_x else None, bias if curved else None, residual if curved else None)
    ctx.save_for_backward(weight, w_scale, x_scale, *saved)


def _backward(ctx, grad):
    """Straight through the rounding: dx = dz · (q_w · s_w), zero where a static scale clamped; weights are frozen."""
    weight, w_scale, x_scale, x, bias, residual = ctx.saved_tensors
    N, K, dtype = w_scale.shape[0], ctx.K, ctx.x_dtype
    z = grad if ctx.activation == "none" else _op(x, weight, w_scale, bias, residual, "none", x_scale)
    dz = activation_backward(grad, z, ctx.activation)  # [..., N] fp32
    dx = dbias = dresidual = None
    needs = (*ctx.needs_input_grad, False, False, False, False)  # the dispatcher leaves trailing defaults out
    if needs[0]:
        q_w = weight if weight.dim() == 2 else unpack_int8(weight, N, K)
        dx = (dz * w_scale).to(dtype) @ q_w.to(dtype)
        if x_scale is not None:
            limit = (QMAX + 0.5) * (x_scale if x_scale.numel() == 1 else x_scale.reshape(*x.shape[:-1], 1))
            dx = torch.where(x.abs() <= limit, dx, 0.0)
    if needs[3]:
        dbias = dz.reshape(math.prod(dz.shape[:-1]), N).sum(0).to(ctx.bias_dtype)
    if needs[4]:
        dresidual = dz.to(grad.dtype)
    return dx, None, None, dbias, dresidual, None, None


_op = register(SCHEMA, int8_linear_ref, _fake, backward=_backward, setup_context=_setup_context, triton=True)


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

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    if isinstance(x, torch.Tensor) and isinstance(x_scale, (int, float)) and not isinstance(x_scale, bool):
        x_scale = torch.full((), x_scale, dtype=torch.float32, device=x.device)
    check_args(x, w_q, w_scale, bias, residual, activation, x_scale)
    return dispatch(x, w_q, w_scale, bias, residual, activation, x_scale)


class _Function(torch.autograd.Function):
    """The formula registered with the op, without the dispatcher's way to it: a third of its cost for a small layer."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            y = _op(*args)
        _setup_context(ctx, args, y)
        return y

    backward = staticmethod(torch.autograd.function.once_differentiable(_backward))


def dispatch(x, weight, w_scale, bias, residual, activation, x_scale):
    """The op, for arguments that are known to be right, past the dispatcher's autograd layer where that is possible."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _op(x, weight, w_scale, bias, residual, activation, x_scale)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _Function.apply(x, weight, w_scale, bias, residual, activation, x_scale)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, weight, w_scale, bias, residual, activation, x_scale)


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


def check_args(x, w_q, w_scale, bias, residual, activation, x_scale) -> None:
    """Raise the TypeError or ValueError that `int8_linear` documents, for tensors of an x_scale too."""
    for name, t, allowed in (
        ("x", x, FLOAT_DTYPES),
        ("w_q", w_q, (torch.int8,)),
        ("w_scale", w_scale, (torch.float32,)),
        ("bias", bias, FLOAT_DTYPES),
        ("residual", residual, FLOAT_DTYPES),
        ("x_scale", x_scale, (torch.float32,)),
    ):
        if t is None and name in ("bias", "residual", "x_scale"):
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype not in allowed:
            raise TypeError(f"{name} has dtype {t.dtype}; allowed: {', '.join(map(str, allowed))}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}")
    if x.dim() == 0:
        raise ValueError("x must be [..., K], got a 0-dim tensor")
    if w_scale.dim() != 1:
        raise ValueError(f"w_scale must be [N], got shape {tuple(w_scale.shape)}")
    N, K = w_scale.shape[0], x.shape[-1]
    if w_q.dim() == 2:
        if w_q.shape != (N, K):
            raise ValueError(f"w_q is {tuple(w_q.shape)}; x with K={K} and w_scale with N={N} need ({N}, {K})")
    elif w_q.shape != packed_shape(N, K):
        raise ValueError(f"packed w_q is {tuple(w_q.shape)}; K={K} and N={N} need {packed_shape(N, K)}")
    if K > MAX_K:
        raise ValueError(f"x has K={K}; above {MAX_K} an int32 sum of products could overflow")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected ({N},)")
    if residual is not None:
        if residual.shape != (*x.shape[:-1], N):
            raise ValueError(f"residual is {tuple(residual.shape)}; expected {(*x.shape[:-1], N)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}, x {x.dtype}; they must agree")
    check_activation(activation)
    if x_scale is not None:
        check_x_scale(x_scale, math.prod(x.shape[:-1]), "row")


def check_x_scale(x_scale: torch.Tensor, count: int, each: str) -> None:
    """Raise ValueError unless a static scale has one element, or `count`, that a scale can be."""
    if x_scale.numel() not in (1, count):
        raise ValueError(f"x_scale has {x_scale.numel()} elements; expected 1 or {count}, one for each {each}")
    # Not on other devices, where looking would wait for them.
    if x_scale.device.type == "cpu" and x_scale.numel() and has_values(x_scale):
        low, high = (float(bound) for bound in x_scale.aminmax())  # both NaN if one is
        if not (low >= SMALLEST_AMAX and high < math.inf):
            bad = ~(x_scale.isfinite() & (x_scale >= SMALLEST_AMAX))
            raise ValueError(f"x_scale is {x_scale[bad][0].item()}; it must be finite and at least 2**-119")
