"""The ops on a CUDA device against their references on the CPU; `make gpu` runs this where there is a GPU."""

import pytest
import torch

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int8_linear import int8_linear_ref, quantize_rows_ref

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
