"""Random bits, stochastic rounding and 8-bit states: `pyops/ops/optim_codec.py` on the device, bit for bit.

x is a tile [rows, 128] fp32, a row a block of 8-bit state. A kernel that uses this is compiled without contraction into
multiply-adds: which of its neighbours a value is rounded to then follows from the same products as in the reference.
"""

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def mix(x):
    """A permutation of uint32 that looks random: "lowbias32"."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(key, word, low, high, ODD: tl.constexpr):
    """uint32 in [0, 2¹⁶) of stream 2·word + ODD for the elements of indices high·2³² + low. All uint32."""
    own = mix(key ^ mix(word + 0x9E3779B9)) ^ mix(high)
    x = low * 0x9E3779B1 + own
    x = (x ^ (x >> 15)) * 0x85EBCA77
    x = x ^ (x >> 16)
    return x & 0xFFFF if ODD else x >> 16


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
    c = codes.to(tl.float32)
    s = scale * (1 / 255.0**2 if codes.dtype == tl.uint8 else 1 / 127.0**2)
    return s[:, None] * (c * tl.abs(c))


@triton.jit
def quantize(x, bits, UNSIGNED: tl.constexpr):
    """fp32 → codes and the scales [rows]; elements behind the end of a slice have to be 0.

    The bits of |x| order as |x| does, Inf above every number and NaN above Inf: one integer maximum finds both the
    largest magnitude and the blocks that are not finite. The root need not be exact: where its error moves it over an
    integer, t lies so close to that integer's square that it is rounded there from below as from above.
    """
    LARGEST: tl.constexpr = 255.0 if UNSIGNED else 127.0
    magnitude = tl.abs(x)
    top = tl.max(magnitude.to(tl.int32, bitcast=True), axis=1)
    finite = top < INFINITY_BITS
    scale = top.to(tl.float32, bitcast=True)
    to_square = tl.div_rn(tl.full(scale.shape, LARGEST * LARGEST, tl.float32), scale)
    usable = finite & (to_square < 3e38)
    t = tl.where(usable[:, None], magnitude * to_square[:, None], 0.0)
    c = tl.floor(tl.sqrt(t))
    u = bits.to(tl.float32) * 2.0**-16
    c = tl.minimum(c + (t - c * c > u * (2 * c + 1)).to(tl.float32), LARGEST)
    at_least_1 = tl.where(t > 0, tl.maximum(c, 1.0), 0.0)
    codes = at_least_1.to(tl.uint8) if UNSIGNED else tl.where(x < 0, -c, c).to(tl.int8)
    return codes, tl.where(finite, tl.where(usable, scale, 0.0), float("nan"))
