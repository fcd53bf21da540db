"""int4 linear: y[m, n] = act(Σ_k x[m, k] · w[n, k] + bias[n] + residual[m, n])

with w[n, k] = s[n, g] · (q[n, k] - z[n, g]), g = k // G, and the sum in one of two ways:

    int8    s_x[m] · Σ_g s[n, g] · Σ_{k ∈ g} q_x[m, k] · (q[n, k] - z[n, g]), x quantized row by row as in int8_linear.
            The inner sums are exact in int32, the outer one runs over g in order, in fp32; where scales are multiples
            of steps (ops/int4_weight.py) a CPU kernel adds exactly over all groups.
    float   x as it is; products and sums in fp32.

Shapes   x [..., K], q [N, K] two in a byte, s and z [N, ⌈K/G⌉], bias [N], residual [..., N] → y [..., N]
dtypes   x, residual and y fp32/bf16/fp16; s fp32/bf16/fp16; z uint8; bias any of the float dtypes. The epilogue is
         computed in fp32 and rounded once.
Layout   canonical or packed, see ops/int4_weight.py.
Order    with `order` [K], an int32 permutation, column k of the weight belongs to x[..., order[k]]: the groups of
         GPTQ's "act-order" are no runs of K, and the weight is kept sorted by group.
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

A row of x that holds NaN or Inf gives NaN in that row of y with int8, and what IEEE arithmetic gives with float.

Method: group-wise weight quantization as in GPTQ (Frantar et al. 2022) and AWQ (Lin et al. 2023); W4A8 with integer
group sums as in QServe (Lin et al. 2024) and llama.cpp.
"""

from __future__ import annotations

import math

import torch

from pyops import backend
from pyops.memory import has_values
from pyops.ops.dequantize import int4_dequantize
from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.int4_weight import (
    MIDDLE,
    MOST_ZERO,
    check_canonical,
    check_packed,
    check_types,
    dequantize_int4,
    group_count,
    unpack_int4,
    unpack_nibbles,
)
from pyops.ops.int8_linear import int_matmul_ref, quantize_rows_ref
from pyops.ops.linear_shared import (
    FLOAT_DTYPES,
    added_gradients,
    call_checked,
    check_epilogue,
    check_same_device,
    check_tensors,
    check_x,
    keep_for_backward,
)
from pyops.ops.registry import past_autograd, register
from pyops.sizes import ceil_div

SCHEMA = (
    "int4_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? w_zero, Tensor? bias, Tensor? residual, "
    "str activation, int group_size, int out_features, Tensor? order, str compute) -> Tensor"
)

COMPUTES = ("auto", "int8", "float")
MAX_K = (2**31 - 1) // (127 * MOST_ZERO)


# ---------------------------------------------------------------------------------------------------------- reference


def int4_linear_ref(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, ⌈K/2⌉] uint8, or packed
    w_scale: torch.Tensor,  # [N, ⌈K/G⌉], or packed
    w_zero: torch.Tensor | None,  # as w_scale, uint8
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [..., N]
    activation: str,
    group_size: int,
    out_features: int,
    order: torch.Tensor | None,  # [K] int32
    compute: str,
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked."""
    M, N, K = math.prod(x.shape[:-1]), out_features, x.shape[-1]
    weight, w_scale, w_zero = _canonical(weight, w_scale, w_zero, N, K, group_size)
    rows = x.reshape(M, K)
    if order is not None:
        rows = rows.index_select(1, order)
    if compute == "int8":
        q_x, s_x = quantize_rows_ref(rows)
        acc = _group_sums_ref(q_x, unpack_nibbles(weight, K), w_scale, w_zero, group_size) * s_x[:, None]
    else:
        acc = rows.float() @ dequantize_int4(weight, w_scale, w_zero, K, group_size).T
    r = None if residual is None else residual.reshape(M, N)
    y = epilogue_ref(acc, bias, r, activation, x.dtype)
    # An op's result must be no view, or autograd refuses y.relu_().
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))


def _group_sums_ref(q_x, q_w, w_scale, w_zero, group_size):
    """Σ_g s[n, g] · Σ_{k ∈ g} q_x[m, k] · (q[n, k] - z[n, g]): exact integers, then fp32 with one rounding a term."""
    M, (N, K) = q_x.shape[0], q_w.shape
    acc = torch.zeros(M, N, dtype=torch.float32, device=q_x.device)
    G = group_size if group_size > 0 else K
    for g in range(group_count(K, group_size)):
        own = slice(g * G, min((g + 1) * G, K))
        z = MIDDLE if w_zero is None else w_zero[:, g, None].to(torch.int16)
        part = int_matmul_ref(q_x[:, own], q_w[:, own].to(torch.int16) - z).float()
        # In fp64 the product is exact, so that the sum is rounded once (but for double rounding), as by an FMA.
        acc = (acc.double() + part.double() * w_scale[:, g].double()).float()
    return acc


def _canonical(weight, w_scale, w_zero, N, K, group_size):
    return (weight, w_scale, w_zero) if weight.dim() == 2 else unpack_int4(weight, w_scale, w_zero, N, K, group_size)


# --------------------------------------------------------------------------------------------------- fake and autograd


def _fake(x, weight, w_scale, w_zero, bias, residual, activation, group_size, out_features, order, compute):
    check_same_device(x, weight, w_scale, w_zero, bias, residual, order)
    torch._check(weight.dim() in (2, 3), lambda: f"weight must be [N, K/2] or packed, got shape {tuple(weight.shape)}")
    if weight.dim() == 2:
        K = x.shape[-1]
        torch._check(weight.shape[0] == out_features, lambda: f"weight has {weight.shape[0]} rows, not {out_features}")
        torch._check(weight.shape[1] == ceil_div(K, 2), lambda: f"x has K={K}, weight {weight.shape[1]} bytes a row")
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output):
    x, weight, w_scale, w_zero, bias, residual, activation, ctx.group_size, ctx.N, order, ctx.compute = inputs
    saved = keep_for_backward(ctx, x, bias, residual, activation)
    ctx.save_for_backward(weight, w_scale, w_zero, order, *saved)


def _backward(ctx, grad):
    """dx = dz · w, straight through the rounding of x; the weight is frozen."""
    weight, w_scale, w_zero, order, x, bias, residual = ctx.saved_tensors
    N, K, G = ctx.N, ctx.K, ctx.group_size
    z = grad
    if ctx.activation != "none":
        z = _op(x, weight, w_scale, w_zero, bias, residual, "none", G, N, order, ctx.compute)
    dz = activation_backward(grad, z, ctx.activation)  # [..., N] fp32
    dx = None
    if ctx.needs_input_grad[0]:
        if weight.dim() == 3:
            w = int4_dequantize(weight, w_scale, w_zero, G, N, K, ctx.x_dtype)
        else:
            w = dequantize_int4(weight, w_scale, w_zero, K, G, ctx.x_dtype)
        dx = dz.to(ctx.x_dtype) @ w
        if order is not None:
            dx = torch.empty_like(dx).index_copy_(-1, order.long(), dx)
    added = added_gradients(ctx, dz, grad, *ctx.needs_input_grad[4:6])
    return dx, None, None, None, *added, None, None, None, None, None


_op = register(SCHEMA, int4_linear_ref, _fake, backward=_backward, setup_context=_setup_context, triton=True)
dispatch = past_autograd(_op, _setup_context, _backward, differentiable=(0, 4, 5))


# ----------------------------------------------------------------------------------------------------- public function


def int4_linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int = 128,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    order: torch.Tensor | None = None,
    compute: str = "auto",
    out_features: int | None = None,
) -> torch.Tensor:
    """y = act(x · (s · (q - z))ᵀ + bias + residual); the equation stands in this module's head.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        w_q, w_scale, w_zero: from `quantize_int4`: uint8 [N, ⌈K/2⌉]; fp32, bf16 or fp16 [N, ⌈K/G⌉]; uint8 of that
            shape, 0 to 16, or None for a zero point of 8 everywhere. Or the three of `pack_int4` for this K, which the
            CPU kernels read (an unpacked weight is packed at every call). Those three are one: with other scales than
            it was packed with, a packed weight is another one, and not those scales times the same integers.
        bias: [N], any float dtype.
        group_size: G: 32, a multiple of 64, or -1.
        residual: [..., N] in x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        order: int32 [K], a permutation: column k of the weight belongs to x[..., order[k]].
        compute: "int8" quantizes each row of x, "float" computes with x as it is; "auto" is int8 on the CPU, float
            elsewhere.
        out_features: N, needed for a packed weight, whose rows are padded.

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    packed = isinstance(w_q, torch.Tensor) and w_q.dim() == 3
    if out_features is None and isinstance(w_q, torch.Tensor) and w_q.dim() == 2:
        out_features = w_q.shape[0]
    if compute == "auto" and isinstance(x, torch.Tensor):
        compute = resolve_compute(compute, x.device)
    args = (x, w_q, w_scale, w_zero, bias, residual, activation, group_size, out_features, order, compute)
    # Kernels look neither at all zero points nor whether an order is a permutation, and take True for 1.
    return call_checked(dispatch, check_args, args, packed and order is None and type(out_features) is int)


def resolve_compute(compute: str, device: torch.device) -> str:
    """What "auto" is on this device."""
    if compute != "auto":
        return compute
    return "int8" if device.type == "cpu" else "float"


def wants_packed(device: torch.device) -> bool:
    """True if the kernels of `device` read the packed form of a weight."""
    return device.type == "cpu" and backend.native is not None


def check_args(x, w_q, w_scale, w_zero, bias, residual, activation, group_size, out_features, order, compute) -> None:
    """Raise the TypeError or ValueError that `int4_linear` documents."""
    check_tensors(
        ("x", x),
        ("x", x, FLOAT_DTYPES),
        ("bias", bias, FLOAT_DTYPES),
        ("residual", residual, FLOAT_DTYPES),
        optional=("bias", "residual"),
    )
    check_x(x, MAX_K)
    check_types(w_q, w_scale, w_zero)
    if w_q.device != x.device:
        raise ValueError(f"w_q is on {w_q.device}, x on {x.device}")
    K = x.shape[-1]
    if w_q.dim() == 3:
        if not isinstance(out_features, int) or isinstance(out_features, bool):
            raise TypeError(f"out_features must be given for a packed w_q, as an int; got {out_features!r}")
        check_packed(w_q, w_scale, w_zero, out_features, K, group_size)
    else:
        check_canonical(w_q, w_scale, w_zero, K, group_size)
        if out_features != w_q.shape[0]:
            raise ValueError(f"out_features is {out_features!r}, w_q has {w_q.shape[0]} rows")
    check_epilogue(x, out_features, bias, residual, activation)
    if compute not in COMPUTES:
        raise ValueError(f"compute={compute!r} is not one of {', '.join(COMPUTES)}")
    if order is not None:
        check_order(order, K)
        if order.device != x.device:
            raise ValueError(f"order is on {order.device}, x on {x.device}")


def check_order(order: torch.Tensor, K: int) -> None:
    """Raise TypeError or ValueError unless `order` is an int32 permutation of 0 … K-1 (looked at on the CPU only)."""
    if not isinstance(order, torch.Tensor) or order.dtype != torch.int32:
        raise TypeError(f"order must be an int32 tensor, got {getattr(order, 'dtype', type(order).__name__)}")
    if order.shape != (K,):
        raise ValueError(f"order is {tuple(order.shape)}; x with K={K} needs ({K},)")
    if has_values(order) and order.device.type == "cpu":  # elsewhere the look would synchronize; kernels check bounds
        seen = torch.zeros(K, dtype=torch.bool)
        inside = (order >= 0) & (order < K)
        if not bool(inside.all()) or not bool(seen.index_fill_(0, order.long(), True).all()):
            raise ValueError("order is no permutation of 0 … K-1")
