"""int8 weight-only linear: y[m, n] = act(s_w[n] · Σ_k x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

Shapes   x [..., K], q_w [N, K], s_w [N], bias [N], residual [..., N] → y [..., N]
dtypes   x, residual and y fp32/bf16/fp16; q_w int8; s_w fp32; bias any of the float dtypes. x is taken as it is, with
         all of its bits; products and sums are fp32, so is the epilogue, which is rounded once. On CPUs with VNNI, of
         one to three rows with K up to 65536, those that lose little by it are rounded to within 2⁻³¹ of their largest
         magnitude; their sums are exact (docs/int8_linear.md).
Layout   q_w row-major (canonical), or packed for the CPU kernels: the layouts of `int8_linear`, `pack_int8`.
Errors   ValueError for a shape or value, TypeError for a dtype or type, naming the argument.

A row of x that holds NaN or Inf gives NaN or Inf in that row of y, as IEEE arithmetic does, and nowhere else.

Method: symmetric per-channel W8A16, as LLM.int8 (Dettmers et al. 2022) and bitsandbytes keep their weights.
"""

from __future__ import annotations

import math

import torch

from pyops.ops.dequantize import dense_int8
from pyops.ops.epilogue import activation_backward, epilogue_ref
from pyops.ops.int8_linear import check_args, fake, unpack_int8
from pyops.ops.linear_shared import added_gradients, call_checked, keep_for_backward
from pyops.ops.registry import past_autograd, register

SCHEMA = (
    "int8_weight_linear(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, "
    'str activation="none") -> Tensor'
)


# ---------------------------------------------------------------------------------------------------------- reference


def int8_weight_linear_ref(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] int8, or packed
    w_scale: torch.Tensor,  # [N] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
) -> torch.Tensor:
    """The equation in plain PyTorch, on any device; arguments as the op's, unchecked.

    The sums are taken before the scale and must be in the range of fp32.
    """
    M, N, K = math.prod(x.shape[:-1]), w_scale.shape[0], x.shape[-1]
    q_w = weight if weight.dim() == 2 else unpack_int8(weight, N, K)
    acc = (x.reshape(M, K).float() @ q_w.float().T) * w_scale
    r = None if residual is None else residual.reshape(M, N)
    y = epilogue_ref(acc, bias, r, activation, x.dtype)
    # An op's result must be no view, or autograd refuses y.relu_().
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))


# --------------------------------------------------------------------------------------------------- fake and autograd


def _fake(x, weight, w_scale, bias=None, residual=None, activation="none"):
    return fake(x, weight, w_scale, bias, residual, activation)


def _setup_context(ctx, inputs, output):
    x, weight, w_scale, bias, residual, activation = inputs
    ctx.save_for_backward(weight, w_scale, *keep_for_backward(ctx, x, bias, residual, activation))


def _backward(ctx, grad):
    """dx = dz · (q_w · s_w); weights are frozen."""
    weight, w_scale, x, bias, residual = ctx.saved_tensors
    z = grad if ctx.activation == "none" else _op(x, weight, w_scale, bias, residual, "none")
    dz = activation_backward(grad, z, ctx.activation)  # [..., N] fp32
    dx = None
    needs = (*ctx.needs_input_grad, False, False, False)  # the dispatcher leaves trailing defaults out
    if needs[0]:
        dx = dz.to(ctx.x_dtype) @ dense_int8(weight, w_scale, ctx.K, ctx.x_dtype)
    return dx, None, None, *added_gradients(ctx, dz, grad, *needs[3:5]), None


_op = register(SCHEMA, int8_weight_linear_ref, _fake, backward=_backward, setup_context=_setup_context, triton=True)
dispatch = past_autograd(_op, _setup_context, _backward, differentiable=(0, 3, 4))


# ----------------------------------------------------------------------------------------------------- public function


def int8_weight_linear(
    x: torch.Tensor,
    w_q: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = act(x · (s_w · q_w)ᵀ + bias + residual); the equation stands in this module's head.

    Args:
        x: [..., K] fp32, bf16 or fp16, any strides.
        w_q: int8 [N, K] from `quantize_int8`, or its packed form from `pack_int8` (what the CPU kernels read; an
            unpacked weight is packed at every call).
        w_scale: fp32 [N].
        bias: [N], any float dtype.
        residual: [..., N] in x's dtype, added before the activation.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Returns:
        [..., N] in x's dtype. Differentiable in x, bias and residual.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    return call_checked(dispatch, check_args, (x, w_q, w_scale, bias, residual, activation), True)
