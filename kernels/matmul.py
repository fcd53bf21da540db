"""What the quantized matmuls share: how tiles are read and stored, how K is split, and what a device can hold.

Up to SPLIT_M rows there are too few output tiles to fill the device and the weight is what has to be read, so several
programs share the K of one tile: each writes its sums to a workspace [splits, M, N], and `reduce_sums` adds them up, in
order, and runs the epilogue. A workspace was chosen over atomic adds because it needs no zeroing and no counters, and
because the order of the additions is fixed: the result is the same at every run.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton import knobs

from .epilogue import epilogue

SPLIT_M = 64
"""Up to this many rows, K may be split over programs."""
MAX_SPLIT_K = 16
MIN_SPLIT_SPAN = 512
"""No program gets fewer k than this in a split: a shorter loop never fills its pipeline."""

GROUP_M = tl.constexpr(8)
"""Programs run down 8 row tiles before the next column of tiles, so that what they share stays in L2."""


def tile_config(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> triton.Config:
    """A tile. Its epilogue takes STORE_N columns at a time: 16 accumulators a thread, but no less than 64-byte rows.

    Finished all at once, a wide tile with its residual, its scales and their addresses would spill registers.
    """
    store_n = min(block_n, max(32, 16 * 32 * warps // block_m))
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STORE_N": store_n}
    return triton.Config(tile, num_warps=warps, num_stages=stages)


def bench(call, quantiles):
    """Time a config in about 30 ms: tuning a new shape takes under half a second of device time.

    The interpreter has no time to measure; there every config is as good as the first, which runs afterwards anyway.
    """
    if knobs.runtime.interpret:
        return [0.0, 0.0, 0.0]
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


@functools.cache
def device_limits(index: int | None) -> tuple[int, int]:
    """(multiprocessors, shared-memory bytes of one program) of a device; an H100's where there is none to ask."""
    if knobs.runtime.interpret:
        return 132, 232448
    properties = triton.runtime.driver.active.utils.get_device_properties(index or 0)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def choose_split(M: int, N: int, K: int, multiprocessors: int) -> int:
    """How many programs share the K of one output tile: a power of two that gives each multiprocessor about two."""
    if M > SPLIT_M:
        return 1
    most = min(2 * multiprocessors // triton.cdiv(N, 64), K // MIN_SPLIT_SPAN, MAX_SPLIT_K)
    return 1 << (most.bit_length() - 1) if most > 1 else 1


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def first_of_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, first column) of this program's output tile."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    group = tile // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = tile % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + in_group % group_m) * BLOCK_M
    first_n = (in_group // group_m) * BLOCK_N
    return first_m, first_n


@triton.jit
def split_of_k(K, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """(number of this program among those that share its tile, its first k, the one behind its last).

    The boundaries fall on whole K steps, so only the last step of the last program can be partial.
    """
    split = tl.program_id(1)
    span = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K
    k_begin = split * span
    return split, k_begin, tl.minimum(k_begin + span, K)


@triton.jit
def code_tiles(
    c_ptr,  # [M, K], a byte each
    w_ptr,  # [N, K], a byte each
    first_m,
    first_n,
    k_begin,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(rows within the tile [BLOCK_M], k within the step [BLOCK_K], pointers [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]).

    Rows beyond the edge read the last row again: that needs no mask, and their results are not stored. The tile's base
    is a 64-bit scalar; offsets within it have 31 bits.
    """
    tile_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    tile_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    offs_k = tl.arange(0, BLOCK_K)
    c_ptrs = c_ptr + (first_m.to(tl.int64) * K + k_begin) + (tile_m[:, None] * K + offs_k[None, :])
    w_ptrs = w_ptr + (first_n.to(tl.int64) * K + k_begin) + (tile_n[None, :] * K + offs_k[:, None])
    return tile_m, offs_k, c_ptrs, w_ptrs


@triton.jit
def load_codes(c_ptrs, w_ptrs, offs_k, k_left, ZERO: tl.constexpr, EVEN_K: tl.constexpr):
    """A step's [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N], the latter K-major in memory; ZERO beyond K."""
    if EVEN_K:
        c = tl.load(c_ptrs)
        w = tl.load(w_ptrs)
    else:
        c = tl.load(c_ptrs, mask=offs_k[None, :] < k_left, other=ZERO)
        w = tl.load(w_ptrs, mask=offs_k[:, None] < k_left, other=ZERO)
    return c, w


@triton.jit
def store_tile(
    acc,  # [BLOCK_M, BLOCK_N] int32 or fp32, whose corner is (first_m, first_n)
    s_x_ptr,  # [M] fp32, or None
    s_w_ptr,  # [N] fp32, or None
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
        store_tile(
            left, s_x_ptr, s_w_ptr, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N,
            stride_rm, stride_rn, ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N // 2, STORE_N,
        )  # fmt: skip
        store_tile(
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
        scale = 1.0
        if s_x_ptr is not None:
            scale = tl.load(s_x_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if s_w_ptr is not None:
            scale = scale * tl.load(s_w_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        y = epilogue(
            acc,
            scale,
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
def _reduce_kernel(
    partial_ptr,  # [SPLIT_K, M, N] int32 or any float dtype
    s_x_ptr,  # [M] fp32, or None
    s_w_ptr,  # [N] fp32, or None
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
    SUM: tl.constexpr = tl.int32 if partial_ptr.dtype.element_ty == tl.int32 else tl.float32
    acc = tl.zeros((BLOCK_N,), dtype=SUM)
    for _ in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + offs_out, mask=mask, other=0).to(SUM)
        partial_ptr += M * N
    scale = 1.0
    if s_x_ptr is not None:
        scale = tl.load(s_x_ptr + row)
    if s_w_ptr is not None:
        scale = scale * tl.load(s_w_ptr + offs_n, mask=mask, other=0.0)
    offs_residual = row * stride_rm + offs_n.to(tl.int64) * stride_rn
    y = epilogue(acc, scale, bias_ptr, offs_n, mask, residual_ptr, offs_residual, mask, ACTIVATION)
    tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------- launchers


def reduce_sums(
    partial: torch.Tensor,  # [splits, M, N] int32 or any float dtype
    y: torch.Tensor,  # [M, N]; may be `partial` itself where there is one split
    s_x: torch.Tensor | None = None,  # [M] fp32
    s_w: torch.Tensor | None = None,  # [N] fp32
    bias: torch.Tensor | None = None,  # [N]
    residual: torch.Tensor | None = None,  # [M, N] any strides
    activation: str = "none",
) -> None:
    """y = act(Σ partial · s_x · s_w + bias + residual): the sum in order, in int32 or fp32."""
    split_k, M, N = partial.shape
    stride_rm, stride_rn = (0, 0) if residual is None else residual.stride()
    BLOCK_N = min(triton.next_power_of_2(N), 1024)
    _reduce_kernel[(M, triton.cdiv(N, BLOCK_N))](
        partial, s_x, s_w, bias, residual, y, M, N, stride_rm, stride_rn, activation, split_k, BLOCK_N=BLOCK_N
    )


def flattened(x: torch.Tensor, N: int, bias: torch.Tensor | None, residual: torch.Tensor | None) -> tuple:
    """(x [M, K], y [..., N] to be filled, its view [M, N], bias contiguous, residual [M, N]) of x [..., K]."""
    M, K = math.prod(x.shape[:-1]), x.shape[-1]  # not reshape(-1, K), which K = 0 refuses
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.reshape(M, N)
    return x.reshape(M, K), y, y.view(M, N), bias, residual


def launch(
    kernel,
    operands: tuple[torch.Tensor | None, ...],
    scales: dict[str, torch.Tensor | None],
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [M, N] any strides
    activation: str,
    y: torch.Tensor,  # [M, N]
    sizes: tuple[int, ...],
    split_k: int,
    *options: object,
    sums: torch.dtype = torch.float32,
    least_bucket: int = 16,
) -> None:
    """The matmul, and with a split the reduction of its `sums`.

    The arguments of every kernel are its operands, its scales, bias, residual, out, M, N, sizes of its own, the strides
    of the residual, M_BUCKET (M rounded up to a power of two, at least `least_bucket`), ACTIVATION, SPLIT_K and its
    options. `scales` are those that are left to the epilogue, called as by `reduce_sums`.
    """
    M, N = y.shape
    bucket = min(max(triton.next_power_of_2(M), least_bucket), 4096)

    def grid(meta):
        return triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]), split_k

    if split_k == 1:
        strides = (0, 0) if residual is None else residual.stride()
        kernel[grid](
            *operands, *scales.values(), bias, residual, y, M, N, *sizes, *strides, bucket, activation, 1, *options
        )
        return
    partial = torch.empty((split_k, M, N), dtype=sums, device=y.device)
    left_out = (None,) * (len(scales) + 2)  # the bias and the residual, too
    kernel[grid](*operands, *left_out, partial, M, N, *sizes, 0, 0, bucket, "none", split_k, *options)
    reduce_sums(partial, y, **scales, bias=bias, residual=residual, activation=activation)
