"""The ops of sparse convolutions on a CUDA device against their references of float64 on the CPU."""

import pytest
import torch
from gpu_cases import DTYPES, cuda_graph, needs_cuda, needs_memory, on_gpu

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.sparse_conv2d import sparse_conv2d_dw_ref, sparse_conv2d_dx_ref, sparse_conv2d_ref
from pyops.ops.sparse_weight import PATTERNS

pytestmark = needs_cuda

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

    graph, captured = cuda_graph(both)
    for seed in (1, 2):
        x.copy_(make_convolution("3x3 stride 2", pattern, seed=seed)[0])
        graph.replay()
        for actual, expected in zip(captured, both(), strict=True):
            torch.testing.assert_close(actual, expected)


def test_sparse_conv2d_beyond_two_billion_elements():
    needs_memory(24)
    weight = ops.SparseWeight.from_dense(torch.randn(32, 32, 3, 1).bfloat16(), pattern="block32").to("cuda")
    form = torch.channels_last
    x = torch.empty(9, 32, 2731, 2733, dtype=torch.bfloat16, device="cuda", memory_format=form).zero_()
    assert x.numel() > 2**31
    x[-1, :, -9:].normal_()
    y = ops.sparse_conv2d(x, weight, padding=(1, 0))
    torch.testing.assert_close(y[-1:, :, -6:], ops.sparse_conv2d(x[-1:, :, -8:], weight, padding=(1, 0))[:, :, 2:])
    assert not y[:-1].any()
