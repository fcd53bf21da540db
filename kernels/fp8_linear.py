"""fp8 linear: y[m, n] = act(Σ_k s_x · c_x[m, k] · s_w · c_w[n, k] + bias[n] + residual[m, n]), codes in e4m3

x [M, K] fp16/bf16/fp32 → c_x e4m3 and s_x fp32, one scale a row, or one for each 128 of its columns; c_w [N, K] e4m3,
K-major (what both tensor-core operands want); s_w fp32 [N] or [⌈N/128⌉, ⌈K/128⌉]; sums in fp32; y in x.dtype.
`pyops/ops/fp8_linear.py` fixes the rounding.

Two launches: quantize the rows (`quantize.py`), multiply. With few rows K is split over programs, and a third launch
adds up their sums in order and runs the epilogue, see `matmul.py`. `_plan` says which GEMM multiplies, and why.

Sums on two levels: Hopper's fp8 tensor cores keep about 14 bits of a sum (DeepSeek-V3, section 3.3.2). So every 128 of
K are summed there and added to fp32 accumulators outside. With scales by block that is where they are applied anyway.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from ..ops.epilogue import epilogue_ref
from ..ops.fp8_linear import FP8, LARGEST, SMALLEST_AMAX, dequantize_fp8, quantize_x_ref
from .int8_linear import _aligned_weight
from .matmul import (
    bench,
    choose_split,
    code_tiles,
    device_limits,
    first_of_tile,
    flattened,
    launch,
    load_codes,
    split_of_k,
    store_tile,
    tile_config,
)
from .quantize import quantize

BLOCK = tl.constexpr(128)
"""Columns of x, rows and columns of the weight that share a scale; and how many k a tensor core sums by itself."""

FIRST_FP8 = 89
"""The first compute capability with e4m3 tensor cores and conversions: Ada."""
HOPPER = 90
SCALED_MM_M = 256
"""From here on many full tiles of rows run, and the matmul is bound by the tensor cores."""


# BLOCK_K is 128 bytes or more: one full line of the shared-memory swizzle that wgmma reads without bank conflicts.
# A thread holds at most 64 accumulators, as it holds them twice: the tensor core's, and the fp32 ones outside. The tile
# of 64 × 64 has 8 warps because with 4 ptxas saves registers on sm_100 until it spills.
CONFIGS = [
    tile_config(16, 32, 256, 4, 5),
    tile_config(16, 32, 128, 4, 6),
    tile_config(16, 64, 128, 4, 5),
    tile_config(32, 64, 256, 4, 3),
    tile_config(32, 64, 128, 4, 5),
    tile_config(32, 128, 128, 4, 4),
    tile_config(64, 64, 128, 8, 4),
    tile_config(64, 128, 128, 4, 4),
    tile_config(128, 64, 128, 8, 4),
    tile_config(128, 128, 128, 8, 4),
    tile_config(128, 128, 128, 8, 3),
]


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    Their row tile is no taller than M rounded up to a power of two, and at least half of it (128 rows serve any larger
    M); their stages fit in shared memory. With scales by block a step is one block of K.
    """
    _, shared_bytes = device_limits(named_args["c_ptr"].device.index)
    rows = min(max(named_args["M_BUCKET"], 16), 128)
    by_block = {**named_args, **kwargs}["BY_BLOCK"]

    def suits(config: triton.Config) -> bool:
        block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return (
            block_m <= rows <= 2 * block_m
            and config.num_stages * (block_m + block_n) * block_k <= shared_bytes
            and (block_k == BLOCK.value or not by_block)
        )

    return [config for config in configs if suits(config)]


# -------------------------------------------------------------------------------------------------------------- kernel


@triton.autotune(
    configs=CONFIGS,
    key=["M_BUCKET", "N", "K", "SPLIT_K", "BY_BLOCK"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=bench,
    cache_results=True,
)
@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "M_BUCKET"])
def _fp8_linear_kernel(
    c_ptr,  # [M, K] e4m3
    w_ptr,  # [N, K] e4m3
    s_x_ptr,  # [M] fp32, or None with a split; by block [⌈K/128⌉, M]
    s_w_ptr,  # [N] fp32, or None with a split; by block [⌈N/128⌉, ⌈K/128⌉]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] any strides, or None
    out_ptr,  # [M, N]; with a split fp32 [SPLIT_K, M, N], and no epilogue here
    M,
    N,
    K,
    stride_rm,
    stride_rn,
    M_BUCKET,  # only read by the autotuner
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr,
):
    first_m, first_n = first_of_tile(M, N, BLOCK_M, BLOCK_N)

    split, k_begin, k_end = split_of_k(K, BLOCK_K, SPLIT_K)
    # Within a tile, 128 rows of at most 2²⁴ bytes stay within 2³¹.
    tile_m, offs_k, c_ptrs, w_ptrs = code_tiles(
        c_ptr, w_ptr, first_m, first_n, k_begin, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        c, w = load_codes(c_ptrs, w_ptrs, offs_k, K - k, 0.0, EVEN_K)
        if BY_BLOCK:  # a step is one block of K, and the tile lies in one block of N
            tl.static_assert(BLOCK_K == BLOCK and BLOCK_N <= BLOCK)
            block = k // BLOCK
            s_x = tl.load(s_x_ptr + block.to(tl.int64) * M + first_m + tile_m)
            s_w = tl.load(s_w_ptr + first_n // BLOCK * tl.cdiv(K, BLOCK) + block)
            acc += tl.dot(c, w) * (s_x * s_w)[:, None]
        else:
            acc = tl.dot(c, w, acc, max_num_imprecise_acc=BLOCK)
        c_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    # Scales by block are in the sums already.
    store_tile(
        acc, None if BY_BLOCK else s_x_ptr, None if BY_BLOCK else s_w_ptr, bias_ptr, residual_ptr, out_ptr,
        first_m, first_n, split, M, N, stride_rm, stride_rn, ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launcher


class Plan(NamedTuple):
    """Which GEMM multiplies, and why."""

    gemm: str
    """"triton", "scaled_mm" or "dense"."""
    reason: str


@functools.cache
def _capability(index: int | None) -> int:
    """Of the device, which is current, 90 for Hopper; 0 if it is none of NVIDIA's. The interpreter is a Hopper."""
    if knobs.runtime.interpret:
        return HOPPER
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def _plan(
    capability: int,
    M: int,
    N: int,
    K: int,
    by_block: bool,
    dtype: torch.dtype,
    bias: torch.dtype | None = None,
    residual: bool = False,
    activation: str = "none",
) -> Plan:
    """Which GEMM takes a problem on a device of this compute capability; `bias` is the bias's dtype.

    `torch._scaled_mm` is CUTLASS on Hopper: asynchronous bulk copies by warps of their own feed the tensor cores, which
    Triton's pipeline does not do. It can scale by row, add a bf16 bias and write bf16; where more is asked for, a
    second pass over y would cost what it gains, and with few rows there is nothing to gain.
    """
    if capability < FIRST_FP8:
        return Plan("dense", "no e4m3 on this device: what the codes stand for is multiplied in x's dtype")
    for missing, reason in (
        (capability != HOPPER, "torch._scaled_mm by row is made for Hopper"),
        (by_block, "scales by block"),
        (M < SCALED_MM_M, f"fewer than {SCALED_MM_M} rows"),
        (dtype != torch.bfloat16, "torch._scaled_mm by row writes bf16"),
        (N % 16 or K % 16 or not K, "N or K is no multiple of 16"),
        (bias not in (None, torch.bfloat16), "the bias is not bf16"),
        (residual or activation != "none", "an epilogue with more than a bias"),
    ):
        if missing:
            return Plan("triton", reason)
    return Plan("scaled_mm", "many rows on Hopper, scales by row, nothing but a bias after the sum")


def quantize_x(
    x: torch.Tensor, by_block: bool = False, x_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as codes [M, ⌈K/16⌉·16], 0 beyond K, and fp32 scales [M], or by block [⌈K/128⌉, M].

    As the contract rounds them. `x_scale` is None, or fp32 with one element or one for each row. Scales by block lie
    with M innermost: a tile of the matmul reads those of its rows at once.
    """
    codes, s = quantize(x, FP8, LARGEST, SMALLEST_AMAX, x_scale, group=BLOCK.value if by_block else None)
    return codes, s if by_block else s[0]


def _dense(x, weight, w_scale, bias, residual, activation, x_scale):
    """What the codes stand for, rounded to x's dtype and multiplied in it: for devices without e4m3."""
    K = x.shape[1]
    codes, s = quantize_x_ref(x, "row" if w_scale.dim() == 1 else "block", x_scale)
    s = s[:, None] if s.dim() == 1 else s.repeat_interleave(BLOCK.value, 1)[:, :K]
    x = (codes.float() * s).to(x.dtype)
    z = x @ dequantize_fp8(weight, w_scale, x.dtype).T
    return epilogue_ref(z.float(), bias, residual, activation, x.dtype)


def fp8_linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] e4m3, or its bytes
    w_scale: torch.Tensor,  # [N] or [⌈N/128⌉, ⌈K/128⌉] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
    x_scale: torch.Tensor | None = None,  # one element, or one for each row
) -> torch.Tensor:
    """The op `pyops::fp8_linear` on CUDA; its contract has checked the arguments.

    The first call with a new (M rounded up to a power of two, N, K) tunes and synchronizes; later ones only launch, so
    they can be captured in a CUDA graph.
    """
    weight = weight.view(FP8)
    N, K = weight.shape
    x, y, out, bias, residual = flattened(x, N, bias, residual)
    M = x.shape[0]
    if y.numel() == 0:
        return y
    by_block = w_scale.dim() == 2
    w_scale = w_scale.contiguous()

    with torch.cuda.device_of(x):
        bias_dtype = None if bias is None else bias.dtype
        plan = _plan(
            _capability(x.device.index), M, N, K, by_block, x.dtype, bias_dtype, residual is not None, activation
        )
        if plan.gemm == "dense":
            out.copy_(_dense(x, weight, w_scale, bias, residual, activation, x_scale))
            return y
        weight = _aligned_weight(weight.view(torch.int8), N, K).view(FP8)
        codes, s = quantize_x(x, by_block, x_scale)
        if plan.gemm == "scaled_mm":
            # The second factor is column-major [K, N]: the weight as it lies. Without fast accumulation, see above.
            scales = s[:, None], w_scale[None, :]
            torch._scaled_mm(codes, weight.T, *scales, bias, out_dtype=x.dtype, use_fast_accum=False, out=out)
            return y
        K = codes.shape[1]
        split_k = choose_split(M, N, K, device_limits(x.device.index)[0])
        operands, scales = (codes, weight), {"s_x": s, "s_w": w_scale}
        if by_block:  # they are in the sums already
            operands, scales = (*operands, s, w_scale), {}
        launch(_fp8_linear_kernel, operands, scales, bias, residual, activation, out, (K,), split_k, by_block)
    return y
