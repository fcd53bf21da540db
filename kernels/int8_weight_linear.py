"""int8 weight-only linear: y[m, n] = act(s_w[n] · Σ_k x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

x [M, K] fp16/bf16/fp32 as it is; q_w [N, K] int8; s_w [N] fp32; sums in fp32; y in x.dtype.
`pyops/ops/int8_weight_linear.py` is the contract.

Every int8 is exact in x's dtype, so fused nothing is rounded but the sums: the scale belongs to an output channel and
waits for the epilogue. The weights are the *left* operand, yᵀ = w · xᵀ, as in int4_linear: tensor cores take it from
registers, where it was converted, and its rows are output channels, of which there are always enough. Beyond the rows
that are fused (`weight_only.plan`) s_w · q_w, rounded once to x's dtype, goes to the dense GEMM.

How four weights come out of a word. Bytes would be copied 8 at a time into wgmma's operand, words are 16. With its sign
bit flipped, a byte is the lowest bits of an fp16 number, 1024 + 128 + q; two are made at once and nothing is converted.
A bf16 number has room for seven bits: 128 + (q & 127), and what is to be subtracted, 128 or 256 with the sign, is made
of the sign bit in the same way.
"""

import torch
import triton
import triton.language as tl

from .int8_linear import _aligned_weight
from .matmul import (
    bench,
    device_limits,
    first_of_tile,
    flattened,
    launch,
    reduce_sums,
    split_of_k,
    store_tile,
    tile_config,
)
from .quantize import K_ALIGNMENT
from .weight_only import aligned_rows, dense, load_words, plan, tallest, word_tiles

DEQUANTIZE_K = 256
DEQUANTIZE_N = 16

FLIP = tl.constexpr(-0x7F7F7F80)
"""0x80808080 as an int32."""

# Few rows: a step's weights are BLOCK_N · BLOCK_K bytes, of which 16 to 24 KiB a multiprocessor have to be on their way
# to keep HBM busy, from two programs. BLOCK_N is 64 for each warpgroup, the height of wgmma. Many rows: 64 accumulators
# a thread leave registers for the converted weights.
# fp32 is multiplied by FMAs, where every row costs an instruction a weight: hence a tile of 4, and 32 output channels,
# which also keeps Blackwell's tensor cores (in TF32) away.
CONFIGS = [
    tile_config(4, 32, 128, 2, 4),
    tile_config(16, 32, 64, 4, 4),
    tile_config(64, 32, 64, 4, 4),
    tile_config(16, 64, 128, 4, 4),
    tile_config(16, 128, 128, 8, 4),
    tile_config(32, 64, 128, 4, 4),
    tile_config(64, 64, 128, 4, 4),
    tile_config(64, 128, 128, 8, 3),
    tile_config(128, 128, 128, 8, 3),
]


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    They are for x's dtype and their stages fit in shared memory. Tiles are no taller than M rounded up to a power of
    two; of those left, the tallest and those of half its height.
    """
    _, shared_bytes = device_limits(named_args["x_ptr"].device.index)
    dtype = named_args["x_ptr"].dtype
    rows = max(named_args["M_BUCKET"], 4 if dtype == torch.float32 else 16)

    def suits(config: triton.Config) -> bool:
        block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return (
            (block_n == 32) == (dtype == torch.float32)
            and block_m <= rows
            and config.num_stages * block_k * (block_m * dtype.itemsize + block_n) <= shared_bytes
        )

    return tallest([config for config in configs if suits(config)])


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _half(
    pair,  # int32: two 16-bit numbers
    HIGH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The low or the high one."""
    return ((pair >> 16) if HIGH else pair).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _byte(
    v,  # int32
    J: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Byte J of each word as a number of DTYPE, exact. Of 16-bit types J and J + 2 are halves of one word."""
    if DTYPE.is_fp16():
        pair = ((v ^ FLIP) >> (8 * (J % 2))) & 0x00FF00FF | 0x64006400
        return _half(pair, J >= 2, DTYPE) - 1152.0
    elif DTYPE.is_bf16():
        v = v >> (8 * (J % 2))
        return _half(v & 0x007F007F | 0x43004300, J >= 2, DTYPE) - _half(v & 0x00800080 | 0x43004300, J >= 2, DTYPE)
    else:
        tl.static_assert(DTYPE.is_fp32())
        return (((v ^ FLIP) >> (8 * J)) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # 2²³ + 128


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.autotune(
    configs=CONFIGS,
    key=["M_BUCKET", "N", "K_UNITS", "SPLIT_K"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=bench,
    cache_results=True,
)
@triton.heuristics({"EVEN_K": lambda args: 16 * args["K_UNITS"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "M_BUCKET"])
def _int8_weight_linear_kernel(
    x_ptr,  # [M, K] fp16/bf16/fp32, rows contiguous
    w_ptr,  # [N, K / 4] int32
    s_w_ptr,  # [N] fp32, or None with a split
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] any strides, or None
    out_ptr,  # [M, N]; with a split fp32 [SPLIT_K, M, N], and no epilogue here
    M,
    N,
    K_UNITS,  # K / 16: rows of the weight are so many times 16 bytes, which the compiler must know to copy 16 at a time
    stride_xm,
    stride_rm,
    stride_rn,
    M_BUCKET,  # only read by the autotuner
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    K = 16 * K_UNITS
    WORDS = 4 * K_UNITS  # in a row of the weight
    first_m, first_n = first_of_tile(M, N, BLOCK_M, BLOCK_N)

    split, k_begin, k_end = split_of_k(K, BLOCK_K, SPLIT_K)
    # Within a tile, 128 rows of at most 33 028 words stay below 2³¹.
    _, offs_k, offs_v, mask_m, x_ptrs, w_ptrs = word_tiles(
        x_ptr, w_ptr, first_m, first_n, k_begin, M, N, stride_xm, WORDS, 4, BLOCK_M, BLOCK_N, BLOCK_K
    )

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        x, v = load_words(x_ptrs, w_ptrs, mask_m, offs_k, offs_v, K - k, WORDS - k // 4, EVEN_K)
        w02 = tl.join(_byte(v, 0, DTYPE), _byte(v, 2, DTYPE))
        w13 = tl.join(_byte(v, 1, DTYPE), _byte(v, 3, DTYPE))
        w = tl.join(w02, w13).reshape(BLOCK_N, BLOCK_K)  # the last axes are 2 and 1 of the byte: in order of k
        acc = tl.dot(w, x, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // 4

    store_tile(
        acc.T, None, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N, stride_rm, stride_rn,
        ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _dequantize_rows_kernel(
    w_ptr,  # [N, K] int8
    s_w_ptr,  # [N] fp32
    out_ptr,  # [N, K] fp16/bf16/fp32
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offs = offs_n[:, None] * K + offs_k[None, :]
    s = tl.load(s_w_ptr + offs_n, mask=offs_n < N, other=0.0)
    w = tl.load(w_ptr + offs, mask=mask, other=0).to(tl.float32) * s[:, None]
    tl.store(out_ptr + offs, w.to(out_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launcher


def dequantize(
    weight: torch.Tensor,  # [N, K] int8
    w_scale: torch.Tensor,  # [N] fp32
    out: torch.Tensor,  # [N, K]
) -> None:
    """out = s_w · q_w, rounded once to out's dtype. All are contiguous."""
    N, K = out.shape
    grid = triton.cdiv(N, DEQUANTIZE_N), triton.cdiv(K, DEQUANTIZE_K)
    _dequantize_rows_kernel[grid](weight, w_scale, out, N, K, BLOCK_N=DEQUANTIZE_N, BLOCK_K=DEQUANTIZE_K)


def int8_weight_linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] int8, or packed for the CPU (slow: unpacked at every call)
    w_scale: torch.Tensor,  # [N] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
) -> torch.Tensor:
    """The op `pyops::int8_weight_linear` on CUDA; its contract has checked the arguments.

    The first call with a new (M rounded up to a power of two, N, K) tunes and synchronizes; later ones only launch, so
    they can be captured in a CUDA graph.
    """
    N, K = w_scale.shape[0], x.shape[-1]
    rows, y, out, bias, residual = flattened(x, N, bias, residual)
    if y.numel() == 0:
        return y

    with torch.cuda.device_of(x):
        if K == 0:
            reduce_sums(torch.zeros_like(out)[None], out, bias=bias, residual=residual, activation=activation)
            return y
        weight, w_scale = _aligned_weight(weight, N, K), w_scale.contiguous()
        rows = aligned_rows(rows, K_ALIGNMENT)
        M, K = rows.shape
        way = plan(M, N, K, x.dtype, device_limits(x.device.index)[0])
        if not way.fused:
            dense(rows, lambda own, w: dequantize(weight[own], w_scale[own], w), bias, residual, activation, out)
            return y
        launch(
            _int8_weight_linear_kernel, (rows, weight.view(torch.int32)), {"s_w": w_scale}, bias, residual, activation,
            out, (K // K_ALIGNMENT, rows.stride(0)), way.split_k, least_bucket=4,
        )  # fmt: skip
    return y
