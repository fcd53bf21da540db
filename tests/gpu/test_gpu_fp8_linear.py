"""The op `pyops::fp8_linear` on a CUDA device against float64 and its reference on the CPU."""

import pytest
import torch
from fp8_cases import GRANULARITIES, assert_close_to_oracle, problem
from gpu_cases import DTYPES, SHAPES, cuda_graph, make_int8, needs_cuda, on_gpu, views

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.fp8_linear import fp8_linear_ref, quantize_x_ref

pytestmark = needs_cuda


@pytest.fixture(params=GRANULARITIES)
def granularity(request):
    return request.param


def make(M, N, K, granularity, dtype=torch.bfloat16):
    """x, w_q, w_scale, bias, residual on the CPU."""
    return *problem(M, N, K, granularity, dtype), *make_int8(M, N, 1, dtype)[3:]


def call(x, w_q, w_scale, bias=None, residual=None, activation="none", x_scale=None):
    return ops.fp8_linear(x, w_q, w_scale, bias, residual=residual, activation=activation, x_scale=x_scale)


TENSOR_CORE_SUMS = 2.0**-10
"""Hopper's fp8 tensor cores cut products off 13 bits below the largest of those that they add at once."""


def check(*args):
    """Against float64 where there is e4m3; older devices multiply rounded values: a few roundings of x's dtype."""
    y = call(*on_gpu(*args)).cpu()
    if torch.cuda.get_device_capability() >= (8, 9):
        assert_close_to_oracle(y, *args, inexact=TENSOR_CORE_SUMS)
        return
    expected = fp8_linear_ref(*args)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    atol = 4 * torch.finfo(y.dtype).eps * float(expected.abs().max() + 1) if y.numel() else 0.0
    torch.testing.assert_close(y, expected, rtol=0.02, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 17, 256, 4096, 11008, 16384, 65536])
def test_fp8_codes_are_exact(K, dtype, granularity):
    from pyops.kernels.fp8_linear import quantize_x

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no e4m3")
    x = problem(37, 1, K, granularity, dtype)[0]
    x[1], x[2, 0], x[3, -1] = 0.0, float("nan"), float("inf")
    by_block = granularity == "block"
    for scale in (None,) if by_block else (None, torch.tensor(0.02), torch.linspace(0.005, 0.05, 37)):
        codes, s = quantize_x(x.cuda(), by_block, None if scale is None else scale.cuda())
        expected, s_ref = quantize_x_ref(x, granularity, scale)
        assert torch.equal(codes[:, :K].cpu().view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert not codes[:, K:].view(torch.uint8).any()
        torch.testing.assert_close((s.T if by_block else s).cpu(), s_ref, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_linear(shape, dtype, granularity):
    args = make(*shape, granularity, dtype)
    check(*args[:3])  # torch._scaled_mm, where the plan takes it
    check(*args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [5, 200], ids=["split", "whole"])
def test_fp8_linear_activations(M, activation, granularity):
    check(*make(M, 320, 2048, granularity, torch.float32), activation)
    if granularity == "row":
        check(*make(M, 320, 2048, granularity), activation, torch.tensor(0.02))


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_fp8_linear_with_many_rows(bias_dtype):
    """Both sides of the plan's choice for bf16 on Hopper."""
    for M in (255, 256, 4096):
        x, *w, bias, _ = make(M, 1024, 2048, "row")
        check(x, *w, None if bias_dtype is None else bias.to(bias_dtype))


def test_fp8_linear_strides_and_batches(granularity):
    x, *w, bias, _ = make(48, 40, 64, granularity)
    for view in views(x):
        residual = torch.randn(40, *view.shape[:-1]).movedim(0, -1).to(x.dtype)
        check(view, *w, bias, residual, "silu")


@pytest.mark.parametrize("M", [70, 300])
def test_fp8_linear_rows_that_are_not_finite(M, granularity):
    x, *w, bias, residual = make(M, 64, 512, granularity)
    x[1, 5], x[69, 0] = float("nan"), float("-inf")
    for rest in ((), *((bias, residual, activation) for activation in ACTIVATIONS)):
        y = call(*on_gpu(x, *w, *rest))
        assert y[[1, 69]].isnan().all(), rest[2:]
        assert y[2:69].isfinite().all(), rest[2:]


@pytest.mark.parametrize("M", [4, 256])
def test_fp8_linear_is_deterministic(M, granularity):
    args = on_gpu(*make(M, 4096, 4096, granularity))
    first = call(*args)
    assert all(torch.equal(call(*args), first) for _ in range(5))


@pytest.mark.parametrize("M", [1, 16, 300])
def test_fp8_linear_in_a_cuda_graph(M, granularity):
    for count in (3, 5):  # without and with what torch._scaled_mm cannot do
        args = on_gpu(*make(M, 1024, 2048, granularity)[:count])
        graph, y = cuda_graph(lambda args=args: call(*args))
        for seed in (1, 2):
            args[0].copy_(make_int8(M, 1, 2048, seed=seed)[0])
            graph.replay()
            assert torch.equal(y, call(*args))
