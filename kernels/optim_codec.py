"""Random bits, stochastic rounding and 8-bit states: `pyops/ops/optim_codec.py` on the device, bit for bit.

x is a tile [rows, 128] fp32, a row a block of 8-bit state. A kernel that uses this is compiled without contraction into
multiply-adds: which of its neighbours a value is rounded to then follows from the same products as in the reference.
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
ONE_BITS = tl.constexpr(0x3F800000)
CUT_BITS = tl.constexpr(19)
LARGEST_UNSIGNED = tl.constexpr(2.0**15 * 1.9375 - 1)
LARGEST_SIGNED = tl.constexpr(2.0**7 * 1.9375 - 1)


@triton.jit
def mix(x):
    """A permutation of uint32 that looks random: "lowbias32"."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, word, low, high, ODD: tl.constexpr, COUNT: tl.constexpr):
    """uint32 in [0, 2^COUNT) of stream 2·word + ODD for the elements of indices high·2³² + low. All uint32."""
    own = mix(key ^ mix(word + 0x9E3779B9)) ^ mix(high)
    x = low * 0x9E3779B1 + own
    x = (x ^ (x >> 15)) * 0x85EBCA77
    x = x ^ (x >> 16)
    return (x << (32 - COUNT)) >> (32 - COUNT) if ODD else x >> (32 - COUNT)


@triton.jit
def round_to_bf16(x, bits):
    """Up with the probability of what is cut off; NaN and Inf stay."""
    raw = x.to(tl.int32, bitcast=True)
    rounded = ((raw + bits.to(tl.int32)) & -0x10000).to(tl.float32, bitcast=True)
    finite = (raw & 0x7FFFFFFF) < INFINITY_BITS
    return tl.where(finite, rounded, x).to(tl.bfloat16)


@triton.jit
def dequantize(codes, scale):
    """Codes and the scales [rows] of their blocks → fp32."""
    c = codes.to(tl.int32)
    y = ((tl.abs(c) << CUT_BITS) + ONE_BITS).to(tl.float32, bitcast=True)
    s = scale * (1 / LARGEST_UNSIGNED if codes.dtype == tl.uint8 else 1 / LARGEST_SIGNED)
    x = (y - 1) * s[:, None]
    return tl.where(c < 0, -x, x)


@triton.jit
def quantize(x, bits, UNSIGNED: tl.constexpr):
    """fp32 → codes and the scales [rows]; elements behind the end of a slice have to be 0; `bits` are CUT_BITS each.

    The bits of |x| order as |x| does, Inf above every number and NaN above Inf: one integer maximum finds both the
    largest magnitude and the blocks that are not finite.
    """
    LARGEST: tl.constexpr = (LARGEST_UNSIGNED if UNSIGNED else LARGEST_SIGNED) * (1 - 2.0**-22)
    magnitude = tl.abs(x)
    top = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1)
    finite = top < INFINITY_BITS
    scale = top.to(tl.float32, bitcast=True)
    multiplier = tl.div_rn(tl.full(scale.shape, LARGEST, tl.float32), scale)
    usable = finite & (multiplier < 3e38)
    y = 1 + tl.where(usable[:, None], magnitude * multiplier[:, None], 0.0)
    c = (y.to(tl.int32, bitcast=True) + bits.to(tl.int32) - ONE_BITS) >> CUT_BITS
    c = tl.where(x > 0, tl.maximum(c, 1), c) if UNSIGNED else tl.where(x < 0, -c, c)
    codes = tl.where(usable[:, None], c, 0).to(tl.uint8 if UNSIGNED else tl.int8)
    return codes, tl.where(finite, tl.where(usable, scale, 0.0), float("nan"))
