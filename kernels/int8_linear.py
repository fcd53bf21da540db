"""int8 linear: y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])

x [M, K] fp16/bf16/fp32 → q_x int8 and s_x fp32, one scale a row; q_w [N, K] int8, K-major (what both tensor-core
operands want); s_w [N] fp32; sums in int32; y in x.dtype. `pyops/ops/int8_linear.py` fixes the rounding.

Two launches: quantize the rows, multiply. Up to SPLIT_M rows there are too few output tiles to fill the device and the
weight is what has to be read, so several programs share the K of one tile: each writes its int32 sums to a workspace
and a third launch adds them up and runs the epilogue. Integer sums are exact, so neither the split nor the order
changes one bit of y. A workspace was chosen over atomic adds because it needs no zeroing and no counters.
"""

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

from ..ops.int8_linear import unpack_int8
from .epilogue import epilogue

SPLIT_M = 64
"""Up to this many rows, K may be split over programs."""
MAX_SPLIT_K = 16
MIN_SPLIT_SPAN = 512
"""No program gets fewer k than this in a split: a shorter loop never fills its pipeline."""
ROW_IN_REGISTERS = 16384
"""Longest row that one program quantizes in a single read: 32 values a thread with 16 warps."""
QUANTIZE_TILE = 4096
"""Elements in one step of the row quantization: 32 a thread with 4 warps."""
K_ALIGNMENT = 16
"""Rows of q_x and q_w start on 16-byte boundaries, so that every tile is copied 16 bytes at a time."""

GROUP_M = tl.constexpr(8)
"""Programs run down 8 row tiles before the next column of tiles, so that what they share stays in L2."""
ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³. In fp32, v + ROUND has no fraction bits left: the addition rounds v to an integer, ties to even."""
INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST_AMAX = tl.constexpr(2.0**-119)


def _config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> triton.Config:
    """A tile. Its epilogue takes STORE_N columns at a time: 16 accumulators a thread, but no less than 64-byte rows.

    Finished all at once, a wide tile with its residual, its scales and their addresses would spill registers.
    """
    store_n = min(block_n, max(32, 16 * 32 * warps // block_m))
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STORE_N": store_n}
    return triton.Config(tile, num_warps=warps, num_stages=stages)


# BLOCK_K is 128 bytes or more: one full line of the shared-memory swizzle that wgmma reads without bank conflicts.
# Few rows: bandwidth counts, so long K steps and many stages keep bytes in flight, and narrow N gives more programs.
# Many rows: the tile's arithmetic per byte counts; 128×256 over 8 warps leaves each thread 128 accumulators, the most
# that fit in registers beside the operands.
CONFIGS = [
    _config(16, 32, 256, 4, 5),
    _config(16, 64, 256, 4, 4),
    _config(16, 128, 128, 4, 4),
    _config(32, 64, 256, 4, 3),
    _config(32, 128, 128, 4, 4),
    _config(64, 64, 128, 4, 4),
    _config(64, 128, 128, 4, 4),
    _config(64, 256, 128, 8, 3),
    _config(128, 128, 128, 4, 3),
    _config(128, 128, 128, 8, 4),
    _config(128, 256, 128, 8, 3),
]


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    Their row tile is no taller than M rounded up to a power of two, and at least half of it (128 rows serve any larger
    M); their stages fit in shared memory (Ampere keeps one stage less there than counted here); where the rows
    of y do not start on 16 elements, no thread holds more than 64 accumulators: one store for each element needs so
    many addresses that a larger tile spills.
    """
    _, shared_bytes = _device_limits(named_args["q_ptr"].device.index)
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


def _bench(call, quantiles):
    """Time a config in about 30 ms: tuning a new shape takes under half a second of device time.

    The interpreter has no time to measure; there every config is as good as the first, which runs afterwards anyway.
    """
    if knobs.runtime.interpret:
        return [0.0, 0.0, 0.0]
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _magnitude_bits(x):
    """The bits of |x| as int32: they order as |x| does, Inf above every number and NaN above Inf.

    One integer maximum thus finds both the largest magnitude and a row that is not finite; a floating maximum would
    drop NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _round_to_int8(x, inverse, finite):
    """clamp(round(x · inverse), ±127) as int8, ties to even; 0 where not finite.

    The clamp stands between the product and the addition that rounds it, so that no compiler can contract the two into
    a multiply-add, which would round once where the contract rounds twice. The low byte of the sum is the integer.
    """
    v = tl.clamp(x * inverse, -127.0, 127.0)
    q = (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.where(finite, q, 0)


@triton.jit
def _store_tile(
    acc,  # [BLOCK_M, BLOCK_N] int32, whose corner is (first_m, first_n)
    s_x_ptr,
    s_w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    first_m,
    first_n,
    split,
    M,
    N,
    stride_rm,
    stride_rn,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORE_N: tl.constexpr,
):
    """Store the sums themselves with a split, else the finished outputs; STORE_N columns at a time."""
    if BLOCK_N > STORE_N:
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        _store_tile(
            left, s_x_ptr, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N,
            stride_rm, stride_rn, ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N // 2, STORE_N,
        )  # fmt: skip
        _store_tile(
            right, s_x_ptr, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n + BLOCK_N // 2, split, M, N,
            stride_rm, stride_rn, ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N // 2, STORE_N,
        )  # fmt: skip
        return
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    offs_out = rows * N + offs_n[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptr + split.to(tl.int64) * M * N + offs_out, acc, mask=mask)
    else:
        s_x = tl.load(s_x_ptr + offs_m, mask=mask_m, other=0.0)
        s_w = tl.load(s_w_ptr + offs_n, mask=mask_n, other=0.0)
        y = epilogue(
            acc,
            s_x[:, None] * s_w[None, :],
            bias_ptr,
            offs_n[None, :],
            mask_n[None, :],
            residual_ptr,
            rows * stride_rm + offs_n.to(tl.int64)[None, :] * stride_rn,
            mask,
            ACTIVATION,
        )
        tl.store(out_ptr + offs_out, y.to(out_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["M"])
def _quantize_rows_kernel(
    x_ptr,  # [M, K] fp32/bf16/fp16, rows contiguous
    x_scale_ptr,  # fp32, one or [M], or None
    q_ptr,  # [M, K_padded] int8
    s_ptr,  # [M] fp32
    M,
    K,
    K_padded,
    stride_xm,
    stride_scale,  # 0 for one scale, 1 for one a row
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # BLOCK_K covers the row: read it once
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    q_ptrs = q_ptr + offs_m[:, None] * K_padded + offs_k[None, :]

    if IN_REGISTERS:
        mask = mask_m[:, None] & (offs_k[None, :] < K)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        top = _magnitude_bits(x)
    else:
        top = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.int32)
        for k in range(0, K, BLOCK_K):
            mask = mask_m[:, None] & (offs_k[None, :] < K - k)
            top = tl.maximum(top, _magnitude_bits(tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)))
    amax_bits = tl.max(top, axis=1)
    finite = amax_bits < INFINITY_BITS

    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + offs_m * stride_scale, mask=mask_m, other=1.0)
        inverse = tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), scale)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        usable = finite & (amax >= SMALLEST_AMAX)
        amax = tl.where(usable, amax, 1.0)
        qmax = tl.full((BLOCK_M,), 127.0, tl.float32)
        scale = tl.where(usable, tl.div_rn(amax, qmax), 0.0)
        inverse = tl.where(usable, tl.div_rn(qmax, amax), 0.0)
    tl.store(s_ptr + offs_m, tl.where(finite, scale, float("nan")), mask=mask_m)

    if IN_REGISTERS:
        q = _round_to_int8(x, inverse[:, None], finite[:, None])
        tl.store(q_ptrs, q, mask=mask_m[:, None] & (offs_k[None, :] < K_padded))
    else:
        for k in range(0, K_padded, BLOCK_K):
            mask = mask_m[:, None] & (offs_k[None, :] < K - k)
            x = tl.load(x_ptrs + k, mask=mask, other=0.0).to(tl.float32)
            q = _round_to_int8(x, inverse[:, None], finite[:, None])
            tl.store(q_ptrs + k, q, mask=mask_m[:, None] & (offs_k[None, :] < K_padded - k))


@triton.autotune(
    configs=CONFIGS,
    key=["M_BUCKET", "N", "K", "SPLIT_K"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=_bench,
    cache_results=True,
)
@triton.heuristics({"EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "M_BUCKET"])
def _int8_linear_kernel(
    q_ptr,  # [M, K] int8
    w_ptr,  # [N, K] int8
    s_x_ptr,  # [M] fp32
    s_w_ptr,  # [N] fp32
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
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + in_group % group_m) * BLOCK_M
    first_n = (in_group // group_m) * BLOCK_N

    # Split boundaries fall on whole K steps, so only the last step of the last program can be partial.
    split = tl.program_id(1)
    span = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K
    k_begin = split * span
    k_end = tl.minimum(k_begin + span, K)

    # Rows beyond the edge read the last row again: that needs no mask, and their results are not stored. The tile's
    # base is a 64-bit scalar; within a tile, 256 rows of at most 132 112 bytes stay below 2³¹.
    tile_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    tile_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    offs_k = tl.arange(0, BLOCK_K)
    q_ptrs = q_ptr + (first_m.to(tl.int64) * K + k_begin) + (tile_m[:, None] * K + offs_k[None, :])
    w_ptrs = w_ptr + (first_n.to(tl.int64) * K + k_begin) + (tile_n[None, :] * K + offs_k[:, None])

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            q = tl.load(q_ptrs)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs)  # [BLOCK_K, BLOCK_N], K-major in memory
        else:
            q = tl.load(q_ptrs, mask=offs_k[None, :] < K - k, other=0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0)
        acc = tl.dot(q, w, acc, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    _store_tile(
        acc, s_x_ptr, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N, stride_rm, stride_rn,
        ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _reduce_kernel(
    partial_ptr,  # [SPLIT_K, M, N] int32
    s_x_ptr,  # [M] fp32
    s_w_ptr,  # [N] fp32
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] any strides, or None
    y_ptr,  # [M, N]
    M,
    N,
    stride_rm,
    stride_rn,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    offs_out = row * N + offs_n
    acc = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + offs_out, mask=mask, other=0)
        partial_ptr += M * N
    scale = tl.load(s_x_ptr + row) * tl.load(s_w_ptr + offs_n, mask=mask, other=0.0)
    offs_residual = row * stride_rm + offs_n.to(tl.int64) * stride_rn
    y = epilogue(acc, scale, bias_ptr, offs_n, mask, residual_ptr, offs_residual, mask, ACTIVATION)
    tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launcher


@functools.cache
def _device_limits(index: int | None) -> tuple[int, int]:
    """(multiprocessors, shared-memory bytes of one program) of a device; an H100's where there is none to ask."""
    if knobs.runtime.interpret:
        return 132, 232448
    properties = triton.runtime.driver.active.utils.get_device_properties(index or 0)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def _choose_split(M: int, N: int, K: int, multiprocessors: int) -> int:
    """How many programs share the K of one output tile: a power of two that gives each multiprocessor about two."""
    if M > SPLIT_M:
        return 1
    most = min(2 * multiprocessors // triton.cdiv(N, 64), K // MIN_SPLIT_SPAN, MAX_SPLIT_K)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


def quantize_rows(x: torch.Tensor, x_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as int8 [M, ⌈K/16⌉·16], zero beyond K, and their fp32 scales [M], as the contract rounds them.

    `x_scale` is None (each row by its own maximum), or fp32 with one element or one for each row.
    """
    M, K = x.shape
    if x.stride(1) != 1 and K > 1:
        x = x.contiguous()
    if x_scale is not None:
        x_scale = x_scale.reshape(-1).contiguous()
    K_padded = triton.cdiv(K, K_ALIGNMENT) * K_ALIGNMENT
    q = torch.empty((M, K_padded), dtype=torch.int8, device=x.device)
    s = torch.empty(M, dtype=torch.float32, device=x.device)
    in_registers = K_padded <= ROW_IN_REGISTERS
    BLOCK_K = triton.next_power_of_2(max(K_padded, K_ALIGNMENT)) if in_registers else QUANTIZE_TILE
    BLOCK_M = min(max(QUANTIZE_TILE // BLOCK_K, 1), triton.next_power_of_2(M))
    _quantize_rows_kernel[(triton.cdiv(M, BLOCK_M),)](
        x,
        x_scale,
        q,
        s,
        M,
        K,
        K_padded,
        x.stride(0),
        0 if x_scale is None or x_scale.numel() == 1 else 1,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        IN_REGISTERS=in_registers,
        num_warps=max(BLOCK_K // 1024, 4),
    )
    return q, s


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
) -> torch.Tensor:
    """The op `pyops::int8_linear` on CUDA; its contract has checked the arguments.

    The first call with a new (M rounded up to a power of two, N, K) tunes and synchronizes; later ones only launch, so
    they can be captured in a CUDA graph.
    """
    N, K = w_scale.shape[0], x.shape[-1]
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    M = y.numel() // N
    weight = _aligned_weight(weight, N, K)
    w_scale = w_scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.reshape(M, N)
    stride_rm, stride_rn = (0, 0) if residual is None else residual.stride()

    with torch.cuda.device_of(x):
        q, s = quantize_rows(x.reshape(M, K), x_scale)
        K = q.shape[1]
        split_k = _choose_split(M, N, K, _device_limits(x.device.index)[0])
        bucket = min(max(triton.next_power_of_2(M), 16), 4096)

        def grid(meta):
            return triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]), split_k

        if split_k == 1:
            _int8_linear_kernel[grid](
                q, weight, s, w_scale, bias, residual, y, M, N, K, stride_rm, stride_rn, bucket, activation, 1
            )
            return y
        partial = torch.empty((split_k, M, N), dtype=torch.int32, device=x.device)
        _int8_linear_kernel[grid](q, weight, None, None, None, None, partial, M, N, K, 0, 0, bucket, "none", split_k)
        BLOCK_N = min(triton.next_power_of_2(N), 1024)
        _reduce_kernel[(M, triton.cdiv(N, BLOCK_N))](
            partial, s, w_scale, bias, residual, y, M, N, stride_rm, stride_rn, activation, split_k, BLOCK_N=BLOCK_N
        )
    return y
