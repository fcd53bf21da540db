"""int8 linear: y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

x [M, K] fp16/bf16/fp32 → q_x int8 and s_x fp32, one scale a row; q_w [N, K] int8, K-major (what both tensor-core
operands want); s_w [N] fp32; sums in int32; y in x.dtype. `pyops/ops/int8_linear.py` fixes the rounding.

Two launches: quantize the rows (`quantize.py`), multiply. With few rows K is split over programs, and a third launch
adds up their sums and runs the epilogue, see `matmul.py`. Integer sums are exact, so neither the split nor the order
changes one bit of y.
"""

import torch
import triton
import triton.language as tl

from ..ops.int8_linear import QMAX, SMALLEST_AMAX, unpack_int8
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
from .quantize import K_ALIGNMENT, quantize

# BLOCK_K is 128 bytes or more: one full line of the shared-memory swizzle that wgmma reads without bank conflicts.
# Few rows: bandwidth counts, so long K steps and many stages keep bytes in flight, and narrow N gives more programs.
# Many rows: the tile's arithmetic per byte counts; 128×256 over 8 warps leaves each thread 128 accumulators, the most
# that fit in registers beside the operands.
CONFIGS = [
    tile_config(16, 32, 256, 4, 5),
    tile_config(16, 64, 256, 4, 4),
    tile_config(16, 128, 128, 4, 4),
    tile_config(32, 64, 256, 4, 3),
    tile_config(32, 128, 128, 4, 4),
    tile_config(64, 64, 128, 4, 4),
    tile_config(64, 128, 128, 4, 4),
    tile_config(64, 256, 128, 8, 3),
    tile_config(128, 128, 128, 4, 3),
    tile_config(128, 128, 128, 8, 4),
    tile_config(128, 256, 128, 8, 3),
]


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    Their row tile is no taller than M rounded up to a power of two, and at least half of it (128 rows serve any larger
    M); their stages fit in shared memory (Ampere keeps one stage less there than counted here); where the rows
    of y do not start on 16 elements, no thread holds more than 64 accumulators: one store for each element needs so
    many addresses that a larger tile spills.
    """
    _, shared_bytes = device_limits(named_args["q_ptr"].device.index)
    rows = min(max(named_args["M_BUCKET"], 16), 128)
    most_accumulators = 64 if named_args["N"] % 16 else 128

    def suits(config: triton.Config) -> bool:
        block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return (
            block_m <= rows <= 2 * block_m
            and config.num_stages * (block_m + block_n) * block_k <= shared_bytes
            and block_m * block_n <= 32 * config.num_warps * most_accumulators
        )

    return [config for config in configs if suits(config)]


# -------------------------------------------------------------------------------------------------------------- kernel


@triton.autotune(
    configs=CONFIGS,
    key=["M_BUCKET", "N", "K", "SPLIT_K"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=bench,
    cache_results=True,
)
@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "M_BUCKET"])
def _int8_linear_kernel(
    q_ptr,  # [M, K] int8
    w_ptr,  # [N, K] int8
    s_x_ptr,  # [M] fp32, or None with a split
    s_w_ptr,  # [N] fp32, or None with a split
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] any strides, or None
    out_ptr,  # [M, N]; with a split int32 [SPLIT_K, M, N], and no epilogue here
    M,
    N,
    K,
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
    first_m, first_n = first_of_tile(M, N, BLOCK_M, BLOCK_N)

    split, k_begin, k_end = split_of_k(K, BLOCK_K, SPLIT_K)
    # Within a tile, 256 rows of at most 132 112 bytes stay below 2³¹.
    _, offs_k, q_ptrs, w_ptrs = code_tiles(q_ptr, w_ptr, first_m, first_n, k_begin, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(k_begin, k_end, BLOCK_K):
        q, w = load_codes(q_ptrs, w_ptrs, offs_k, K - k, 0, EVEN_K)
        acc = tl.dot(q, w, acc, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    store_tile(
        acc, s_x_ptr, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N, stride_rm, stride_rn,
        ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launcher


def quantize_rows(
    x: torch.Tensor, x_scale: torch.Tensor | None = None, smooth: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as int8 [M, ⌈K/16⌉·16], zero beyond K, and their fp32 scales [M], as the contract rounds them.

    `x_scale` is None (each row by its own maximum), or fp32 with one element or one for each row; `smooth` None or [K].
    """
    q, s = quantize(x, torch.int8, float(QMAX), SMALLEST_AMAX, x_scale, smooth)
    return q, s[0]


def _aligned_weight(weight: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """q_w [N, ⌈K/16⌉·16], contiguous. Free for a canonical weight with K a multiple of 16, as real models have."""
    if weight.dim() == 3:
        weight = unpack_int8(weight, N, K)  # packed for the CPU: only a weight moved by hand arrives here so
    if K % K_ALIGNMENT:
        return torch.nn.functional.pad(weight, (0, -K % K_ALIGNMENT))
    weight = weight.contiguous()
    return weight if weight.data_ptr() % K_ALIGNMENT == 0 else weight.clone()


def int8_linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, K] int8, or packed for the CPU (slow: unpacked at every call)
    w_scale: torch.Tensor,  # [N] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [..., N]
    activation: str = "none",
    x_scale: torch.Tensor | None = None,  # one element, or one for each row
    smooth: torch.Tensor | None = None,  # [K] fp32
) -> torch.Tensor:
    """The op `pyops::int8_linear` on CUDA; its contract has checked the arguments.

    The first call with a new (M rounded up to a power of two, N, K) tunes and synchronizes; later ones only launch, so
    they can be captured in a CUDA graph.
    """
    N = w_scale.shape[0]
    rows, y, out, bias, residual = flattened(x, N, bias, residual)
    if y.numel() == 0:
        return y
    weight = _aligned_weight(weight, N, x.shape[-1])

    with torch.cuda.device_of(x):
        q, s = quantize_rows(rows, x_scale, smooth)
        M, K = q.shape
        split_k = choose_split(M, N, K, device_limits(x.device.index)[0])
        scales = {"s_x": s, "s_w": w_scale.contiguous()}
        launch(
            _int8_linear_kernel, (q, weight), scales, bias, residual, activation, out, (K,), split_k, sums=torch.int32
        )
    return y
