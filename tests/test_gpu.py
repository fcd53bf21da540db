"""The ops on a CUDA device against their references on the CPU; `make gpu` runs this where there is a GPU."""

import contextlib

import pytest
import torch
from optim_args import CODED, Args, compare
from optim_args import make as make_args

import pyops.optim
from pyops import ops
from pyops.ops import optim_codec as codec
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int8_linear import int8_linear_ref, quantize_rows_ref
from pyops.ops.optim import PARAM_STREAM, STREAMS_PER_PARAM, optim_step_ref, optim_sum_squares_ref
from pyops.ops.optim_rules import RULES
from pyops.ops.sparse_conv2d import sparse_conv2d_dw_ref, sparse_conv2d_dx_ref, sparse_conv2d_ref
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Decode, prefill, tall, wide, ragged in every direction, and K beyond what one program quantizes in registers.
SHAPES = [
    (1, 4096, 4096),
    (1, 1, 1),
    (7, 1000, 513),
    (16, 3072, 768),
    (33, 129, 2050),
    (64, 4096, 4096),
    (65, 515, 1024),
    (512, 768, 3072),
    (1000, 2304, 64),
    (2049, 255, 144),
    (3, 64, 65536),
]


def make(M, N, K, dtype=torch.bfloat16, seed=0):
    """x, q_w, w_scale, bias, residual on the CPU, of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    q_w, w_scale = ops.quantize_int8(torch.randn(N, K, generator=g) / max(K, 1) ** 0.5)
    return x, q_w, w_scale, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def on_gpu(*tensors):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors]


def call(x, q_w, w_scale, bias=None, residual=None, activation="none", x_scale=None):
    return ops.int8_linear(x, q_w, w_scale, bias, residual=residual, activation=activation, x_scale=x_scale)


def check(y, *args):
    """y is the reference, but for the device's exp and division and one rounding to y's dtype."""
    expected = int8_linear_ref(*args)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    rtol = max(2 * torch.finfo(y.dtype).eps, 4e-6)
    torch.testing.assert_close(y.cpu(), expected, rtol=rtol, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 17, 256, 4096, 11008, 16384, 65536])
def test_quantized_rows_are_exact(K, dtype):
    from pyops.kernels.int8_linear import quantize_rows

    x = make(37, 1, K, dtype)[0]
    x[1], x[2, 0], x[3, -1] = 0.0, float("nan"), float("inf")
    for scale in (None, torch.tensor(0.02), torch.linspace(0.005, 0.05, 37)):
        q, s = quantize_rows(x.cuda(), None if scale is None else scale.cuda())
        q_ref, s_ref = quantize_rows_ref(x, scale)
        assert torch.equal(q[:, :K].cpu(), q_ref)
        torch.testing.assert_close(s.cpu(), s_ref, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_linear(shape, dtype):
    args = make(*shape, dtype)
    check(call(*on_gpu(*args[:3])), *args[:3])
    check(call(*on_gpu(*args)), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [5, 200], ids=["split", "whole"])
def test_int8_linear_activations(M, activation, dtype):
    args = (*make(M, 320, 2048, dtype), activation)
    check(call(*on_gpu(*args)), *args)
    static = (*args, torch.tensor(0.02))
    check(call(*on_gpu(*static)), *static)


def test_int8_linear_is_as_close_to_float64_as_its_quantization_allows():
    x, q_w, w_scale, bias, residual = make(128, 512, 1024, torch.float32)
    q_x, s_x = quantize_rows_ref(x)
    exact = q_x.double() @ q_w.double().T * s_x[:, None].double() * w_scale.double() + bias + residual
    y = call(*on_gpu(x, q_w, w_scale, bias, residual)).cpu().double()
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-6).all()


def test_int8_linear_strides_and_batches():
    x, q_w, w_scale, bias, _ = make(48, 40, 64)
    for view in (x.view(6, 8, 64), x.view(6, 8, 64).transpose(0, 1), x[:, :1].expand(-1, 64), x[::3], x[0], x[:0]):
        residual = torch.randn(40, *view.shape[:-1]).movedim(0, -1).to(x.dtype)
        args = view, q_w, w_scale, bias, residual, "silu"
        check(call(*on_gpu(*args)), *args)


def test_int8_linear_rows_that_are_not_finite():
    x, q_w, w_scale, bias, residual = make(70, 64, 512)
    x[1, 5], x[69, 0] = float("nan"), float("-inf")
    for activation in ACTIVATIONS:
        y = call(*on_gpu(x, q_w, w_scale, bias, residual, activation))
        assert y[[1, 69]].isnan().all(), activation
        assert y[2:69].isfinite().all(), activation


@pytest.mark.parametrize("M", [4, 256])
def test_int8_linear_is_deterministic(M):
    args = on_gpu(*make(M, 4096, 4096))
    first = call(*args)
    assert all(torch.equal(call(*args), first) for _ in range(5))


@pytest.mark.parametrize("M", [1, 16, 300])
def test_int8_linear_in_a_cuda_graph(M):
    args = on_gpu(*make(M, 1024, 2048), "gelu")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(*args)  # tunes
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*args)
    for seed in (1, 2):
        args[0].copy_(make(M, 1, 2048, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, call(*args))


def test_int8_linear_beyond_two_billion_outputs():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    M, N, K = 70000, 32768, 32
    x, q_w, w_scale, _, _ = make(M, 1, K)[0], *make(1, N, K)[1:]
    y = call(*on_gpu(x, q_w, w_scale))
    for rows in (slice(0, 64), slice(M - 64, M)):
        check(y[rows], x[rows], q_w, w_scale)


def test_int8_linear_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    args = make(9, 128, 256)
    check(call(*(t.to("cuda:1") for t in args)), *args)


# ------------------------------------------------------------------------------------------------------ sparse_conv2d

# N, C, H, W, O, kernel, stride, padding (top, bottom, left, right), dilation, groups
CONVOLUTIONS = {
    "1x1": (4, 256, 14, 14, 512, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "3x3": (2, 64, 56, 56, 128, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3 stride 2": (3, 128, 28, 27, 192, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "last stage": (1, 512, 7, 7, 512, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "large kernel": (2, 48, 19, 33, 80, (7, 5), (2, 3), (3, 2, 0, 4), (1, 1), 1),
    "dilated": (2, 64, 31, 30, 64, (3, 3), (1, 1), (4, 4, 6, 6), (4, 6), 1),
    "dilated stride": (2, 64, 31, 30, 64, (3, 4), (2, 3), (0, 5, 3, 1), (3, 2), 1),
    "groups": (2, 192, 20, 20, 240, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "ragged": (3, 37, 9, 11, 53, (3, 3), (1, 2), (1, 1, 1, 1), (1, 1), 1),
    "one pixel": (65, 96, 1, 1, 100, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
}
FINE_PATTERNS = ("unstructured", "oc_block4", "oc_block8", "oc_block16", "ic_block4")
COARSE_PATTERNS = ("block16", "block32", "block64")


def make_convolution(name, pattern, dtype=torch.bfloat16, channels_last=True, density=0.3, seed=0):
    """x and a sparse weight on the CPU, and stride, padding, dilation, groups; outputs of order one."""
    N, C, H, W, O, kernel, *window = CONVOLUTIONS[name]
    g = torch.Generator().manual_seed(seed)
    bo, bc = PATTERNS[pattern]
    Cg, Og = C // window[-1], O // window[-1]
    keep = torch.rand(window[-1], -(-Og // bo), -(-Cg // bc), *kernel, generator=g) < density
    keep = keep.repeat_interleave(bo, 1)[:, :Og].repeat_interleave(bc, 2)[:, :, :Cg].reshape(O, Cg, *kernel)
    w = torch.randn(keep.shape, generator=g) / (Cg * kernel[0] * kernel[1] * density) ** 0.5
    weight = ops.SparseWeight.from_dense(w.to(dtype), keep, pattern=pattern, groups=window[-1])
    x = torch.randn(N, C, H, W, generator=g).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, weight, window


def weight_args(weight, device="cpu"):
    fields = weight.values, weight.crow_indices, weight.col_indices
    return (*(t.to(device) for t in fields), list(weight.shape), list(weight.block))


def check_convolution(name, pattern, dtype=torch.bfloat16, channels_last=True, activation="silu"):
    """Forward and both gradients are the references' of float64, but for rounding: once in the kernel, twice dense."""
    x, weight, window = make_convolution(name, pattern, dtype, channels_last)
    eps = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 5e-5  # cuDNN may choose Winograd's algorithm
    wide = (weight.values.double(), *weight_args(weight)[1:])
    z = sparse_conv2d_ref(x.double(), *wide, None, None, *window)
    g = torch.Generator().manual_seed(1)
    bias, residual = torch.randn(z.shape[1], generator=g), torch.randn(z.shape, generator=g).to(dtype)
    expected = sparse_conv2d_ref(x.double(), *wide, bias.double(), residual.double(), *window, activation)
    args = weight_args(weight, "cuda")
    y = torch.ops.pyops.sparse_conv2d(x.cuda(), *args, *on_gpu(bias, residual), *window, activation)
    assert y.dtype == dtype
    assert y.stride() == sparse_conv2d_ref(x, *weight_args(weight), None, None, *window).stride()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=eps, atol=2 * eps)
    grad = residual.contiguous(memory_format=torch.channels_last) if channels_last else residual
    expected = sparse_conv2d_dx_ref(grad.double(), *wide, x.shape, *window)
    dx = torch.ops.pyops.sparse_conv2d_dx(grad.cuda(), *args, x.shape, *window)
    torch.testing.assert_close(dx.cpu().double(), expected, rtol=eps, atol=2 * eps)
    expected = sparse_conv2d_dw_ref(grad.double(), x.double(), *wide[1:], *window)
    dw = torch.ops.pyops.sparse_conv2d_dw(grad.cuda(), x.cuda(), *args[1:], *window)
    torch.testing.assert_close(dw.cpu().double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.fixture
def no_tf32():
    """Convolutions of fp32 are exact; what a test sets instead ends with it."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", COARSE_PATTERNS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sparse_conv2d(name, pattern, dtype, no_tf32):
    check_convolution(name, pattern, dtype)


@pytest.mark.parametrize("pattern", ["block16", "block64", "oc_block8"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sparse_conv2d_in_nchw(name, pattern, no_tf32):
    check_convolution(name, pattern, torch.float16, channels_last=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", FINE_PATTERNS)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride 2", "dilated stride", "groups"])
def test_sparse_conv2d_of_fine_patterns(name, pattern, dtype, no_tf32):
    check_convolution(name, pattern, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sparse_conv2d_activations(activation, no_tf32):
    check_convolution("3x3", "block32", torch.bfloat16, activation=activation)


@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3 stride 2"])
def test_sparse_conv2d_in_tf32_errs_little_more_than_torch(name, no_tf32):
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    x, weight, (stride, padding, dilation, groups) = make_convolution(name, "block32", torch.float32)
    window = stride, padding[::2], dilation, groups
    exact = torch.conv2d(x.double(), weight.to_dense().double(), None, *window)
    y = ops.sparse_conv2d(x.cuda(), weight.to("cuda"), stride=stride, padding=padding, dilation=dilation)
    plain = torch.conv2d(x.cuda(), weight.to_dense().cuda(), None, *window)
    error, allowed = ((t.cpu().double() - exact).abs().max() for t in (y, plain))
    assert error <= 2 * allowed


def test_sparse_conv2d_strides(no_tf32):
    _, weight, window = make_convolution("3x3", "block32", torch.float32)
    wide = torch.randn(4, 70, 30, 26)
    views = (
        wide[:, 3:67, ::2, 3:],
        wide.contiguous(memory_format=torch.channels_last)[::2, 6:, 5:, 1:],
        wide[:, :64].transpose(2, 3),
        wide[:1, :64].expand(3, -1, -1, -1),
        wide.movedim(0, -1).contiguous().movedim(-1, 0)[:, 6:],
    )
    for x in views:
        expected = sparse_conv2d_ref(x, *weight_args(weight), None, None, *window)
        residual = torch.randn_like(expected.movedim(0, -1)).movedim(-1, 0)
        args = x.cuda(), *weight_args(weight, "cuda"), None, residual.cuda(), *window
        torch.testing.assert_close(
            torch.ops.pyops.sparse_conv2d(*args).cpu(), expected + residual, rtol=1e-5, atol=1e-5
        )


def test_sparse_conv2d_without_blocks_and_without_pixels():
    for pattern in ("block16", "oc_block16"):
        x, weight, window = make_convolution("3x3", pattern, density=0.0)
        bias = torch.randn(128)
        y = torch.ops.pyops.sparse_conv2d(x.cuda(), *weight_args(weight, "cuda"), bias.cuda(), None, *window)
        assert torch.equal(y.cpu(), bias.bfloat16()[:, None, None].expand(y.shape))
        dx = torch.ops.pyops.sparse_conv2d_dx(y, *weight_args(weight, "cuda"), x.shape, *window)
        assert not dx.any()
        assert torch.ops.pyops.sparse_conv2d(x[:0].cuda(), *weight_args(weight, "cuda")).shape == (0, 128, 54, 54)


def test_sparse_conv2d_trains():
    x, weight, _ = make_convolution("3x3", "block32", torch.float32)
    x, weight = x.cuda().requires_grad_(), weight.to("cuda")
    weight.values.requires_grad_()
    y = ops.sparse_conv2d(x, weight, padding=1, activation="silu")
    gradients = torch.autograd.grad(y.square().mean(), (x, weight.values))
    plain = torch.nn.functional.silu(torch.conv2d(x, weight.to_dense(), padding=1))
    expected = torch.autograd.grad(plain.square().mean(), (x, weight.values))
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=2e-3 * wanted.abs().max().item())  # TF32


def test_sparse_conv2d_is_deterministic():
    x, weight, window = make_convolution("3x3 stride 2", "block16")
    args = weight_args(weight, "cuda")
    y = torch.ops.pyops.sparse_conv2d(x.cuda(), *args, None, None, *window)
    grad = torch.ops.pyops.sparse_conv2d_dx(y, *args, x.shape, *window)
    for _ in range(5):
        assert torch.equal(torch.ops.pyops.sparse_conv2d(x.cuda(), *args, None, None, *window), y)
        assert torch.equal(torch.ops.pyops.sparse_conv2d_dx(y, *args, x.shape, *window), grad)


@pytest.mark.parametrize("pattern", ["block32", "oc_block16"])
def test_sparse_conv2d_in_a_cuda_graph(pattern):
    x, weight, window = make_convolution("3x3 stride 2", pattern)
    x, args = x.cuda(), weight_args(weight, "cuda")

    def both():
        y = torch.ops.pyops.sparse_conv2d(x, *args, None, None, *window, "relu")
        return y, torch.ops.pyops.sparse_conv2d_dx(y, *args, x.shape, *window)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()  # tunes
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in (1, 2):
        x.copy_(make_convolution("3x3 stride 2", pattern, seed=seed)[0])
        graph.replay()
        for actual, expected in zip(captured, both(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_sparse_conv2d_beyond_two_billion_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    weight = ops.SparseWeight.from_dense(torch.randn(32, 32, 3, 1).bfloat16(), pattern="block32").to("cuda")
    form = torch.channels_last
    x = torch.empty(9, 32, 2731, 2733, dtype=torch.bfloat16, device="cuda", memory_format=form).zero_()
    assert x.numel() > 2**31
    x[-1, :, -9:].normal_()
    y = ops.sparse_conv2d(x, weight, padding=(1, 0))
    torch.testing.assert_close(y[-1:, :, -6:], ops.sparse_conv2d(x[-1:, :, -8:], weight, padding=(1, 0))[:, :, 2:])
    assert not y[:-1].any()


# -------------------------------------------------------------------------------------------------------------- optim

BF16, FP32 = torch.bfloat16, torch.float32
OPTIM_SHAPES = ((70001,), (0,), (1,), (7,), (3, 43), (2, 3, 256), (300, 1000))
FORMATS = {
    "fp32": {},
    "bf16": {"dtype": BF16, "state_dtype": BF16, "stochastic_rounding": True},
    "int8": {"dtype": BF16, "state_dtype": CODED, "stochastic_rounding": True},
}
EVERYTHING = {
    "weight_decay": 0.125,
    "maximize": 1.0,
    "l1": 0.0625,
    "masked": True,
    "averaged": True,
    "zero_grad": True,
    "multiplier": torch.tensor(0.375),
    "first": [0, 0, 2, 1, 3, 0, 0],
}


def to_gpu(args: Args, capturable: bool = False) -> Args:
    """A copy whose tensors are on the GPU; scalars only if they are to be counted there."""
    moved = args.clone().map(lambda t: t.cuda())
    if not capturable:
        moved.scalars = [t.cpu() for t in moved.scalars]
    return moved


def step(args: Args) -> Args:
    args.call(torch.ops.pyops.optim_step)
    return args


def check_step(args: Args, capturable: bool = False) -> None:
    """A step on the GPU is the reference's on the CPU: but for the last place, and some things rounded by chance."""
    actual = step(to_gpu(args, capturable))
    args.call(optim_step_ref)
    compare(actual, args, 8, 2e-3)


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_optim_rules(rule, kind):
    check_step(make_args(rule, OPTIM_SHAPES, **FORMATS[kind]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", ["sgd", "adam_amsgrad", "rmsprop_centered_momentum", "lion", "lamb"])
def test_optim_with_everything(rule, kind):
    check_step(make_args(rule, OPTIM_SHAPES, **FORMATS[kind], **EVERYTHING))


def test_optim_mixed_dtypes_and_slices():
    dtypes = [FP32, BF16, torch.float16, torch.float64, BF16, FP32]
    states = [FP32, CODED, BF16, torch.float64, CODED, CODED]
    shapes = [(1000,), (333, 200), (5, 7), (129,), (64, 1030), (17, 144)]
    for rule in ("adam", "sgd_momentum"):
        check_step(make_args(rule, shapes, dtypes, states, stochastic_rounding=True))
    args = make_args("adam", ((40, 30), (40, 30), (2, 3, 4, 5)), FP32)
    args.grads[0] = args.grads[0].T.contiguous().T
    args.params[1] = args.params[1].repeat_interleave(2, dim=1)[:, ::2]
    for tensors in (args.params, args.grads, args.states):
        tensors[:] = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    check_step(args)


@pytest.mark.parametrize("rule", RULES)
def test_optim_scalars_on_the_device(rule):
    args = make_args(rule, OPTIM_SHAPES, steps=[1, 0, 5, 5, 99, 7, 3], weight_decay=0.1, decoupled=1.0)
    args.lr, args.found_inf, args.multiplier = torch.tensor(0.0625), torch.zeros(1), torch.tensor(0.5)
    check_step(args, capturable=True)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_optim_found_inf_leaves_everything(rule, capturable):
    args = make_args(rule, OPTIM_SHAPES, BF16, CODED, stochastic_rounding=True, **EVERYTHING)
    for value in (1.0, float("nan")):
        args.found_inf = torch.tensor(value)
        compare(step(to_gpu(args, capturable)), args)


@pytest.mark.parametrize("rule", ["sgd_momentum", "adam", "nadam", "lamb"])
def test_optim_does_not_wait_for_the_device(rule):
    args = make_args(rule, OPTIM_SHAPES, BF16, CODED, steps=[1, 0, 5, 5, 99, 7, 3], averaged=True, masked=True)
    on_host, on_device = to_gpu(args), to_gpu(args, capturable=True)
    on_device.lr, on_device.found_inf = torch.tensor(0.1).cuda(), torch.zeros(()).cuda()
    for case in (on_host, on_device):
        step(case)  # compiles
        case.grads = [g.clone() for g in case.grads]  # elsewhere, so that the table is made anew
        case.multiplier = torch.ones((), device="cuda")
        ops.optim_sum_squares(case.grads)
        step(case)
        with no_synchronization():
            case.grads = [g.clone() for g in case.grads]
            ops.optim_sum_squares(case.grads)
            step(case)
            step(case)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rule", ["sgd_momentum", "adam", "nadam", "lamb"])
def test_optim_in_a_cuda_graph(rule, kind):
    """Steps, lr and gradients change between replays; the tables are uploaded by the graph."""
    args = make_args(rule, OPTIM_SHAPES, **FORMATS[kind], steps=2, averaged=True)
    args.lr, args.found_inf = torch.tensor(0.1), torch.zeros(())
    captured = to_gpu(args, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured.clone())  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    for lr, found_inf in ((0.1, 0.0), (0.05, 0.0), (0.2, 1.0), (0.025, 0.0)):
        grads = [torch.randn(g.shape).to(g.dtype) for g in args.grads]
        for case in (args, captured):
            case.lr.fill_(lr)
            case.found_inf.fill_(found_inf)
            for g, value in zip(case.grads, grads, strict=True):
                g.copy_(value)
        junk = [torch.full((10000,), float("nan"), device="cuda") for _ in range(50)]
        graph.replay()
        del junk
        expected = args.clone()
        expected.call(optim_step_ref)
        compare(captured, expected, 16, 4e-3)
        args = captured.clone().map(lambda t: t.cpu())  # what was rounded by chance does not add up


@pytest.mark.parametrize("rule", ["adam", "lamb"])
def test_optim_is_deterministic(rule):
    args = make_args(rule, ((3000, 1000), (777,)), BF16, CODED, stochastic_rounding=True)
    first = step(to_gpu(args))
    for _ in range(3):
        compare(step(to_gpu(args)), first.map(lambda t: t.cpu()))


def test_optim_beyond_four_billion_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    n, tail = 2**32 + 1000, 3000
    p, g = torch.zeros(n, dtype=BF16, device="cuda"), torch.zeros(n, dtype=BF16, device="cuda")
    p[-tail:].normal_()
    g[-tail:].normal_()
    before = p[-tail:].float().cpu()
    args = Args("sgd", [p], [g], hyper=[0.25, 0, 0, 0, 0, 0, 0, 0, 0], stochastic_rounding=True, key=7, stream=0)
    step(args)
    i = torch.arange(n - tail, n)
    own = codec.word_key(7, PARAM_STREAM) ^ codec.mix(i >> 32)
    x = ((i & codec.MASK32) * 0x9E3779B1 + own) & codec.MASK32
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & codec.MASK32
    x = x ^ (x >> 16)
    assert PARAM_STREAM < STREAMS_PER_PARAM
    bits = x & 0xFFFF if PARAM_STREAM % 2 else x >> 16
    assert torch.equal(p[-tail:].cpu(), codec.round_to_bf16(before - 0.25 * g[-tail:].float().cpu(), bits))
    assert not p[:-tail].any()


def test_optim_sum_squares():
    g = torch.Generator().manual_seed(0)
    shapes = ((0,), (1,), (7,), (3, 700), (70001,), (1000, 1000))
    tensors = [torch.randn(s, generator=g).to(d) for s in shapes for d in (*DTYPES, torch.float64)]
    tensors += [torch.randn(20, 30).T, torch.randn(20, 30)[:, ::2], torch.randn(1, 9).expand(4, 9)]
    moved = [t.cuda() for t in tensors]
    moved += [moved[-1].T, moved[5][1:]]
    total = ops.optim_sum_squares(moved)
    assert total.is_cuda
    torch.testing.assert_close(total.cpu(), optim_sum_squares_ref([t.cpu() for t in moved]), rtol=1e-12, atol=0)
    assert all(torch.equal(ops.optim_sum_squares(moved), total) for _ in range(5))
    assert ops.optim_sum_squares([torch.full((10**6,), 3e38, device="cuda")]).item() == pytest.approx(9e82, rel=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_optimizer_classes(capturable):
    torch.manual_seed(0)
    for name, options in (("AdamW", {"capturable": capturable}), ("SGD", {"momentum": 0.9}), ("RMSprop", {})):
        theirs = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
        ours = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10)).cuda()
        ours.load_state_dict(theirs.state_dict())
        optimizers = [
            getattr(module, name)(model.parameters(), lr=0.01, **options)
            for module, model in ((pyops.optim, ours), (torch.optim, theirs))
        ]
        for _ in range(5):
            x = torch.randn(32, 300, device="cuda")
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
