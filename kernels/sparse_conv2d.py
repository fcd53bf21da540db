"""Sparse convolution: y[n, o, i, j] = act(Σ_{c, r, s} W[o, c, r, s] · x[n, c, i·sh + r·dh - top, j·sw + s·dw - left]
+ bias[o] + residual[n, o, i, j]), of which the sum goes over the kept blocks only.

x [N, C, H, W] fp16/bf16/fp32; values [B, bo, bc] with crow/col as in `pyops/ops/sparse_weight.py`; sums in fp32; y in
x.dtype and x's memory format.

An implicit GEMM whose K is a list: a program owns BLOCK_M output pixels and one block row (bo output channels), walks
the row's blocks, gathers for each the pixels that its tap (r, s) shifts to, and multiplies. Nothing is unfolded.

The gradient of x is the same loop over the transposed list: its block rows are blocks of input channels, its steps
carry mirrored taps. With a stride, an input pixel meets only those taps that fall on it; which ones depends on the
phase ((ih + top) mod sh, (iw + left) mod sw). So every kept block belongs to one phase, the list is sorted by phase
first, and a program owns pixels of one phase: no product with an inserted zero is ever computed.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton import knobs

from ..ops.epilogue import epilogue_ref
from ..ops.sparse_conv2d import empty_image, output_size
from ..ops.sparse_packed import is_channels_last
from ..ops.sparse_weight import block_columns, block_rows, scatter_blocks
from .epilogue import epilogue

TENSOR_CORE_BLOCKS = (16, 32, 64)
"""Sides of a block that tensor cores multiply without waste: their smallest tile is 16 deep and 8 or 16 wide."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_PIXELS = 256
"""The tallest tile in CONFIGS."""
COPY_BYTES = 16
"""Bytes of the widest copy to shared memory; rows of x that start on multiples of it are copied so."""


def _config(block_m: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": block_m}, num_warps=warps, num_stages=stages)


# A block row is at most 64 channels wide, so the pixels make the tile: 256 for large images, where a step's weights
# serve many pixels, and 16 or 32 for the last stages of a network, where tall tiles would leave multiprocessors idle.
# Steps are short and gathered from anywhere, so stages hide their latency rather than their number of bytes. The
# first two fit in the 99 KiB of consumer GPUs whatever the block and dtype.
CONFIGS = [
    _config(16, 2, 4),
    _config(32, 4, 4),
    _config(64, 4, 4),
    _config(128, 4, 4),
    _config(128, 8, 4),
    _config(256, 8, 3),
]


def _block_k(kb: int, element_bytes: int, precision: str) -> int:
    """How deep one step is: as many blocks as fill one 128-byte line of shared memory, and at least one block.

    Lines of 128 bytes are swizzled so that wgmma reads them without bank conflicts. Longer steps need registers for
    the addresses of the next, and leave more of the last one without work. FMAs have no use for lines: one block.
    """
    return kb if element_bytes == 4 and precision == "ieee" else max(kb, 128 // element_bytes)


def _prune(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The configs worth timing on these sizes.

    Their pixels are at most M rounded up to a power of two, their stages fit in shared memory. No thread holds more
    than 32 accumulators where each is stored by itself (NCHW, or channels that do not start on 16 elements: the
    addresses would spill), or where fp32 is multiplied by FMAs (the operands would).
    """
    args = {**named_args, **kwargs}
    element_bytes = args["x_ptr"].element_size()
    shared_bytes = _shared_bytes(args["x_ptr"].device.index)
    pixels = min(max(args["M_BUCKET"], 16), MOST_PIXELS)
    wide_stores = args["CHANNELS_LAST"] and args["N_CHANNELS"] % 16 == 0
    most_accumulators = 64 if wide_stores and (element_bytes < 4 or args["PRECISION"] == "tf32") else 32

    def suits(config: triton.Config) -> bool:
        block_m = config.kwargs["BLOCK_M"]
        return (
            block_m <= pixels <= 8 * block_m
            and config.num_stages * (block_m + args["NB"]) * args["BLOCK_K"] * element_bytes <= shared_bytes
            and block_m * args["NB"] <= 32 * config.num_warps * most_accumulators
        )

    return [config for config in configs if suits(config)]


def _bench(call, quantiles):
    """Time a config in about 30 ms. In the interpreter, which has no time, the first config is as good as any."""
    if knobs.runtime.interpret:
        return [0.0, 0.0, 0.0]
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _read_col(col_ptr, step, end, k, STEPS: tl.constexpr, KB: tl.constexpr):
    """col of the blocks in one step: a scalar for one block, else [1, BLOCK_K].

    Read a step ahead, so that the gathers, which depend on it, have all stages of the pipeline to themselves.
    """
    if STEPS == 1:
        col = tl.load(col_ptr + step, mask=step < end, other=0)
    else:
        own = step + k // KB
        col = tl.load(col_ptr + own, mask=own < end, other=0)[None, :]
    return col


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.autotune(
    configs=CONFIGS,
    key=[
        "M_BUCKET", "ROWS", "K_CHANNELS", "N_CHANNELS", "KB", "NB", "R", "S", "STRIDE_H", "STRIDE_W", "TRANSPOSED",
        "CHANNELS_LAST", "PRECISION",
    ],
    prune_configs_by={"early_config_prune": _prune},
    do_bench=_bench,
    cache_results=True,
)  # fmt: skip
@triton.jit(
    do_not_specialize=[
        "N", "IN_H", "IN_W", "OUT_H", "OUT_W", "K_CHANNELS", "ROWS", "stride_xn", "stride_xh", "stride_xw",
        "pad_h", "pad_w", "dilation_h", "dilation_w", "M_BUCKET",
    ]
)  # fmt: skip
def _sparse_conv2d_kernel(
    x_ptr,  # [N, groups · K_CHANNELS, IN_H, IN_W], what is read: x, or the gradient of y; channels have stride 1
    values_ptr,  # [B, NB, KB]
    crow_ptr,  # [ROWS + 1] int32
    col_ptr,  # [B] int32: (block of channels · R + r) · S + s of each step
    bias_ptr,  # [groups · N_CHANNELS] or None
    residual_ptr,  # of y's shape and strides, or None
    y_ptr,  # [N, groups · N_CHANNELS, OUT_H, OUT_W], what is written: y, or the gradient of x
    N,
    IN_H,
    IN_W,
    OUT_H,
    OUT_W,
    K_CHANNELS,  # of one group, in units of UNIT, as are stride_x*
    N_CHANNELS,  # of one group
    ROWS,  # block rows of all groups, and of all phases if TRANSPOSED
    stride_xn,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    pad_h,  # top
    pad_w,  # left
    dilation_h,
    dilation_w,
    M_BUCKET,  # only read by the autotuner
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    KB: tl.constexpr,  # channels that a block reads
    NB: tl.constexpr,  # channels that it writes
    UNIT: tl.constexpr,  # elements on whose multiples all rows of x start and end
    BOUNDED: tl.constexpr,  # every tap falls inside the image
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # neighbours in y are channels
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # All block rows of one pixel tile run side by side: what they gather is the same and stays in L2.
    row = tl.program_id(0) % ROWS
    first_m = tl.program_id(0) // ROWS * BLOCK_M
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    rows_per_group = ROWS // (PHASES * GROUPS)
    group = row // rows_per_group % GROUPS
    first_n = row % rows_per_group * NB

    # The pixels of this program: all, or one phase. Pixel (i, j) of it is written to (first_h + i · step_h, …) and
    # reads, for tap (r, s), (read_h(i) + shift_h(r), …).
    if TRANSPOSED:
        phase = row // (rows_per_group * GROUPS)
        first_h = (phase // STRIDE_W + STRIDE_H - pad_h % STRIDE_H) % STRIDE_H
        first_w = (phase % STRIDE_W + STRIDE_W - pad_w % STRIDE_W) % STRIDE_W
        height = (OUT_H - first_h + STRIDE_H - 1) // STRIDE_H
        width = (OUT_W - first_w + STRIDE_W - 1) // STRIDE_W
    else:
        first_h, first_w, height, width = 0, 0, OUT_H, OUT_W
    M = N * height * width
    if first_m >= M:  # some phases have fewer pixels than the largest
        return

    # Pixels beyond the last read it again: that needs no mask, and their results are not stored.
    offs_m = first_m + tl.arange(0, BLOCK_M)
    pixel = tl.minimum(offs_m, M - 1)[:, None]  # [BLOCK_M, 1]
    read_w = pixel % width
    read_h = pixel // width % height
    image = (pixel // (width * height)).to(tl.int64)
    if not TRANSPOSED:
        read_h = read_h * STRIDE_H - pad_h
        read_w = read_w * STRIDE_W - pad_w
    x_ptrs = x_ptr + (image * stride_xn + read_h.to(tl.int64) * stride_xh + read_w.to(tl.int64) * stride_xw) * UNIT
    x_ptrs += group.to(tl.int64) * K_CHANNELS * UNIT

    STEPS: tl.constexpr = BLOCK_K // KB
    k = tl.arange(0, BLOCK_K)
    offs_w = ((k // KB * NB)[:, None] + tl.arange(0, NB)[None, :]) * KB + (k % KB)[:, None]  # [BLOCK_K, NB]
    begin = tl.load(crow_ptr + row)
    end = tl.load(crow_ptr + row + 1)
    acc = tl.zeros((BLOCK_M, NB), dtype=tl.float32)
    col = _read_col(col_ptr, begin, end, k, STEPS, KB)
    for done in range(0, end - begin, STEPS):
        step = begin + done
        next_col = _read_col(col_ptr, step + STEPS, end, k, STEPS, KB)
        shift_h = col // S % R * dilation_h
        shift_w = col % S * dilation_w
        if TRANSPOSED:  # exact: the list of a phase holds the taps that divide
            shift_h = (first_h + pad_h - shift_h) // STRIDE_H
            shift_w = (first_w + pad_w - shift_w) // STRIDE_W
        offs_c = col // (R * S) * KB + (k % KB)[None, :]  # [1, BLOCK_K]
        offs_x = (shift_h.to(tl.int64) * stride_xh + shift_w.to(tl.int64) * stride_xw) * UNIT + offs_c
        mask_x = offs_c < K_CHANNELS * UNIT
        if not BOUNDED:
            in_h, in_w = read_h + shift_h, read_w + shift_w
            mask_x = mask_x & (in_h >= 0) & (in_h < IN_H) & (in_w >= 0) & (in_w < IN_W)
        w_ptrs = values_ptr + step.to(tl.int64) * (KB * NB) + offs_w
        if STEPS == 1:
            x = tl.load(x_ptrs + offs_x, mask=mask_x, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs)  # [BLOCK_K, NB]
        else:
            exists = step + k // KB < end  # the last step of a row can hold fewer blocks
            x = tl.load(x_ptrs + offs_x, mask=mask_x & exists[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=exists[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        col = next_col

    # One orientation for each memory format, so that neighbouring threads write neighbouring elements.
    if CHANNELS_LAST:
        channel = first_n + tl.arange(0, NB)[None, :]
        pixel = offs_m[:, None]
    else:
        acc = tl.trans(acc)
        channel = first_n + tl.arange(0, NB)[:, None]
        pixel = offs_m[None, :]
    mask_n = channel < N_CHANNELS
    mask = mask_n & (pixel < M)
    channel += group * N_CHANNELS
    out_h = pixel // width % height
    out_w = pixel % width
    image = (pixel // (width * height)).to(tl.int64)
    if TRANSPOSED:
        out_h = first_h + out_h * STRIDE_H
        out_w = first_w + out_w * STRIDE_W
    offs_y = image * stride_yn + out_h.to(tl.int64) * stride_yh + out_w.to(tl.int64) * stride_yw
    offs_y += channel.to(tl.int64) * stride_yc
    y = epilogue(acc, 1.0, bias_ptr, channel, mask_n, residual_ptr, offs_y, mask, ACTIVATION)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------- launchers


@functools.cache
def _shared_bytes(index: int | None) -> int:
    """Shared memory that one program may use on a device; an H100's where there is none to ask."""
    if knobs.runtime.interpret:
        return 232448
    return triton.runtime.driver.active.utils.get_device_properties(index or 0)["max_shared_mem"]


def _select(x: torch.Tensor, values: torch.Tensor, weight_shape: list[int], pixels: int) -> str:
    """Who convolves: "triton", the kernel above, or "dense", torch's convolution with the zeros filled in.

    The kernel takes blocks of at least 16 channels in both directions, which tensor cores multiply without waste. For
    finer patterns (unstructured, 16×1 and narrower vectors of output channels, 1×4) a sparse kernel would have to run
    on the scalar units, at a fifteenth of the tensor cores' rate: unstructured on tensor-core GPUs does not pay below
    90-95 %. 2:4 needs `mma.sp`, which Triton does not have. There the dense convolution is the fastest choice. It also
    serves fp64, weights without any element, and images of 2³¹ pixels and more.
    """
    suits = (
        all(side in TENSOR_CORE_BLOCKS for side in values.shape[1:])
        and x.dtype in DTYPES
        and values.dtype in DTYPES
        and 0 not in weight_shape
        and pixels < 2**31 - MOST_PIXELS
    )
    return "triton" if suits else "dense"


def _precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: on tensor cores in TF32 where torch may do so in its own convolutions, else exactly."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _channels_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy, whose channels have stride 1.

    In NCHW neighbours in memory are pixels, and a tap shifts them off every alignment: two bytes a load, none of them
    asynchronous. One copy costs less than that for each block; cuDNN makes the same one.
    """
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _launch(
    x: torch.Tensor,  # what is read: x, or the gradient of y
    values: torch.Tensor,  # [B, channels that a block writes, channels that it reads]
    crow: torch.Tensor,
    col: torch.Tensor,
    y: torch.Tensor,  # what is written: y, or the gradient of x
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
) -> None:
    """Launch the kernel on a list of steps; `transposed`: for the gradient of x, on that which `_transpose` made."""
    x = _channels_contiguous(x)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    values = values.to(x.dtype).contiguous()
    _, nb, kb = values.shape
    N, k_channels = x.shape[0], x.shape[1] // groups
    rows = crow.numel() - 1
    # Of the largest phase, the whole image without phases.
    height = triton.cdiv(y.shape[2], stride[0]) if transposed else y.shape[2]
    width = triton.cdiv(y.shape[3], stride[1]) if transposed else y.shape[3]
    M = N * height * width
    R, S = weight_shape[2:]
    bounded = not any(padding) and (not transposed or R == S == 1)
    strides = [0 if x.shape[dim] == 1 else x.stride(dim) for dim in (0, 2, 3)]
    precision = _precision(x.dtype)
    unit = COPY_BYTES // x.element_size()
    if any(size % unit for size in (k_channels, *strides)):
        unit = 1

    def grid(meta):
        return (triton.cdiv(M, meta["BLOCK_M"]) * rows,)

    with torch.cuda.device_of(x):
        _sparse_conv2d_kernel[grid](
            x, values, crow, col, bias, residual, y,
            N, x.shape[2], x.shape[3], y.shape[2], y.shape[3], k_channels // unit, y.shape[1] // groups, rows,
            *(size // unit for size in strides),
            *y.stride(),
            padding[0], padding[2], *dilation, min(max(triton.next_power_of_2(M), 16), 65536),
            GROUPS=groups, R=R, S=S, STRIDE_H=stride[0], STRIDE_W=stride[1], KB=kb, NB=nb, UNIT=unit,
            BOUNDED=bounded, TRANSPOSED=transposed, CHANNELS_LAST=y.stride(1) == 1, ACTIVATION=activation,
            PRECISION=precision, BLOCK_K=_block_k(kb, x.element_size(), precision),
        )  # fmt: skip


def _transpose(
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    shape: list[int],
    block: list[int],
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values, crow and col of the list of steps for the gradient of x: every block, transposed and in its new place.

    The rows are, phase by phase, the blocks of input channels of all groups. Made on the device without waiting for it.
    """
    R, S = shape[2:]
    rows, row_blocks = block_rows(shape, block, groups) // groups, block_columns(shape, block) // (R * S)
    row = torch.repeat_interleave(torch.arange(groups * rows, device=col.device), crow.diff(), output_size=col.numel())
    c, r, s = col // (R * S), col // S % R, col % S
    phase = r * dilation[0] % stride[0] * stride[1] + s * dilation[1] % stride[1]
    key, order = torch.sort((phase * groups + row // rows) * row_blocks + c, stable=True)
    first = torch.arange(stride[0] * stride[1] * groups * row_blocks + 1, device=col.device)
    steps = (row % rows * R + r) * S + s
    crow, col = torch.searchsorted(key, first, out_int32=True), steps[order].to(torch.int32)
    return values.transpose(1, 2).index_select(0, order), crow, col


def _dense_weight(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    shape: list[int],
    block: list[int],
    groups: int,
) -> torch.Tensor:
    """The weight with its zeros, in x's dtype (fp64 if either is) and memory format: the format is what cuDNN obeys."""
    dtype = torch.float64 if values.dtype == torch.float64 else x.dtype
    w = scatter_blocks(values.to(dtype), crow, col, shape, block, groups)
    return w.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else w


def sparse_conv2d(
    x: torch.Tensor,  # [N, C, H, W]
    values: torch.Tensor,  # [B, bo, bc]
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_shape: list[int],  # O, C / groups, R, S
    block: list[int],  # bo, bc
    bias: torch.Tensor | None = None,  # [O]
    residual: torch.Tensor | None = None,  # [N, O, OH, OW]
    stride: list[int] = (1, 1),
    padding: list[int] = (0, 0, 0, 0),  # top, bottom, left, right
    dilation: list[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    packed: torch.Tensor | None = None,  # of the CPU's kernels; not read
) -> torch.Tensor:
    """The op `pyops::sparse_conv2d` on CUDA; its contract has checked the arguments.

    Products are of x's dtype: values are rounded to it, as plain PyTorch's weights are. The first call with new sizes
    tunes and synchronizes; later ones only launch, so they can be captured in a CUDA graph.
    """
    y = empty_image(x, output_size(x.shape, weight_shape, stride, padding, dilation))
    if y.numel() == 0:
        return y
    if _select(x, values, weight_shape, y.numel() // y.shape[1]) == "triton":
        window = (weight_shape, stride, padding, dilation, groups)
        bias = None if bias is None else bias.contiguous()
        _launch(x, values, crow_indices, col_indices, y, *window, bias, residual, activation)
        return y
    bias = None if bias is None else bias.view(-1, 1, 1)
    if 0 in weight_shape:
        return y.copy_(epilogue_ref(torch.zeros_like(y), bias, residual, activation, x.dtype))
    w = _dense_weight(x, values, crow_indices, col_indices, weight_shape, block, groups)
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    acc = F.conv2d(x.to(w.dtype), w, None, stride, (top, left), dilation, groups)
    acc = epilogue_ref(acc, bias, residual, activation, x.dtype)
    return acc if acc.stride() == y.stride() else y.copy_(acc)


def sparse_conv2d_dx(
    grad: torch.Tensor,  # [N, O, OH, OW]
    values: torch.Tensor,  # [B, bo, bc]
    crow_indices: torch.Tensor,
    col_indices: torch.Tensor,
    weight_shape: list[int],  # O, C / groups, R, S
    block: list[int],  # bo, bc
    x_shape: list[int],  # N, C, H, W
    stride: list[int],
    padding: list[int],  # top, bottom, left, right
    dilation: list[int],
    groups: int,
    packed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op `pyops::sparse_conv2d_dx` on CUDA: the gradient of x, in grad's dtype and memory format."""
    dx = empty_image(grad, tuple(x_shape))
    if dx.numel() == 0:
        return dx
    if _select(grad, values, weight_shape, dx.numel() // dx.shape[1]) == "triton":
        window = (weight_shape, stride, padding, dilation, groups)
        steps = _transpose(values, crow_indices, col_indices, weight_shape, block, stride, dilation, groups)
        _launch(grad, *steps, dx, *window, transposed=True)
        return dx
    if 0 in weight_shape or grad.numel() == 0:
        return dx.zero_()
    w = _dense_weight(grad, values, crow_indices, col_indices, weight_shape, block, groups)
    (N, C, H, W), (top, bottom, left, right) = x_shape, padding
    if (top, left) == (bottom, right):
        full = torch.nn.grad.conv2d_input(x_shape, w, grad.to(w.dtype), stride, (top, left), dilation, groups)
        return dx.copy_(full)
    shape = (N, C, H + top + bottom, W + left + right)
    full = torch.nn.grad.conv2d_input(shape, w, grad.to(w.dtype), stride, 0, dilation, groups)
    return dx.copy_(full[:, :, top : top + H, left : left + W])
