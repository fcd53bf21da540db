"""The op `pyops::int8_weight_linear` on a CUDA device against float64, as close as a dense layer."""

import pytest
import torch
from gpu_cases import DTYPES, SHAPES, cuda_graph, make_int8, needs_cuda, on_gpu, views

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS, epilogue_ref
from pyops.ops.int8_weight_linear import int8_weight_linear_ref

pytestmark = needs_cuda


def call(x, q_w, w_scale, bias=None, residual=None, activation="none"):
    return ops.int8_weight_linear(x, q_w, w_scale, bias, residual=residual, activation=activation)


def check(y, x, q_w, w_scale, bias=None, residual=None, activation="none"):
    """At most twice the error of the dense layer on this device, and eps·√K."""
    assert y.shape == (*x.shape[:-1], q_w.shape[0])
    assert y.dtype == x.dtype
    if not y.numel():
        return
    rest = [None if t is None else t.double() for t in (bias, residual)]
    w = q_w.double() * w_scale.double()[:, None]
    exact = epilogue_ref(x.double() @ w.T, *rest, activation, torch.float64)
    plain = (x.cuda() @ w.to(x.dtype).cuda().T).cpu()
    plain = epilogue_ref(plain, bias, residual, activation, x.dtype)
    bound = 2 * (plain.double() - exact).abs().max() + torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 + 4e-6
    assert (y.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weight_linear(shape, dtype):
    args = make_int8(*shape, dtype)
    check(call(*on_gpu(*args[:3])), *args[:3])
    check(call(*on_gpu(*args)), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [5, 100, 300], ids=["split", "whole", "dense"])
def test_int8_weight_linear_activations(M, activation, dtype):
    args = (*make_int8(M, 320, 2048, dtype), activation)
    check(call(*on_gpu(*args)), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [16, 96, 304], ids=["split", "whole", "dense"])
def test_int8_weight_linear_every_weight(M, dtype):
    """One-hot rows of x read the weight out: exact where s · q is."""
    q_w = torch.arange(-128, 128).to(torch.int8).view(16, 16).T
    y = call(*on_gpu(torch.eye(16, dtype=dtype).repeat(M // 16, 1), q_w, torch.full((16,), 0.25)))
    assert torch.equal(y.float().cpu(), 0.25 * q_w.T.float().repeat(M // 16, 1))


def test_int8_weight_linear_strides_and_batches():
    x, q_w, w_scale, bias, _ = make_int8(48, 40, 64)
    for view in views(x):
        residual = torch.randn(40, *view.shape[:-1]).movedim(0, -1).to(x.dtype)
        args = view, q_w, w_scale, bias, residual, "silu"
        check(call(*on_gpu(*args)), *args)


def test_int8_weight_linear_takes_a_weight_packed_for_the_cpu():
    x, q_w, w_scale, bias, _ = make_int8(9, 40, 70)
    packed = on_gpu(x, ops.pack_int8(q_w), w_scale, bias)
    assert torch.equal(call(*packed), call(*on_gpu(x, q_w, w_scale, bias)))


@pytest.mark.parametrize("M", [6, 70, 300])
def test_int8_weight_linear_rows_that_are_not_finite(M):
    x, q_w, w_scale, bias, _ = make_int8(M, 64, 512)
    x[1, 5], x[M - 1, 0] = float("nan"), float("-inf")
    y = call(*on_gpu(x, q_w, w_scale, bias)).cpu()
    expected = int8_weight_linear_ref(x, q_w, w_scale, bias)
    assert not y[[1, M - 1]].isfinite().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[2 : M - 1].isfinite().all()


@pytest.mark.parametrize("M", [1, 16, 100, 300])
def test_int8_weight_linear_in_a_cuda_graph(M):
    args = on_gpu(*make_int8(M, 1024, 2048), "gelu")
    graph, y = cuda_graph(lambda: call(*args))
    for seed in (1, 2):
        args[0].copy_(make_int8(M, 1, 2048, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, call(*args))


@pytest.mark.parametrize("M", [4, 200, 300])
def test_int8_weight_linear_is_deterministic(M):
    args = on_gpu(*make_int8(M, 4096, 4096))
    first = call(*args)
    assert all(torch.equal(call(*args), first) for _ in range(5))
