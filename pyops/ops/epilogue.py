"""The epilogue that every matmul and convolution shares: y = act(acc · scale + bias + residual).

This is its definition in Python; `csrc/epilogue.h` and `kernels/epilogue.py` are the same in C++ and Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


def epilogue_ref(
    acc: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act(acc + bias + residual) in acc's dtype, fp32 or fp64, rounded once to `out_dtype`; `acc` is already scaled."""
    z = acc
    if bias is not None:
        z = z + bias.to(acc.dtype)
    if residual is not None:
        z = z + residual.to(acc.dtype)
    return ACTIVATIONS[activation](z).to(out_dtype)


def activation_backward(grad: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    """grad · act'(z), in fp32, in fp64 if z is; differentiable in both where autograd is on."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    if activation == "none":
        return grad.to(wide)
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        at = z.to(wide) if twice and z.requires_grad else z.detach().to(wide).requires_grad_()
        return torch.autograd.grad(ACTIVATIONS[activation](at), at, grad.to(wide), create_graph=twice)[0]


def check_activation(activation: str) -> None:
    """Raise ValueError for a name that is not in ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
