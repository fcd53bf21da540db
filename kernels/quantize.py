"""Rows of x as 8-bit codes and fp32 scales: the first launch of int8_linear and of fp8_linear.

    scale[m] = amax / largest,   code[m, k] = round(clamp(x[m, k] · (largest / amax), ±largest))

to int8 or e4m3, ties to even, where amax is the largest magnitude of the row, or of 128 of its columns; with a static
x_scale, scale = x_scale and 1 / x_scale is multiplied by. The contracts of the two ops fix every rounding.
"""

import torch
import triton
import triton.language as tl

ROW_IN_REGISTERS = 16384
"""Longest row that one program quantizes in a single read: 32 values a thread with 16 warps."""
QUANTIZE_TILE = 4096
"""Elements in one step of the row quantization: 32 a thread with 4 warps."""
K_ALIGNMENT = 16
"""Rows of codes start on 16-byte boundaries, so that every tile is copied 16 bytes at a time."""

ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³. In fp32, v + ROUND has no fraction bits left: the addition rounds v to an integer, ties to even."""
INFINITY_BITS = tl.constexpr(0x7F800000)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _magnitude_bits(x):
    """The bits of |x| as int32: they order as |x| does, Inf above every number and NaN above Inf.

    One integer maximum thus finds both the largest magnitude and a row that is not finite; a floating maximum would
    drop NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _encode(
    x,
    inverse,
    finite,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
):
    """clamp(x · inverse, ±LARGEST) rounded to a CODE, ties to even; 0 where not finite.

    The clamp stands between the product and the addition that rounds it to an integer, so that no compiler can contract
    the two into a multiply-add, which would round once where the contract rounds twice. The low byte of that sum is the
    integer.
    """
    v = tl.clamp(x * inverse, -LARGEST, LARGEST)
    if CODE.is_int8():
        return tl.where(finite, (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8), 0)
    else:
        return tl.where(finite, v, 0.0).to(CODE)


@triton.jit
def _load_rows(x_ptrs, smooth_ptr, offs_k, mask_m, K):
    """What is quantized, in fp32: x, or x · (1 / smooth), each rounded. Zeros beyond K."""
    mask_k = offs_k < K
    x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        smooth = tl.load(smooth_ptr + offs_k, mask=mask_k, other=1.0)
        x = x * tl.div_rn(tl.full(smooth.shape, 1.0, tl.float32), smooth)[None, :]
    return x


# -------------------------------------------------------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["M"])
def _quantize_kernel(
    x_ptr,  # [M, K] fp32/bf16/fp16, rows contiguous
    x_scale_ptr,  # fp32, one or [M], or None
    smooth_ptr,  # [K] fp32, or None
    c_ptr,  # [M, K_padded] int8 or e4m3
    s_ptr,  # [groups, M] fp32
    M,
    K,
    K_padded,
    stride_xm,
    stride_scale,  # 0 for one scale, 1 for one a row
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # BLOCK_K covers all that shares a scale: read it once
):
    CODE: tl.constexpr = c_ptr.dtype.element_ty
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    offs_k = group * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    c_ptrs = c_ptr + offs_m[:, None] * K_padded + offs_k[None, :]

    # The largest magnitudes say what is not finite, and without a static scale what the scale is. With one, a row that
    # is read in pieces is quantized at the same time.
    if IN_REGISTERS:
        x = _load_rows(x_ptrs, smooth_ptr, offs_k, mask_m, K)  # [BLOCK_M, BLOCK_K]
        top = _magnitude_bits(x)
    else:
        top = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + offs_m * stride_scale, mask=mask_m, other=1.0)
        inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), scale)
        if not IN_REGISTERS:
            for k in range(0, K_padded, BLOCK_K):
                x = _load_rows(x_ptrs + k, smooth_ptr, offs_k + k, mask_m, K)
                top = tl.maximum(top, _magnitude_bits(x))
                codes = _encode(x, inverse[:, None], mask_m[:, None], LARGEST, CODE)
                tl.store(c_ptrs + k, codes, mask=mask_m[:, None] & (offs_k[None, :] < K_padded - k))
    elif not IN_REGISTERS:
        for k in range(0, K, BLOCK_K):
            top = tl.maximum(top, _magnitude_bits(_load_rows(x_ptrs + k, smooth_ptr, offs_k + k, mask_m, K)))
    amax_bits = tl.max(top, axis=1)
    finite = amax_bits < INFINITY_BITS
    if x_scale_ptr is None:
        amax = amax_bits.to(tl.float32, bitcast=True)
        usable = finite & (amax >= SMALLEST_AMAX)
        amax = tl.where(usable, amax, 1.0)
        largest = tl.full((BLOCK_M,), LARGEST, tl.float32)
        scale = tl.where(usable, tl.div_rn(amax, largest), 0.0)
        inverse = tl.where(usable, tl.div_rn(largest, amax), 0.0)
    tl.store(s_ptr + group.to(tl.int64) * M + offs_m, tl.where(finite, scale, float("nan")), mask=mask_m)

    if IN_REGISTERS:
        codes = _encode(x, inverse[:, None], finite[:, None], LARGEST, CODE)
        tl.store(c_ptrs, codes, mask=mask_m[:, None] & (offs_k[None, :] < K_padded))
    elif x_scale_ptr is None:
        for k in range(0, K_padded, BLOCK_K):
            x = _load_rows(x_ptrs + k, smooth_ptr, offs_k + k, mask_m, K)
            codes = _encode(x, inverse[:, None], finite[:, None], LARGEST, CODE)
            tl.store(c_ptrs + k, codes, mask=mask_m[:, None] & (offs_k[None, :] < K_padded - k))
    else:
        bad = mask_m & (amax_bits >= INFINITY_BITS)
        if tl.max(bad.to(tl.int32), axis=0) > 0:
            zeros = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32).to(CODE)
            for k in range(0, K_padded, BLOCK_K):
                tl.store(c_ptrs + k, zeros, mask=bad[:, None] & (offs_k[None, :] < K_padded - k))


# ------------------------------------------------------------------------------------------------------------ launcher


def quantize(
    x: torch.Tensor,  # [M, K]
    dtype: torch.dtype,
    largest: float,
    smallest_amax: float,
    x_scale: torch.Tensor | None = None,
    smooth: torch.Tensor | None = None,
    group: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [M, ⌈K/16⌉·16], 0 beyond K; fp32 scales [groups, M]), one group without `group`, else ⌈K/group⌉.

    `x_scale` is None (by its own maxima), or fp32 with one element or one for each row; `smooth` None or [K]; `group` a
    power of two. With M innermost, a tile of a matmul reads the scales of its rows at once.
    """
    M, K = x.shape
    if x.stride(1) != 1 and K > 1:
        x = x.contiguous()
    if x_scale is not None:
        x_scale = x_scale.reshape(-1).contiguous()
    if smooth is not None:
        smooth = smooth.contiguous()
    K_padded = triton.cdiv(K, K_ALIGNMENT) * K_ALIGNMENT
    groups = triton.cdiv(K, group) if group else 1
    codes = torch.empty((M, K_padded), dtype=dtype, device=x.device)
    s = torch.empty((groups, M), dtype=torch.float32, device=x.device)
    if not groups or not M:
        return codes, s
    width = group or triton.next_power_of_2(max(K_padded, K_ALIGNMENT))
    in_registers = bool(group) or width <= ROW_IN_REGISTERS
    BLOCK_K = width if in_registers else QUANTIZE_TILE
    BLOCK_M = min(max(QUANTIZE_TILE // BLOCK_K, 1), triton.next_power_of_2(M))
    _quantize_kernel[(triton.cdiv(M, BLOCK_M), groups)](
        x,
        x_scale,
        smooth,
        codes,
        s,
        M,
        K,
        K_padded,
        x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else 1,
        LARGEST=largest,
        SMALLEST_AMAX=smallest_amax,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        IN_REGISTERS=in_registers,
        num_warps=max(BLOCK_K // 1024, 4),
    )
    return codes, s
