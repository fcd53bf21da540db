"""The op `pyops::int4_linear` on a CUDA device against float64 and its reference on the CPU."""

import pytest
import torch
from gpu_cases import DTYPES, cuda_graph, needs_cuda, needs_memory, needs_two_devices, on_gpu, views

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS, epilogue_ref
from pyops.ops.int4_linear import int4_linear_ref
from pyops.ops.int4_weight import dequantize_int4

pytestmark = needs_cuda

# Decode; odd K; one group cut by K; rows that split K, that fill the device, and that are dequantized first.
SHAPES = [
    (1, 4096, 4096, 128),
    (1, 1, 1, 32),
    (3, 1000, 513, 64),
    (16, 3072, 768, 32),
    (33, 129, 2050, 192),
    (64, 4096, 4096, -1),
    (65, 515, 1024, 128),
    (200, 768, 3072, 32),
    (257, 2304, 96, 64),
    (1000, 255, 1152, -1),
    (3, 64, 65536, 128),
]


def make(M, N, K, G, dtype=torch.bfloat16, symmetric=False, seed=0):
    """x, (w_q, w_scale, w_zero), bias and residual on the CPU, of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    weight = ops.quantize_int4(torch.randn(N, K, generator=g) / K**0.5, G, symmetric=symmetric)
    return x, weight, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def call(x, weight, bias=None, residual=None, activation="none", G=128, compute="float", order=None, on="cuda"):
    """The op on a device, its result on it too."""
    x, w_q, w_scale, w_zero, bias, residual, order = (
        None if t is None else t.to(on) for t in (x, *weight, bias, residual, order)
    )
    options = {"group_size": G, "residual": residual, "activation": activation, "compute": compute, "order": order}
    return ops.int4_linear(x, w_q, w_scale, w_zero, bias, **options)


def check(y, x, weight, bias=None, residual=None, activation="none", G=128, compute="float", order=None):
    """int8: the reference. float: at most twice the error of the dense layer on this device, and eps·√K."""
    K, N = x.shape[-1], weight[0].shape[0]
    assert y.shape == (*x.shape[:-1], N)
    assert y.dtype == x.dtype
    eps = torch.finfo(x.dtype).eps
    if compute == "int8":
        expected = int4_linear_ref(x, *weight, bias, residual, activation, G, N, order, compute)
        torch.testing.assert_close(y.cpu(), expected, rtol=max(2 * eps, 4e-6), atol=4e-6, equal_nan=True)
        return
    rows = x if order is None else x[..., order.long()]
    rest = [None if t is None else t.double() for t in (bias, residual)]
    exact = epilogue_ref(
        rows.double() @ dequantize_int4(*weight, K, G, torch.float64).T, *rest, activation, torch.float64
    )
    plain = rows.cuda() @ dequantize_int4(*weight, K, G, x.dtype).cuda().T
    plain = epilogue_ref(plain.cpu(), bias, residual, activation, x.dtype)
    bound = 2 * (plain.double() - exact).abs().max() + eps * K**0.5 + 4e-6
    assert (y.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_linear(shape, dtype, compute):
    G = shape[-1]
    for symmetric in (False, True):
        x, weight, bias, residual = make(*shape, dtype, symmetric)
        check(call(x, weight, G=G, compute=compute), x, weight, G=G, compute=compute)
        args = x, weight, bias, residual, "relu", G, compute
        check(call(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("M", [5, 60, 300], ids=["split", "tall", "dense"])
def test_int4_linear_activations(M, activation, dtype):
    for compute in ("float", "int8"):
        args = (*make(M, 320, 2048, 128, dtype), activation, 128, compute)
        check(call(*args), *args)


@pytest.mark.parametrize("M", [1, 100, 300])
def test_int4_linear_every_byte(M):
    w_q = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale, zero = torch.full((16, 1), 0.25, dtype=torch.bfloat16), torch.arange(16, dtype=torch.uint8).view(16, 1) + 1
    for dtype in DTYPES:
        x = torch.eye(32, dtype=dtype).repeat(-(-M // 32), 1)[:M]
        for w_zero in (None, zero):
            y = call(x, (w_q, scale, w_zero), G=32)
            expected = dequantize_int4(w_q, scale, w_zero, 32, 32, dtype).T
            assert torch.equal(y.cpu(), expected.repeat(-(-M // 32), 1)[:M])


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_int4_linear_strides_orders_and_batches(compute):
    x, weight, bias, _ = make(48, 40, 64, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).int()
    for view in views(x)[:-1]:
        residual = torch.randn(40, *view.shape[:-1]).movedim(0, -1).to(x.dtype)
        for columns in (None, order):
            args = view, weight, bias, residual, "silu", 32, compute, columns
            check(call(*args), *args)
    assert call(x[:0], weight, bias, G=32, compute=compute).shape == (0, 40)


def test_int4_linear_takes_a_weight_packed_for_the_cpu():
    x, weight, bias, _ = make(9, 40, 70, 32)
    packed = [t.cuda() for t in ops.pack_int4(*weight, 70, 32)]
    y = ops.int4_linear(x.cuda(), *packed, bias.cuda(), group_size=32, out_features=40)
    assert torch.equal(y, call(x, weight, bias, G=32))


def test_int4_linear_rows_that_are_not_finite():
    x, weight, bias, residual = make(70, 64, 512, 128)
    x[1, 5], x[69, 0] = float("nan"), float("-inf")
    for activation in ACTIVATIONS:
        y = call(x, weight, bias, residual, activation, compute="int8")
        assert y[[1, 69]].isnan().all(), activation
        assert y[2:69].isfinite().all(), activation
    y = call(x, weight, bias, residual)
    assert not y[[1, 69]].isfinite().any()
    assert y[2:69].isfinite().all()


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("M", [4, 200, 300])
def test_int4_linear_is_deterministic(M, compute):
    args = make(M, 4096, 4096, 128)[:2]
    first = call(*args, compute=compute)
    assert all(torch.equal(call(*args, compute=compute), first) for _ in range(5))


@pytest.mark.parametrize("M", [1, 16, 100, 300])
def test_int4_linear_in_a_cuda_graph(M):
    x, weight, bias, residual = make(M, 1024, 2048, 128)
    x, bias, residual, *weight = on_gpu(x, bias, residual, *weight)

    def run():
        return ops.int4_linear(x, *weight, bias, residual=residual, activation="gelu")

    graph, y = cuda_graph(run)
    for seed in (1, 2):
        x.copy_(make(M, 1, 2048, 128, seed=seed)[0])
        graph.replay()
        assert torch.equal(y, run())


def test_int4_linear_dequantizes_in_slabs(monkeypatch):
    from pyops.kernels import weight_only

    args = (*make(300, 1000, 1024, 128), "gelu")
    expected = call(*args)
    monkeypatch.setattr(weight_only, "SLAB_BYTES", 1)
    check(call(*args), *args)
    torch.testing.assert_close(call(*args), expected, rtol=2e-2, atol=2e-2)


def test_int4_linear_trains():
    x, weight, bias, residual = make(40, 96, 128, 32, torch.float32)
    x, bias, residual, *weight = on_gpu(x, bias, residual, *weight)
    inputs = [t.requires_grad_() for t in (x, bias, residual)]
    y = ops.int4_linear(x, *weight, bias, group_size=32, residual=residual, activation="silu")
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    plain = torch.nn.functional.silu(x @ dequantize_int4(*weight, 128, 32).T + bias + residual)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_int4_linear_beyond_two_billion_outputs():
    needs_memory(24)
    M, N, K = 70000, 32768, 32
    x, weight = make(M, 1, K, 32)[0], make(1, N, K, 32)[1]
    for compute in ("float", "int8"):
        y = call(x, weight, G=32, compute=compute)
        for rows in (slice(0, 64), slice(M - 64, M)):
            check(y[rows], x[rows], weight, G=32, compute=compute)
        del y


def test_int4_linear_on_a_device_that_is_not_current():
    needs_two_devices()
    x, weight, bias, residual = make(9, 128, 256, 64)
    check(call(x, weight, bias, residual, G=64, on="cuda:1"), x, weight, bias, residual, G=64)
