"""The op `pyops::int8_linear` on a CUDA device against its reference on the CPU."""

import pytest
import torch
from gpu_cases import DTYPES, SHAPES, cuda_graph, make_int8, needs_cuda, needs_memory, needs_two_devices, on_gpu, views

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int8_linear import int8_linear_ref, quantize_rows_ref

pytestmark = needs_cuda


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

    x = make_int8(37, 1, K, dtype)[0]
    x[1], x[2, 0], x[3, -1] = 0.0, float("nan"), float("inf")
    for scale in (None, torch.tensor(0.02), torch.linspace(0.005, 0.05, 37)):
        q, s = quantize_rows(x.cuda(), None if scale is None else scale.cuda())
        q_ref, s_ref = quantize_rows_ref(x, scale)
        assert torch.equal(q[:, :K].cpu(), q_ref)
        torch.testing.assert_close(s.cpu(), s_ref, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_linear(shape, dtype):
    args = make_int8(*shape, dtype)
    check(call(*on_gpu(*args[:3])), *args[:3])
    check(call(*on_gpu(*args)), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [5, 200], ids=["split", "whole"])
def test_int8_linear_activations(M, activation, dtype):
    args = (*make_int8(M, 320, 2048, dtype), activation)
    check(call(*on_gpu(*args)), *args)
    static = (*args, torch.tensor(0.02))
    check(call(*on_gpu(*static)), *static)


def test_int8_linear_is_as_close_to_float64_as_its_quantization_allows():
    x, q_w, w_scale, bias, residual = make_int8(128, 512, 1024, torch.float32)
    q_x, s_x = quantize_rows_ref(x)
    exact = q_x.double() @ q_w.double().T * s_x[:, None].double() * w_scale.double() + bias + residual
    y = call(*on_gpu(x, q_w, w_scale, bias, residual)).cpu().double()
    assert ((y - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-6).all()


def test_int8_linear_strides_and_batches():
    x, q_w, w_scale, bias, _ = make_int8(48, 40, 64)
    for view in views(x):
        residual = torch.randn(40, *view.shape[:-1]).movedim(0, -1).to(x.dtype)
        args = view, q_w, w_scale, bias, residual, "silu"
        check(call(*on_gpu(*args)), *args)


def test_int8_linear_rows_that_are_not_finite():
    x, q_w, w_scale, bias, residual = make_int8(70, 64, 512)
    x[1, 5], x[69, 0] = float("nan"), float("-inf")
    for activation in ACTIVATIONS:
        y = call(*on_gpu(x, q_w, w_scale, bias, residual, activation))
        assert y[[1, 69]].isnan().all(), activation
        assert y[2:69].isfinite().all(), activation


@pytest.mark.parametrize("M", [4, 256])
def test_int8_linear_is_deterministic(M):
    args = on_gpu(*make_int8(M, 4096, 4096))
    first = call(*args)
    assert all(torch.equal(call(*args), first) for _ in range(5))


@pytest.mark.parametrize("M", [1, 16, 300])
def test_int8_linear_in_a_cuda_graph(M):
    args = on_gpu(*make_int8(M, 1024, 2048), "gelu")
    graph, y = cuda_graph(lambda: call(*args))
    for seed in (1, 2):
        args[0].copy_(make_int8(M, 1, 2048, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, call(*args))


def test_int8_linear_beyond_two_billion_outputs():
    needs_memory(24)
    M, N, K = 70000, 32768, 32
    x, q_w, w_scale, _, _ = make_int8(M, 1, K)[0], *make_int8(1, N, K)[1:]
    y = call(*on_gpu(x, q_w, w_scale))
    for rows in (slice(0, 64), slice(M - 64, M)):
        check(y[rows], x[rows], q_w, w_scale)


def test_int8_linear_on_a_device_that_is_not_current():
    needs_two_devices()
    args = make_int8(9, 128, 256)
    check(call(*(t.to("cuda:1") for t in args)), *args)
