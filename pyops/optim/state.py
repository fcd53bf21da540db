"""How a parameter's state is held: fp32 (fp64 for fp64 parameters), bf16, or 8 bits with scales."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops.memory import put_on_huge_pages
from pyops.ops import optim_codec as codec
from pyops.optim.distributed import keeps_blocks, like, local, spec_of

SCALE = "_scale"
"""Behind the name of an 8-bit state: its scales."""
MIN_NUMEL = 4096
"""Smaller tensors keep fp32 in 8-bit mode: there is little to save, and biases and norms are the most sensitive."""
MIN_ROW = 32
"""So do tensors with shorter slices along dimension 0, whose scales would outweigh what is saved."""
WIDE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}
"""Dtypes of parameters, and those in which their arithmetic is done and their averages are held."""
CODES = (torch.int8, torch.uint8)


def check_param(p: Tensor, state_dtype: str) -> None:
    """Raise ValueError if p cannot have states in that format."""
    if state_dtype != "float32" and WIDE.get(p.dtype, torch.float32) != torch.float32:
        raise ValueError(f"state_dtype={state_dtype!r} is not for {p.dtype} parameters; allowed: 'float32'")


def stored_dtype(p: Tensor, state_dtype: str, unsigned: bool) -> torch.dtype:
    """The dtype in which a state of p is held."""
    if state_dtype == "bfloat16":
        return torch.bfloat16
    if state_dtype == "int8" and worth_quantizing(p):
        return torch.uint8 if unsigned else torch.int8
    return WIDE[p.dtype]


def worth_quantizing(p: Tensor) -> bool:
    """True if states of p have 8 bits in 8-bit mode."""
    if p.dim() == 0 or p.numel() < MIN_NUMEL or not keeps_blocks(spec_of(p), p.shape):
        return False
    return p.dim() == 1 or p.numel() // p.shape[0] >= MIN_ROW


def make(p: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor | None]:
    """(zeros as state of p, their scales if `dtype` is of 8 bits); placed as p is.

    Of another `shape` than p's, they have their dimensions in memory in p's order.
    """
    if shape is not None and shape != p.shape:
        strides = torch.empty_like(local(p), device="meta").stride()
        order = sorted(range(p.dim()), key=lambda i: (-strides[i], i))
        zeros = torch.zeros([shape[i] for i in order], dtype=dtype, device=p.device)
        return like(zeros.permute([order.index(i) for i in range(p.dim())]), p, shape), None
    if dtype not in CODES:
        zeros = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        put_on_huge_pages(local(zeros))
        return zeros, None
    here = local(p)
    zeros = torch.zeros(here.shape, dtype=dtype, device=p.device)
    put_on_huge_pages(zeros)
    codes = like(zeros, p, p.shape)
    scale = torch.zeros(codec.scale_shape(here.shape), dtype=torch.float32, device=p.device)
    return codes, like(scale, p, codec.scale_shape(p.shape))


def write(state: Tensor, scale: Tensor | None, values: Tensor) -> None:
    """Put local `values` of any floating dtype into `state`, rounded to the nearest."""
    here = local(state)
    if scale is None:
        here.copy_(values)
        return
    bits = torch.full((values.numel(),), codec.NEAREST, device=values.device)
    codes, scales = codec.quantize(values.float(), state.dtype, bits)
    here.copy_(codes)
    local(scale).copy_(scales)


def widened(state: Tensor, scale: Tensor | None) -> Tensor:
    """The values of `state`: fp32, or the state itself if it is as wide. A DTensor of a DTensor."""
    if scale is not None:
        return like(codec.dequantize(local(state), local(scale)), state, state.shape)
    return state.float() if state.dtype in (torch.bfloat16, torch.float16) else state
