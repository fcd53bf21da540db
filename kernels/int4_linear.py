"""int4 linear: y[m, n] = act(Σ_k x[m, k] · s[n, g] · (q[n, k] - z[n, g]) + bias[n] + residual[m, n]), g = k // G

x [M, K] fp16/bf16/fp32; q [N, K/2] bytes, the even k in the low nibble; s [N, ⌈K/G⌉] fp16/bf16/fp32; z uint8 or None
(8 everywhere); y in x.dtype. `pyops/ops/int4_linear.py` is the contract.

compute="float" (W4A16): a weight is s · (q - z) rounded once to x's dtype, as plain PyTorch's would be; products in
that dtype, sums in fp32. compute="int8" (W4A8): x is quantized row by row as in int8_linear, the sums of a group are
exact in int32, and are scaled and added in order of g in fp32 with one rounding a term, so that they are the contract's
to the last bit.

How eight weights come out of a word. Nibbles j and j + 4 of (v >> 4j) & 0x000F000F | 0x64006400 are the lowest bits of
two fp16 numbers, 1024 + q (0x4300 makes 128 + q in bf16), so their difference to 1024 + z is q - z, exact, and nothing
is converted: two instructions for two weights, one more for the difference. `tl.join` arranges them in order of k,
which costs nothing within a thread's registers. The weights are the *left* operand, yᵀ = w · xᵀ: tensor cores take it
from registers, and its rows are output channels, of which there are always enough, where those of x would be padding.
"""

import torch
import triton
import triton.language as tl

from ..ops import int4_weight
from .int8_linear import quantize_rows
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
from .weight_only import Plan, aligned_rows, dense, load_words, plan, tallest, word_tiles

K_ALIGNMENT = 32
"""K is padded to this: rows of the weight are multiples of 16 bytes, which is what one copy moves, and G is one too."""
ONE_GROUP = 1 << 30
"""GROUP of group_size -1: every k is in group 0."""
DEQUANTIZE_K = 256
DEQUANTIZE_N = 16

MIDDLE = tl.constexpr(int4_weight.MIDDLE)
SUM_SCALING_ROWS = tl.constexpr(16)
"""Up to this many rows of x it costs less to scale the sums of a step than its weights."""

# Few rows: the weights of a step are BLOCK_N · BLOCK_K / 2 bytes, of which 16 to 24 KiB a multiprocessor have to be on
# their way to keep HBM busy; hence long steps and four stages or more. BLOCK_N is 64 for each warpgroup, the height of
# wgmma. Many rows: 64 accumulators a thread leave registers for the words, the weights and their groups.
# BLOCK_K divides the group or is divided by it, whatever the group (32, or any multiple of 64), so every height has a
# tile with 64; and with int8, which cannot have two groups in a step, 32.
# fp32 is multiplied by FMAs, where every row costs an instruction a weight: hence a tile of 4. Its BLOCK_N is 32: with
# 64, Triton 3.7 multiplies what comes from `tl.join` in TF32 on Blackwell's tensor cores, "ieee" or not.
CONFIGS = [
    tile_config(4, 32, 64, 2, 4),
    tile_config(16, 32, 64, 4, 4),
    tile_config(32, 32, 64, 4, 4),
    tile_config(64, 32, 64, 4, 4),
    tile_config(16, 64, 256, 4, 4),
    tile_config(16, 128, 128, 8, 4),
    tile_config(16, 64, 128, 4, 5),
    tile_config(16, 64, 64, 4, 6),
    tile_config(16, 64, 32, 4, 6),
    tile_config(32, 64, 128, 4, 4),
    tile_config(32, 128, 128, 4, 4),
    tile_config(32, 64, 64, 4, 5),
    tile_config(64, 128, 128, 8, 3),
    tile_config(64, 64, 64, 4, 4),
    tile_config(64, 64, 32, 8, 4),
    tile_config(128, 128, 128, 8, 3),
    tile_config(128, 128, 64, 8, 4),
]


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    Steps lie within one group, or (not with int8) begin where one does; a step of 32 is for int8 only. Stages fit in
    shared memory. Tiles are no taller than M rounded up to a power of two; of those left, the tallest and those of half
    its height.
    """
    args = {**named_args, **kwargs}
    _, shared_bytes = device_limits(args["x_ptr"].device.index)
    dtype, group = args["x_ptr"].dtype, args["GROUP"]
    rows = max(args["M_BUCKET"], 4 if dtype == torch.float32 else 16)

    def suits(config: triton.Config) -> bool:
        block_m, block_n, block_k = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        if dtype == torch.int8:
            of_dtype = block_n > 32 and group % block_k == 0 and (block_k > 32 or group == 32)
        else:
            of_dtype = (block_n == 32) == (dtype == torch.float32) and block_k > 32
        return (
            of_dtype
            and (group % block_k == 0 or block_k % group == 0)
            and block_m <= rows
            and config.num_stages * block_k * (block_m * dtype.itemsize + block_n // 2) <= shared_bytes
        )

    return tallest([config for config in configs if suits(config)])


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _load_groups(
    ptr,  # [N, groups], from the tile's first row on
    offs_n,
    k,
    groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """What the groups of a step that begins at k have in each row: [BLOCK_N, GROUPS]. None have more than the last."""
    g = tl.minimum(k // GROUP + tl.arange(0, GROUPS), groups - 1)
    return tl.load(ptr + (offs_n * groups)[:, None] + g[None, :])


@triton.jit
def _shifted(
    q,  # uint8, 0 … 31
    DTYPE: tl.constexpr,
):
    """q plus a constant of DTYPE, exact: its bits are the lowest of a number whose last place is 1. int8: q itself."""
    if DTYPE.is_int8():
        return q.to(tl.int8)
    elif DTYPE.is_fp16():
        return (q.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif DTYPE.is_bf16():
        return (q.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        tl.static_assert(DTYPE.is_fp32())
        return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _nibble(
    v,  # int32
    J: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`_shifted` nibble J of each word. Of 16-bit types J and J + 4 are halves of one word, which is computed once."""
    if DTYPE.is_fp16() or DTYPE.is_bf16():
        pair = (v >> (4 * (J % 4))) & 0x000F000F | (0x64006400 if DTYPE.is_fp16() else 0x43004300)
        return (pair >> (16 * (J // 4))).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        return _shifted((v >> (4 * J)) & 15, DTYPE)


@triton.jit
def _centred(
    v,  # [ROWS, COLUMNS / 8] int32
    z,  # [ROWS, GROUPS] uint8
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """q - z in DTYPE, exact, as [ROWS, GROUPS, COLUMNS / GROUPS]."""
    q04 = tl.join(_nibble(v, 0, DTYPE), _nibble(v, 4, DTYPE))  # [ROWS, COLUMNS / 8, 2]
    q15 = tl.join(_nibble(v, 1, DTYPE), _nibble(v, 5, DTYPE))
    q26 = tl.join(_nibble(v, 2, DTYPE), _nibble(v, 6, DTYPE))
    q37 = tl.join(_nibble(v, 3, DTYPE), _nibble(v, 7, DTYPE))
    q = tl.join(tl.join(q04, q26), tl.join(q15, q37))  # [ROWS, COLUMNS / 8, 2, 2, 2]: 4, 2 and 1 of the nibble
    return q.reshape(ROWS, GROUPS, COLUMNS // GROUPS) - _shifted(z, DTYPE)[:, :, None]


@triton.jit
def _scaled(
    w,  # [ROWS, GROUPS, COLUMNS / GROUPS] in DTYPE, five bits each
    s,  # [ROWS, GROUPS]
    DTYPE: tl.constexpr,
):
    """s · w, rounded once to DTYPE: a scale of that type has no other product in fp32."""
    if s.dtype == DTYPE:
        return w * s[:, :, None]
    else:
        return (w.to(tl.float32) * s.to(tl.float32)[:, :, None]).to(DTYPE)


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.autotune(
    configs=CONFIGS,
    key=["M_BUCKET", "N", "K_UNITS", "SPLIT_K", "GROUP"],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=bench,
    cache_results=True,
)
@triton.heuristics({"EVEN_K": lambda args: 32 * args["K_UNITS"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["M", "M_BUCKET"])
def _int4_linear_kernel(
    x_ptr,  # [M, K] fp16/bf16/fp32, or int8; rows contiguous
    w_ptr,  # [N, K / 8] int32
    s_ptr,  # [N, groups] fp16/bf16/fp32
    z_ptr,  # [N, groups] uint8, or None
    s_x_ptr,  # [M] fp32, or None where x is no int8
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] any strides, or None
    out_ptr,  # [M, N]; with a split fp32 [SPLIT_K, M, N], and no epilogue here
    M,
    N,
    K_UNITS,  # K / 32: rows of the weight are so many times 16 bytes, which the compiler must know to copy 16 at a time
    stride_xm,
    stride_rm,
    stride_rn,
    M_BUCKET,  # only read by the autotuner
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1  # of one step
    STEPS: tl.constexpr = GROUP // BLOCK_K if GROUP > BLOCK_K else 1  # of one group
    K = 32 * K_UNITS
    WORDS = 4 * K_UNITS  # in a row of the weight
    groups = tl.cdiv(K, GROUP)
    first_m, first_n = first_of_tile(M, N, BLOCK_M, BLOCK_N)

    split, k_begin, k_end = split_of_k(K, BLOCK_K, SPLIT_K)
    # Within a tile, 128 rows of at most 132 104 words stay below 2³¹.
    tile_n, offs_k, offs_v, mask_m, x_ptrs, w_ptrs = word_tiles(
        x_ptr, w_ptr, first_m, first_n, k_begin, M, N, stride_xm, WORDS, 8, BLOCK_M, BLOCK_N, BLOCK_K
    )

    # Scales are too narrow for asynchronous copies. Read a step ahead, they arrive before they are needed.
    s_ptr += first_n.to(tl.int64) * groups
    s = _load_groups(s_ptr, tile_n, k_begin, groups, GROUP, GROUPS)
    if z_ptr is None:
        z = tl.full((BLOCK_N, GROUPS), MIDDLE, tl.uint8)
    else:
        z_ptr += first_n.to(tl.int64) * groups
        z = _load_groups(z_ptr, tile_n, k_begin, groups, GROUP, GROUPS)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)  # of the group that x int8 is in
    for k in range(k_begin, k_end, BLOCK_K):
        x, v = load_words(x_ptrs, w_ptrs, mask_m, offs_k, offs_v, K - k, WORDS - k // 8, EVEN_K)
        next_s = _load_groups(s_ptr, tile_n, k + BLOCK_K, groups, GROUP, GROUPS)
        w = _centred(v, z, BLOCK_N, BLOCK_K, GROUPS, DTYPE)
        if DTYPE.is_int8():
            part = tl.dot(w.reshape(BLOCK_N, BLOCK_K), x, part, out_dtype=tl.int32)
            if STEPS == 1 or (k + BLOCK_K) % GROUP == 0 or k + BLOCK_K >= K:
                acc = tl.fma(part.to(tl.float32), s.to(tl.float32), acc)
                part = tl.zeros_like(part)
        elif BLOCK_M <= SUM_SCALING_ROWS and GROUPS == 1:
            sums = tl.dot(w.reshape(BLOCK_N, BLOCK_K), x, input_precision="ieee")
            acc += sums * s.to(tl.float32)
        else:
            acc = tl.dot(_scaled(w, s, DTYPE).reshape(BLOCK_N, BLOCK_K), x, acc, input_precision="ieee")
        s = next_s
        if z_ptr is not None:
            z = _load_groups(z_ptr, tile_n, k + BLOCK_K, groups, GROUP, GROUPS)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // 8

    store_tile(
        acc.T, s_x_ptr, None, bias_ptr, residual_ptr, out_ptr, first_m, first_n, split, M, N, stride_rm, stride_rn,
        ACTIVATION, SPLIT_K, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _dequantize_kernel(
    w_ptr,  # [N, K / 8] int32
    s_ptr,  # [N, groups]
    z_ptr,  # [N, groups] uint8, or None
    out_ptr,  # [N, K] fp16/bf16/fp32
    N,
    K_UNITS,  # K / 32
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    K = 32 * K_UNITS
    WORDS = 4 * K_UNITS  # in a row of the weight
    groups = tl.cdiv(K, GROUP)
    first_n = tl.program_id(0) * BLOCK_N
    k = tl.program_id(1) * BLOCK_K
    tile_n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    offs_v = k // 8 + tl.arange(0, BLOCK_K // 8)
    w_ptrs = w_ptr + first_n.to(tl.int64) * WORDS + (tile_n[:, None] * WORDS + offs_v[None, :])
    v = tl.load(w_ptrs, mask=offs_v[None, :] < WORDS, other=0)
    s = _load_groups(s_ptr + first_n.to(tl.int64) * groups, tile_n, k, groups, GROUP, GROUPS)
    if z_ptr is None:
        z = tl.full((BLOCK_N, GROUPS), MIDDLE, tl.uint8)
    else:
        z = _load_groups(z_ptr + first_n.to(tl.int64) * groups, tile_n, k, groups, GROUP, GROUPS)
    w = _scaled(_centred(v, z, BLOCK_N, BLOCK_K, GROUPS, DTYPE), s, DTYPE).reshape(BLOCK_N, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = k + tl.arange(0, BLOCK_K)
    out_ptrs = out_ptr + first_n.to(tl.int64) * K + (offs_n[:, None] * K + offs_k[None, :])
    tl.store(out_ptrs, w, mask=(offs_n < N - first_n)[:, None] & (offs_k[None, :] < K))


# ------------------------------------------------------------------------------------------------------------ launcher


def _plan(M: int, N: int, K: int, x_dtype: torch.dtype, compute: str, multiprocessors: int) -> Plan:
    """The choice of `weight_only.plan`, but int8 is always fused, unsplit.

    Integer tensor cores need int8 weights, which nothing but this kernel makes; the contract adds the groups in order.
    """
    return Plan(fused=True) if compute == "int8" else plan(M, N, K, x_dtype, multiprocessors)


def _aligned_weight(weight: torch.Tensor, K: int) -> torch.Tensor:
    """q [N, K_padded / 8] int32, contiguous from a 16-byte boundary. Free if 32 divides K, as in real models."""
    if K % K_ALIGNMENT:
        weight = torch.nn.functional.pad(weight, (0, (K + -K % K_ALIGNMENT) // 2 - weight.shape[1]))
    weight = weight.contiguous()
    return (weight if weight.data_ptr() % 16 == 0 else weight.clone()).view(torch.int32)


def dequantize(
    weight: torch.Tensor,  # [N, K / 8] int32, rows of whole 16 bytes
    w_scale: torch.Tensor,  # [N, groups]
    w_zero: torch.Tensor | None,  # [N, groups]
    group: int,
    out: torch.Tensor,  # [N, K]
) -> None:
    """out = s · (q - z), rounded once to out's dtype. All are contiguous."""
    N, K = out.shape
    BLOCK_K = DEQUANTIZE_K if group % DEQUANTIZE_K == 0 or DEQUANTIZE_K % group == 0 else 64
    grid = triton.cdiv(N, DEQUANTIZE_N), triton.cdiv(K, BLOCK_K)
    _dequantize_kernel[grid](
        weight, w_scale, w_zero, out, N, K // K_ALIGNMENT, group, BLOCK_N=DEQUANTIZE_N, BLOCK_K=BLOCK_K
    )


def int4_linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [N, ⌈K/2⌉] uint8, or packed for the CPU (slow: unpacked at every call)
    w_scale: torch.Tensor,  # [N, ⌈K/G⌉], or packed
    w_zero: torch.Tensor | None,  # as w_scale, uint8
    bias: torch.Tensor | None,  # [N]
    residual: torch.Tensor | None,  # [..., N]
    activation: str,
    group_size: int,
    out_features: int,
    order: torch.Tensor | None,  # [K] int32
    compute: str,  # "int8" or "float"
) -> torch.Tensor:
    """The op `pyops::int4_linear` on CUDA; its contract has checked the arguments.

    The first call with a new (M rounded up to a power of two, N, K) tunes and synchronizes; later ones only launch, so
    they can be captured in a CUDA graph.
    """
    N, K = out_features, x.shape[-1]
    rows, y, out, bias, residual = flattened(x, N, bias, residual)
    if y.numel() == 0:
        return y

    with torch.cuda.device_of(x):
        if K == 0:
            reduce_sums(torch.zeros_like(out)[None], out, bias=bias, residual=residual, activation=activation)
            return y
        if weight.dim() == 3:  # only a weight moved by hand arrives here so
            weight, w_scale, w_zero = int4_weight.unpack_int4(weight, w_scale, w_zero, N, K, group_size)
        weight, w_scale = _aligned_weight(weight, K), w_scale.contiguous()
        w_zero = None if w_zero is None else w_zero.contiguous()
        group = group_size if group_size > 0 else ONE_GROUP
        rows = aligned_rows(rows if order is None else rows.index_select(1, order), K_ALIGNMENT)
        M, K = rows.shape
        way = _plan(M, N, K, x.dtype, compute, device_limits(x.device.index)[0])
        if not way.fused:

            def fill(own: slice, w: torch.Tensor) -> None:
                dequantize(weight[own], w_scale[own], None if w_zero is None else w_zero[own], group, w)

            dense(rows, fill, bias, residual, activation, out)
            return y
        s_x = None
        if compute == "int8":
            rows, s_x = quantize_rows(rows)
        launch(
            _int4_linear_kernel, (rows, weight, w_scale, w_zero), {"s_x": s_x}, bias, residual, activation,
            out, (K // K_ALIGNMENT, rows.stride(0)), way.split_k, group, least_bucket=4,
        )  # fmt: skip
    return y
