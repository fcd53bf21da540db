"""The epilogue that every matmul and convolution shares: y = act(acc · scale + bias + residual), in fp32.

`pyops/ops/epilogue.py` is its definition; this is the same in Triton, included by every kernel that ends in one.
"""

import triton
import triton.language as tl


@triton.jit
def _relu6(z):
    return tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))


@triton.jit
def _tanh(z):
    """tanh(z) to about two units in the last place, without overflow for any z.

    1 - 2 / (exp(2|z|) + 1) goes to 1 when exp overflows, but cancels for small |z|; there the odd minimax polynomial of
    Cephes' tanhf takes over.
    """
    magnitude = tl.abs(z)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    z2 = z * z
    poly = -5.70498872745e-3
    poly = poly * z2 + 2.06390887954e-2
    poly = poly * z2 - 5.37397155531e-2
    poly = poly * z2 + 1.33314422036e-1
    poly = poly * z2 - 3.33332819422e-1
    near = z + z * z2 * poly
    return tl.where(magnitude < 0.625, near, tl.where(z < 0.0, -far, far))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) for an fp32 tensor; NaN stays NaN (a comparison with NaN is false, so `where` lets it through)."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = _relu6(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)): exact in the tails, where 1 + tanh cancels.
        z = z / (1.0 + tl.exp(-1.5957691216057308 * z * (1.0 + 0.044715 * z * z)))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "hardswish":
        z = z * _relu6(z + 3.0) * 0.16666666666666666
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return z


@triton.jit
def epilogue(
    acc,  # [...] int32 or fp32, the sums of one tile
    scale,  # fp32, broadcasts against acc
    bias_ptr,  # [N] any float dtype, or None
    offs_n,  # the output channel of each element, broadcasts against acc
    mask_n,  # which of offs_n exist
    residual_ptr,  # any float dtype, or None
    offs_residual,  # int64 element offsets into residual, the shape of acc
    mask,  # which elements of the tile exist, the shape of acc
    ACTIVATION: tl.constexpr,
):
    """act(acc · scale + bias + residual), fp32 in the shape of `acc`; the caller casts once, on its store."""
    z = acc.to(tl.float32) * scale
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offs_residual, mask=mask, other=0.0).to(tl.float32)
    return activate(z, ACTIVATION)
