"""What the linear layers with narrow weights and x as it is share: which way a call takes, tiles, and the dense way.

Few rows: the weight is all that has to be read, and the kernel turns it into x's dtype in registers. Many rows: it is
turned into x's dtype in memory, a slab at a time, and cuBLAS multiplies.
"""

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .matmul import choose_split, reduce_sums

FUSED_ROWS = 256
"""Beyond this many rows of fp16 or bf16 a weight is dequantized first and the dense GEMM called, see `plan`."""
FUSED_ROWS_FP32 = 64
SLAB_BYTES = 64 << 20
"""The most that is dequantized at a time. A slab is read from L2 where it fits (H100: 50 MB), and no layer, lm_head
included, needs a temporary as large as its dense weight."""
SLAB_ROWS = 256
"""Slabs are multiples of this many output channels: whole tiles of the dense GEMM."""


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def word_tiles(
    x_ptr,  # [M, K], rows contiguous
    w_ptr,  # [N, WORDS] int32
    first_m,
    first_n,
    k_begin,
    M,
    N,
    stride_xm,
    WORDS,  # in a row of the weight
    IN_WORD: tl.constexpr,  # weights in a word
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(rows of the weight within the tile, k and words within the step, mask of x's rows, pointers to x and words).

    Rows of x beyond the edge are not read: with one row, a tile's other 15 would be as many bytes as its weights, or
    twice that. Rows of the weight beyond it read the last one again, and their results are not stored. A tile's base is
    a 64-bit scalar; offsets of words within it have 31 bits.
    """
    tile_m = tl.arange(0, BLOCK_M)
    tile_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_K // IN_WORD)
    mask_m = (tile_m < M - first_m)[:, None]
    x_ptrs = x_ptr + first_m.to(tl.int64) * stride_xm + k_begin
    x_ptrs = x_ptrs + (tile_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :])
    w_ptrs = w_ptr + (first_n.to(tl.int64) * WORDS + k_begin // IN_WORD) + (tile_n[:, None] * WORDS + offs_v[None, :])
    return tile_n, offs_k, offs_v, mask_m, x_ptrs, w_ptrs


@triton.jit
def load_words(x_ptrs, w_ptrs, mask_m, offs_k, offs_v, k_left, words_left, EVEN_K: tl.constexpr):
    """A step's xᵀ [BLOCK_K, BLOCK_M] and words [BLOCK_N, BLOCK_K / weights in a word]; zeros beyond K."""
    if EVEN_K:
        x = tl.load(x_ptrs, mask=mask_m, other=0).T
        v = tl.load(w_ptrs)
    else:
        x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < k_left), other=0).T
        v = tl.load(w_ptrs, mask=offs_v[None, :] < words_left, other=0)
    return x, v


# ------------------------------------------------------------------------------------------------------------ launcher


def tallest(configs: list[triton.Config]) -> list[triton.Config]:
    """Those with the tallest tile of rows, and with one of half its height."""
    height = max(config.kwargs["BLOCK_M"] for config in configs)
    return [config for config in configs if 2 * config.kwargs["BLOCK_M"] >= height]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is computed: `fused` in one kernel, K cut into `split_k`; else dequantized first."""

    fused: bool
    split_k: int = 1


def plan(M: int, N: int, K: int, x_dtype: torch.dtype, multiprocessors: int) -> Plan:
    """The choice, by the number of rows.

    1 to 64      fused, K split over programs until every multiprocessor has about two: 4.5 or 8 bits a weight are read
                 instead of 16, so this is where narrow weights pay. One row takes the same tensor-core kernel as 16:
                 multiplied by FMAs, a weight would have to become an fp32 number of its own (for int4 5 instructions
                 and one for each row), while two at a time become the fp16 operands of a tensor core in 4 to 5 in all;
                 the 15 rows of padding are not read and cost nothing, as the tensor cores wait for memory anyway.
    65 to 256    fused, unsplit: the tiles fill the device.
    more         dequantized into a temporary, then the dense GEMM. That costs 2.5 bytes a weight (int4: read half,
                 write two; int8: 3) whatever M, or N·K·2.5 / 3.35 TB/s on an H100; the dense GEMM takes N·K·M·2 / 650
                 TFLOP/s, so at 256 rows (int8: 290) the two are equal. A fused kernel that reaches a fraction f of the
                 dense rate loses (1/f - 1) of a dense GEMM instead: for f = 1/2, what Triton kernels with
                 dequantization in registers are reported to reach, the same. Beyond, the temporary's share falls as
                 1/M, the fused kernel's stays.

    fp32 has no tensor cores that are exact. A fused FMA kernel at a third of the 33 TFMA/s of an H100 takes as long as
    dequantizing (8.5 bytes a weight) and cuBLAS together at about 64 rows.
    """
    most_rows = FUSED_ROWS_FP32 if x_dtype == torch.float32 else FUSED_ROWS
    if most_rows < M:
        return Plan(fused=False)
    return Plan(fused=True, split_k=choose_split(M, N, K, multiprocessors))


def aligned_rows(x: torch.Tensor, alignment: int) -> torch.Tensor:
    """x [M, K_padded], K padded to `alignment`, rows contiguous from multiples of 16 elements; zeros beyond K."""
    if x.shape[1] % alignment:
        return torch.nn.functional.pad(x, (0, -x.shape[1] % alignment))
    if x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def dense(
    x: torch.Tensor,  # [M, K]
    fill: Callable[[slice, torch.Tensor], None],  # writes these rows of the weight to a [rows, K] in x's dtype
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [M, N] any strides
    activation: str,
    y: torch.Tensor,  # [M, N]
) -> None:
    """Slab by slab: dequantize, multiply into columns of y; then, in place, what cuBLAS has not added."""
    N, K = y.shape[1], x.shape[1]
    with_bias = bias is not None and bias.dtype == x.dtype and residual is None and activation == "none"
    slab = max(SLAB_BYTES // (K * x.element_size() * SLAB_ROWS), 1) * SLAB_ROWS
    w = torch.empty((min(slab, N), K), dtype=x.dtype, device=x.device)
    for n in range(0, N, slab):
        own = slice(n, min(n + slab, N))
        w = w[: own.stop - n]
        fill(own, w)
        if with_bias:
            torch.addmm(bias[own], x, w.T, out=y[:, own])
        else:
            torch.mm(x, w.T, out=y[:, own])
    if not with_bias and (bias is not None or residual is not None or activation != "none"):
        reduce_sums(y[None], y, bias=bias, residual=residual, activation=activation)
