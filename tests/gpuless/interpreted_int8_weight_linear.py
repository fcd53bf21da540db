"""kernels/int8_weight_linear.py against its contract; run by test_triton_interpreter.py."""

import math

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops.kernels import int8_weight_linear as kernels
from pyops.kernels import weight_only
from pyops.kernels.weight_only import Plan
from pyops.ops import int8_weight_linear, pack_int8, quantize_int8
from pyops.ops.epilogue import ACTIVATIONS, epilogue_ref
from pyops.ops.int8_weight_linear import int8_weight_linear_ref

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TUNER = kernels._int8_weight_linear_kernel
call = kernels.int8_weight_linear


@pytest.fixture(autouse=True)
def few_configs(monkeypatch):
    """The largest tile that suits, so that tuning has nothing to choose; test_every_config takes the others."""

    def largest(*args, **kwargs):
        sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return [max(kernels._prune(*args, **kwargs), key=lambda c: math.prod(c.kwargs[name] for name in sizes))]

    monkeypatch.setattr(TUNER, "early_config_prune", largest)
    monkeypatch.setattr(TUNER, "cache", {})


@pytest.fixture
def dense(monkeypatch):
    """Every call is dequantized first."""
    monkeypatch.setattr(weight_only, "FUSED_ROWS", 0)
    monkeypatch.setattr(weight_only, "FUSED_ROWS_FP32", 0)


@pytest.fixture(params=["fused", "dense"])
def way(request):
    """Each of the two ways that a call can take."""
    if request.param == "dense":
        request.getfixturevalue("dense")
    return request.param


def make(M, N, K, dtype=torch.float32, seed=0):
    """x, w_q, w_scale, bias and residual of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    weight = quantize_int8(torch.randn(N, K, generator=g) / max(K, 1) ** 0.5)
    return x, *weight, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def check(y, x, w_q, w_scale, bias=None, residual=None, activation="none"):
    """At most twice the error of plain PyTorch in this dtype against float64, and eps·√K."""
    N, K = w_q.shape
    assert y.shape == (*x.shape[:-1], N)
    assert y.dtype == x.dtype
    if not y.numel():
        return
    rest = [None if t is None else t.double() for t in (bias, residual)]
    w = w_q.double() * w_scale.double()[:, None]
    exact = epilogue_ref(x.double() @ w.T, *rest, activation, torch.float64)
    plain = epilogue_ref(x @ w.to(x.dtype).T, bias, residual, activation, x.dtype)
    eps = torch.finfo(x.dtype).eps
    bound = 2 * (plain.double() - exact).abs().max() + eps * K**0.5 + 3e-7  # of the activations' polynomials
    assert (y.double() - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("M", "dtype", "plan"),
    [
        (1, torch.bfloat16, Plan(fused=True, split_k=4)),
        (64, torch.float32, Plan(fused=True, split_k=4)),
        (65, torch.float32, Plan(fused=False)),
        (65, torch.float16, Plan(fused=True)),
        (256, torch.bfloat16, Plan(fused=True)),
        (257, torch.float16, Plan(fused=False)),
    ],
)
def test_plan(M, dtype, plan):
    assert weight_only.plan(M, 4096, 4096, dtype, 132) == plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruning_leaves_configs_that_fit(dtype):
    for bucket in (4, 8, 16, 32, 64, 128, 256, 4096):
        left = kernels._prune(kernels.CONFIGS, {"x_ptr": torch.empty(0, dtype=dtype), "M_BUCKET": bucket})
        assert left
        assert all(config.kwargs["BLOCK_M"] <= max(bucket, 16) for config in left)


# One row, a split with a remainder, K odd or no multiple of a step, and of each dtype rows beyond what is fused.
SHAPES = [(1, 1, 1), (1, 40, 1100), (5, 33, 31), (17, 65, 320), (67, 70, 257), (131, 20, 192), (258, 20, 40)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    args = make(*shape, dtype)
    check(call(*args, "relu"), *args, "relu")
    check(call(*args[:3]), *args[:3])


SIZE = st.integers(0, 70)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(SIZE, SIZE, st.integers(0, 300), st.sampled_from(DTYPES), st.sampled_from([*ACTIVATIONS]))
def test_any_shape(M, N, K, dtype, activation):
    args = (*make(M, N, K, dtype, seed=M + N + K), activation)
    check(call(*args), *args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("K", [1024, 96], ids=["split", "whole"])
def test_activations(K, activation, way):
    x, w_q, scale, bias, residual = make(3, 50, K, torch.float16)
    for b, r in ((bias.half(), None), (bias, residual)):
        args = x, w_q, scale, b, r, activation
        check(call(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight(dtype, way):
    """All of int8 under one-hot rows of x, which read the weight out: exact where s · q is. -128 too."""
    w_q = torch.arange(-128, 128).to(torch.int8).view(16, 16).T
    y = call(torch.eye(16, dtype=dtype), w_q, torch.full((16,), 0.25))
    assert torch.equal(y.float(), 0.25 * w_q.T.float())


def test_sums_may_leave_the_range_of_fp16():
    """Fused, the scale meets the sums in fp32: 127 · 1000 · 64 is nothing that fp16 could hold."""
    x, w_q = torch.full((2, 64), 1000.0, dtype=torch.float16), torch.full((32, 64), 127, dtype=torch.int8)
    y = call(x, w_q, torch.full((32,), 1e-4))
    torch.testing.assert_close(y, torch.full((2, 32), 812.8, dtype=torch.float16))


def test_slabs(monkeypatch, dense):
    monkeypatch.setattr(weight_only, "SLAB_BYTES", 1)
    monkeypatch.setattr(weight_only, "SLAB_ROWS", 16)
    x, w_q, scale, bias, residual = make(9, 70, 64, torch.bfloat16)
    for rest in ((), (bias.bfloat16(),), (bias, residual, "gelu")):
        check(call(x, w_q, scale, *rest), x, w_q, scale, *rest)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.T[:40],
        lambda x: x[:, 1:],
        lambda x: x[:1].expand(9, -1),
        lambda x: x.reshape(6, 8, 64).transpose(0, 1),
        lambda x: x[0],
    ],
    ids=["columns", "transposed", "offset", "expanded", "permuted", "1-D"],
)
def test_strides(view, way):
    x = view(make(48, 1, 64)[0])
    N = 21
    _, w_q, scale, bias, _ = make(1, 2 * N, x.shape[-1])
    residual = torch.randn(N, *x.shape[:-1]).movedim(0, -1)
    args = x, w_q[::2], scale[::2], bias[::2], residual, "tanh"
    check(call(*args), *args)


@pytest.mark.parametrize("K", [70, 128])
def test_packed_and_shifted_weights(K):
    x, w_q, scale, bias, _ = make(4, 50, K)
    expected = call(x, w_q, scale, bias)
    shifted = torch.zeros(w_q.numel() + 1, dtype=torch.int8)[1:].view(w_q.shape).copy_(w_q)
    for weight in (pack_int8(w_q), shifted, w_q.T.contiguous().T):
        assert torch.equal(call(x, weight, scale, bias), expected)


def test_rows_that_are_not_finite(way):
    x, w_q, scale, bias, _ = make(6, 20, 64)
    x[1, 7], x[2, 0], x[3, 49] = float("nan"), float("inf"), -float("inf")
    expected = int8_weight_linear_ref(x, w_q, scale, bias)
    torch.testing.assert_close(call(x, w_q, scale, bias), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_config(config, monkeypatch):
    """With the dtypes that it is for, in whole steps and not."""
    monkeypatch.setattr(TUNER, "early_config_prune", lambda *args, **kwargs: [config])
    for dtype in DTYPES[:1] if config.kwargs["BLOCK_N"] == 32 else DTYPES[1:]:
        for shape in ((5, 33, 144), (19, 40, 256)):
            TUNER.cache.clear()
            args = (*make(*shape, dtype), "gelu")
            check(call(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_add_up(dtype, monkeypatch):
    args = (*make(3, 33, 1100, dtype), "silu")
    for split in (1, 2, 16):
        monkeypatch.setattr(weight_only, "choose_split", lambda *_, split=split: split)
        check(call(*args), *args)


@pytest.mark.parametrize(("M", "K"), [(10, 1536), (200, 128)])
def test_order_of_programs_does_not_change_a_bit(M, K):
    args = (*make(M, 200, K, torch.bfloat16), "gelu_tanh")
    expected = call(*args)
    with interpreter.shuffled_programs(1):
        assert torch.equal(call(*args), expected)


def test_through_the_dispatcher():
    x, w_q, scale, bias, residual = make(6, 40, 70, torch.bfloat16)
    y = int8_weight_linear(x, w_q, scale, bias, residual=residual, activation="silu")
    assert torch.equal(y, call(x, w_q, scale, bias, residual, "silu"))


def test_gradient_past_the_kernel():
    x, w_q, scale, bias, _ = make(5, 40, 70)
    x.requires_grad_()
    int8_weight_linear(x, w_q, scale, bias).sum().backward()
    expected = (w_q * scale[:, None]).sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
