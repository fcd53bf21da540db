"""Narrow formats of optimizer state and parameters: 8-bit in blocks, and stochastic rounding.

8-bit state holds one byte an element and one fp32 scale s = max|x| a block of 128 elements, in row-major order within
each slice along dimension 0 (so that sharding by that dimension cuts no block). A code is a float of 4 bits of
mantissa, y(c) = 2^⌊c/16⌋·(1 + (c mod 16)/16), moved so that zero is a value like others: steps are even next to zero,
and further away from 3 to 6 % of the value.

    signed     x = s·sign(c)·(y(|c|) - 1)/247     c ∈ [-127, 127]     (int8)
    unsigned   x = s·(y(c) - 1)/63487             c ∈ [0, 255]        (uint8, of states that are never negative)

To encode, y = 1 + |x|·(247 or 63487)/s is cut to 4 bits of mantissa after 19 random bits were added to those that are
cut. This rounds up with the probability of what is cut off and so keeps the expectation of x: a decay of one part in a
thousand a step is not lost. A positive unsigned x never becomes 0, so that no update divides by a root that vanished. A
block with NaN or Inf gets the scale NaN, one whose largest value is below 2·10⁻³⁴ (unsigned) or 8·10⁻³⁷ the scale 0.

Randomness is a hash of (key, stream, index): the same on every backend, thread count and instruction set, and no memory
is read for it. `mix` is the finalizer "lowbias32" of Chris Wellons' hash prospector; `random_bits` starts from a Weyl
sequence, which needs one multiplication less. Two streams share each word of 32 bits. The index counts elements in the
order of memory if the tensor is dense, else row by row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyops.sizes import ceil_div

BLOCK = 128
"""Elements that share a scale."""
CUT_BITS = 19
"""Of fp32's 23 bits of mantissa, those that 8-bit codes lack."""
NEAREST = 1 << (CUT_BITS - 1)
"""Random bits that make `quantize` round to the nearest."""
ONE_BITS = 0x3F800000
"""Those of 1 in fp32."""
MASK32 = 0xFFFFFFFF


def mix(x: Tensor | int) -> Tensor | int:
    """A permutation of 32-bit integers that looks random; int64 tensors in [0, 2³²)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def word_key(key: int, stream: int) -> int:
    """32 bits that tell the words of a step apart; `key` is below 2³²."""
    return mix((key & MASK32) ^ mix(((stream >> 1) + 0x9E3779B9) & MASK32))


def random_bits(key: int, stream: int, numel: int, device: torch.device | str = "cpu", count: int = 16) -> Tensor:
    """int64 [numel], each uniform in [0, 2^count): the highest bits of its word for an even stream, else the lowest."""
    i = torch.arange(numel, device=device)
    own: Tensor | int = word_key(key, stream)
    if numel > MASK32:
        own = own ^ mix(i >> 32)
    x = (((i & MASK32) * 0x9E3779B1) + own) & MASK32
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & MASK32
    x = x ^ (x >> 16)
    return x & ((1 << count) - 1) if stream & 1 else x >> (32 - count)


def bits_like(x: Tensor, key: int, stream: int) -> Tensor:
    """`random_bits` for every element of x, in its shape."""
    bits = random_bits(key, stream, x.numel(), x.device)
    order = torch.empty_like(x, dtype=torch.int64)  # keeps the strides of dense tensors, else row-major
    order.as_strided((x.numel(),), (1,)).copy_(bits)
    return order


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 → bf16, up with the probability of what is cut off; `bits` of x's shape. NaN and Inf stay."""
    raw = x.view(torch.int32)
    rounded = (raw + bits.to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), rounded.view(torch.float32), x).to(torch.bfloat16)


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a state of `shape`: blocks of 1-D states, (slices, blocks of a slice) of others."""
    if len(shape) < 2:
        return (ceil_div(shape[0] if shape else 1, BLOCK),)
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], ceil_div(rest, BLOCK)


def blocks(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[..., 128] with zeros behind the last element of a slice."""
    rows = x.reshape(shape[0], math.prod(shape[1:])) if len(shape) > 1 else x.reshape(1, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return rows.view(rows.shape[0], rows.shape[1] // BLOCK, BLOCK)


def _unblock(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    numel_of_row = 1
    for size in shape[1:] if len(shape) > 1 else shape:
        numel_of_row *= size
    return values.flatten(1)[:, :numel_of_row].reshape(shape)


def _largest(dtype: torch.dtype) -> float:
    """y - 1 of the largest code."""
    return 2.0**15 * 1.9375 - 1 if dtype == torch.uint8 else 2.0**7 * 1.9375 - 1


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 or uint8 codes and their scales → fp32."""
    c = blocks(codes.int(), codes.shape)
    s = scale.reshape(c.shape[0], c.shape[1], 1) * (1 / _largest(codes.dtype))
    y = ((c.abs() << CUT_BITS) + ONE_BITS).view(torch.float32)
    return _unblock(((y - 1) * s).copysign(c), codes.shape)


def quantize(x: Tensor, dtype: torch.dtype, bits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → (codes of `dtype`, scales); `bits` of CUT_BITS from `random_bits`, an element each."""
    unsigned = dtype == torch.uint8
    values = blocks(x, x.shape)
    scale = values.abs().amax(2, keepdim=True)
    multiplier = _largest(dtype) * (1 - 2.0**-22) / scale  # a little less: no y is rounded to beyond the largest code
    usable = (multiplier < 3e38) & scale.isfinite()
    scale = torch.where(scale.isfinite(), torch.where(usable, scale, 0.0), torch.nan)
    y = 1 + torch.where(usable, values.abs() * multiplier, 0.0)
    rounded = y.view(torch.int32) + blocks(bits.view(x.shape), x.shape).int()
    c = (rounded - ONE_BITS) >> CUT_BITS
    positive = usable & (values > 0)
    c = torch.where(positive, c.clamp(min=1), c) if unsigned else torch.where(values < 0, -c, c)
    return _unblock(torch.where(usable, c, 0), x.shape).to(dtype), scale.view(scale_shape(x.shape))
