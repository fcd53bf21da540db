"""kernels/int4_linear.py against its contract; run by test_triton_interpreter.py."""

import math

import interpreter
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops.kernels import int4_linear as kernels
from pyops.kernels import matmul, weight_only
from pyops.kernels.weight_only import Plan
from pyops.ops import int4_linear, pack_int4, quantize_int4
from pyops.ops.epilogue import ACTIVATIONS, epilogue_ref
from pyops.ops.int4_linear import int4_linear_ref
from pyops.ops.int4_weight import dequantize_int4

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPUTES = ["float", "int8"]
WAYS = [("float", 256), ("float", 0), ("int8", 256)]
"""compute, and how many rows are fused: 0 is the dense GEMM for all."""


@pytest.fixture(autouse=True)
def few_configs(monkeypatch):
    """The largest tile that suits, so that tuning has nothing to choose; test_every_config takes the others."""
    tuner, prune = kernels._int4_linear_kernel, kernels._prune

    def size(config):
        return math.prod(config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))

    monkeypatch.setattr(tuner, "early_config_prune", lambda *args, **kwargs: [max(prune(*args, **kwargs), key=size)])
    monkeypatch.setattr(tuner, "cache", {})


@pytest.fixture
def dense(monkeypatch):
    """Sets how few rows are dequantized first; 0 is for all."""

    def set_rows(rows):
        monkeypatch.setattr(weight_only, "FUSED_ROWS", rows)
        monkeypatch.setattr(weight_only, "FUSED_ROWS_FP32", rows)

    return set_rows


def make(M, N, K, G=128, dtype=torch.float32, symmetric=False, scale_dtype=torch.bfloat16, seed=0):
    """x, (w_q, w_scale, w_zero), bias and residual of a layer with outputs of order one."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    w = torch.randn(N, K, generator=g) / max(K, 1) ** 0.5
    weight = quantize_int4(w, G, symmetric=symmetric, scale_dtype=scale_dtype)
    return x, weight, torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)


def call(x, weight, bias=None, residual=None, activation="none", G=128, order=None, compute="float"):
    N = weight[0].shape[0]
    return kernels.int4_linear(x, *weight, bias, residual, activation, G, N, order, compute)


def exact(x, weight, bias=None, residual=None, activation="none", G=128, order=None):
    """The equation in float64."""
    N, K = weight[0].shape[0], x.shape[-1]
    x = x.double() if order is None else x.double()[..., order.long()]
    acc = x @ dequantize_int4(*weight, K, G, torch.float64).T if K else x.new_zeros(*x.shape[:-1], N)
    acc = acc if bias is None else acc + bias.double()
    return ACTIVATIONS[activation](acc if residual is None else acc + residual.double())


def check(y, x, weight, bias=None, residual=None, activation="none", G=128, order=None, compute="float"):
    """float: at most twice the error of plain PyTorch in this dtype, and eps·√K. int8: the reference."""
    N, K = weight[0].shape[0], x.shape[-1]
    assert y.shape == (*x.shape[:-1], N)
    assert y.dtype == x.dtype
    if not y.numel():
        return
    eps = torch.finfo(x.dtype).eps
    if compute == "int8":
        expected = int4_linear_ref(x, *weight, bias, residual, activation, G, N, order, compute)
        rtol = eps if x.dtype != torch.float32 else 1e-6
        torch.testing.assert_close(y, expected, rtol=rtol, atol=2e-6, equal_nan=True)
        return
    expected = exact(x, weight, bias, residual, activation, G, order)
    rows = x if order is None else x[..., order.long()]
    plain = rows @ dequantize_int4(*weight, K, G, x.dtype).T if K else x.new_zeros(*x.shape[:-1], N)
    plain = epilogue_ref(plain, bias, residual, activation, x.dtype)
    bound = 2 * (plain.double() - expected).abs().max() + eps * K**0.5 + 3e-7  # of the activations' polynomials
    assert (y.double() - expected).abs().max() <= bound


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("M", "dtype", "compute", "plan"),
    [
        (1, torch.bfloat16, "float", Plan(fused=True, split_k=4)),
        (64, torch.float16, "float", Plan(fused=True, split_k=4)),
        (65, torch.bfloat16, "float", Plan(fused=True)),
        (256, torch.bfloat16, "float", Plan(fused=True)),
        (257, torch.float16, "float", Plan(fused=False)),
        (64, torch.float32, "float", Plan(fused=True, split_k=4)),
        (65, torch.float32, "float", Plan(fused=False)),
        (1, torch.bfloat16, "int8", Plan(fused=True)),
        (5000, torch.float32, "int8", Plan(fused=True)),
    ],
)
def test_plan(M, dtype, compute, plan):
    assert kernels._plan(M, 4096, 4096, dtype, compute, 132) == plan


@pytest.mark.parametrize("G", [32, 64, 128, 192, kernels.ONE_GROUP])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_pruning_leaves_configs_that_fit(dtype, G):
    for bucket in (4, 8, 16, 32, 64, 128, 256, 4096):
        args = {"x_ptr": torch.empty(0, dtype=dtype), "M_BUCKET": bucket, "GROUP": G, "N": 4096}
        left = kernels._prune(kernels.CONFIGS, args)
        assert left
        for config in left:
            block_k = config.kwargs["BLOCK_K"]
            assert G % block_k == 0 or (dtype != torch.int8 and block_k % G == 0)
            assert config.kwargs["BLOCK_M"] <= max(bucket, 16)


# -------------------------------------------------------------------------------------------------------------- shapes


# One row and few; groups cut by K, K that is odd or no multiple of 32, groups that no step divides; a split with a
# remainder; and of each dtype rows beyond what is fused.
SHAPES = [
    (1, 1, 1, 32),
    (1, 40, 1056, 128),
    (2, 33, 31, 32),
    (3, 130, 193, 64),
    (5, 40, 1100, 192),
    (17, 65, 320, -1),
    (33, 40, 257, 128),
    (67, 130, 384, 32),
    (131, 40, 192, 192),
    (260, 70, 129, 128),
]
SIZE = st.integers(0, 70)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "G"), SHAPES)
def test_shapes(M, N, K, G, dtype):
    x, weight, bias, residual = make(M, N, K, G, dtype)
    check(call(x, weight, bias, residual, "relu", G), x, weight, bias, residual, "relu", G)
    x, weight, _, _ = make(M, N, K, G, dtype, symmetric=True)
    check(call(x, weight, G=G), x, weight, G=G)


@pytest.mark.parametrize(("M", "N", "K", "G"), SHAPES)
def test_shapes_with_int8(M, N, K, G):
    for dtype, symmetric in ((torch.float32, False), (torch.bfloat16, True)):
        x, weight, bias, residual = make(M, N, K, G, dtype, symmetric)
        y = call(x, weight, bias, residual, "relu", G, compute="int8")
        check(y, x, weight, bias, residual, "relu", G, compute="int8")


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    SIZE, SIZE, st.integers(0, 300), st.sampled_from([32, 64, 128, 192, -1]), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from(COMPUTES), st.sampled_from([*ACTIVATIONS]),
)  # fmt: skip
def test_any_shape(M, N, K, G, dtype, symmetric, compute, activation):
    x, weight, bias, residual = make(M, N, K, G, dtype, symmetric, seed=M + N + K)
    y = call(x, weight, bias, residual, activation, G, compute=compute)
    check(y, x, weight, bias, residual, activation, G, compute=compute)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty(shape, compute):
    x, weight, bias, residual = make(*shape)
    y = call(x, weight, bias, residual, "silu", compute=compute)
    check(y, x, weight, bias, residual, "silu")


# -------------------------------------------------------------------------------------------------- epilogue and types


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("M", "K", "rows"), [(3, 1024, 256), (20, 96, 256), (7, 64, 0)], ids=["split", "whole", "dense"]
)
def test_activations(M, K, rows, activation, dense):
    dense(rows)
    dtype = torch.float16
    x, weight, bias, residual = make(M, 50, K, 32, dtype)
    for b, r in ((None, None), (bias.to(dtype), None), (bias, None), (None, residual), (bias, residual)):
        check(call(x, weight, b, r, activation, 32), x, weight, b, r, activation, 32)


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "G", "rows"), [(3, 128, 256), (3, 32, 256), (40, 64, 256), (6, 128, 0)])
def test_scale_dtypes(M, G, rows, dtype, scale_dtype, dense):
    dense(rows)
    x, weight, bias, _ = make(M, 40, 256, G, dtype, scale_dtype=scale_dtype)
    check(call(x, weight, bias, G=G), x, weight, bias, G=G)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [None, 0, 7, 16])
def test_every_byte(zero, dtype, dense):
    """Each of the 2⁸ bytes under one-hot rows of x, which read the weight out: exact where s · (q - z) is."""
    w_q = torch.arange(256, dtype=torch.uint8).view(64, 4).repeat(1, 4)  # K = 32
    scale = torch.full((64, 1), 0.25, dtype=torch.bfloat16)
    w_zero = None if zero is None else torch.full((64, 1), zero, dtype=torch.uint8)
    x = torch.eye(32, dtype=dtype)
    expected = dequantize_int4(w_q, scale, w_zero, 32, 32).T
    for rows in (256, 0):
        dense(rows)
        assert torch.equal(call(x, (w_q, scale, w_zero), G=32).float(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("G", [32, 192, -1])
def test_dequantized_weight_is_the_references(G, dtype):
    _, weight, _, _ = make(1, 37, 192, G, symmetric=G == 192, scale_dtype=torch.float32)
    w = torch.empty(37, 192, dtype=dtype)
    group = G if G > 0 else kernels.ONE_GROUP
    kernels.dequantize(kernels._aligned_weight(weight[0], 192), *weight[1:], group, w)
    assert torch.equal(w, dequantize_int4(*weight, 192, G, dtype))


def test_slabs(monkeypatch, dense):
    dense(0)
    monkeypatch.setattr(weight_only, "SLAB_BYTES", 1)
    monkeypatch.setattr(weight_only, "SLAB_ROWS", 16)
    x, weight, bias, residual = make(9, 70, 64, 32, torch.bfloat16)
    for args in ((), (bias.bfloat16(),), (bias, residual, "gelu")):
        check(call(x, weight, *args, G=32), x, weight, *args, G=32)


# ------------------------------------------------------------------------------------------ strides, orders and layouts


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.T[:40],
        lambda x: x[:, 1:],
        lambda x: x[:1].expand(9, -1),
        lambda x: x.reshape(6, 8, 64),
        lambda x: x.reshape(6, 8, 64).transpose(0, 1),
        lambda x: x[0],
    ],
    ids=["columns", "rows", "transposed", "offset", "expanded", "3-D", "permuted", "1-D"],
)
@pytest.mark.parametrize(("compute", "rows"), WAYS)
def test_strides(view, compute, rows, dense):
    dense(rows)
    x = view(make(48, 1, 64)[0])
    N, K = 21, x.shape[-1]
    _, (w_q, w_scale, w_zero), bias, _ = make(1, 2 * N, K, 32)
    residual = torch.randn(N, *x.shape[:-1]).movedim(0, -1)
    args = x, (w_q[::2], w_scale[::2], w_zero[::2]), bias[::2], residual, "tanh", 32
    check(call(*args, compute=compute), *args, compute=compute)


@pytest.mark.parametrize(("compute", "rows"), WAYS)
def test_order(compute, rows, dense):
    dense(rows)
    x, weight, bias, residual = make(3, 40, 100, 32, torch.float16)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).int()
    args = x, weight, bias, residual, "none", 32, order
    y = call(*args, compute=compute)
    check(y, *args, compute=compute)
    assert not torch.equal(y, call(*args[:-1], compute=compute))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("K", [70, 128])
def test_packed_and_shifted_weights(K, symmetric):
    G = 32
    x, weight, bias, _ = make(4, 50, K, G, symmetric=symmetric)
    expected = call(x, weight, bias, G=G)
    packed = pack_int4(*weight, K, G)
    assert torch.equal(kernels.int4_linear(x, *packed, bias, None, "none", G, 50, None, "float"), expected)
    shifted = torch.zeros(weight[0].numel() + 1, dtype=torch.uint8)[1:].view(weight[0].shape).copy_(weight[0])
    for w_q in (shifted, weight[0].T.contiguous().T):
        assert torch.equal(call(x, (w_q, *weight[1:]), bias, G=G), expected)


def test_rows_that_are_not_finite():
    x, weight, bias, _ = make(6, 20, 64, 32)
    x[1, 7], x[2, 0], x[3, 49] = float("nan"), float("inf"), -float("inf")
    for activation in ACTIVATIONS:
        y = call(x, weight, bias, None, activation, 32, compute="int8")
        assert y[1:4].isnan().all(), activation
        assert y[[0, 4, 5]].isfinite().all(), activation
    y = call(x, weight, bias, G=32)
    expected = int4_linear_ref(x, *weight, bias, None, "none", 32, 20, None, "float")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


# ----------------------------------------------------------------------------------------- configs, splits and programs


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_config(config, monkeypatch):
    """With the dtypes and groups that it is for, in one piece and split, in whole steps and not."""
    block_n, block_k = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
    monkeypatch.setattr(kernels._int4_linear_kernel, "early_config_prune", lambda *args, **kwargs: [config])
    cases = [("int8", torch.float32, G) for G in (32, 128, -1) if block_n > 32 and (G < 0 or G % block_k == 0)]
    if block_k > 32:
        cases += [("float", torch.float32 if block_n == 32 else torch.float16, G) for G in (32, 256, -1)]
    for compute, dtype, G in cases:
        for M, N, K in ((5, 33, 160), (19, 70, 256)) if G != -1 else ((3, 33, 1056),):
            kernels._int4_linear_kernel.cache.clear()
            x, weight, bias, residual = make(M, N, K, G, dtype)
            args = x, weight, bias, residual, "gelu", G
            check(call(*args, compute=compute), *args, compute=compute)


def test_autotuner_runs_through_all_configs(monkeypatch):
    tuner, ran = kernels._int4_linear_kernel, []

    def run(call, quantiles):
        call()
        ran.append(1)
        return [0.0, 0.0, 0.0]

    monkeypatch.setattr(tuner, "early_config_prune", kernels._prune)
    monkeypatch.setattr(tuner, "do_bench", run)
    x, weight, bias, residual = make(20, 70, 90, 128, torch.bfloat16)
    check(call(x, weight, bias, residual), x, weight, bias, residual)
    assert len(ran) >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_add_up(dtype, monkeypatch):
    x, weight, bias, residual = make(3, 33, 1100, 128, dtype)
    for split in (1, 2, 4, 16):
        monkeypatch.setattr(weight_only, "choose_split", lambda *_, split=split: split)
        check(call(x, weight, bias, residual, "silu"), x, weight, bias, residual, "silu")


@pytest.mark.parametrize(("M", "K", "compute"), [(10, 1536, "float"), (200, 128, "float"), (200, 256, "int8")])
def test_order_of_programs_does_not_change_a_bit(M, K, compute):
    x, weight, bias, residual = make(M, 200, K, 64, torch.bfloat16)
    args = x, weight, bias, residual, "gelu_tanh", 64, None, compute
    expected = call(*args)
    for seed in range(2):
        with interpreter.shuffled_programs(seed):
            assert torch.equal(call(*args), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduction_of_one_part_is_the_epilogue_in_place(dtype):
    _, _, bias, residual = make(9, 70, 4, dtype=dtype)
    y = torch.randn(9, 70).to(dtype)
    expected = epilogue_ref(y.float(), bias, residual, "silu", dtype)
    matmul.reduce_sums(y[None], y, bias=bias, residual=residual, activation="silu")
    torch.testing.assert_close(y, expected, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=2e-6)


def test_through_the_dispatcher():
    x, weight, bias, residual = make(6, 40, 70, 32, torch.bfloat16)
    for compute in COMPUTES:
        y = int4_linear(x, *weight, bias, group_size=32, residual=residual, activation="silu", compute=compute)
        assert torch.equal(y, call(x, weight, bias, residual, "silu", 32, compute=compute))


def test_gradient_past_the_kernel():
    x, weight, bias, _ = make(5, 40, 70, 32)
    x.requires_grad_()
    int4_linear(x, *weight, bias, group_size=32, compute="float").sum().backward()
    torch.testing.assert_close(x.grad, dequantize_int4(*weight, 70, 32).sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


def test_nibbles_beyond_an_odd_k_do_not_count():
    x, (w_q, scale, zero), _, _ = make(3, 10, 65, 32)
    dirty = w_q.clone()
    dirty[:, -1] |= 0xF0
    assert not torch.equal(dirty, w_q)
    assert torch.equal(call(x, (dirty, scale, zero), G=32), call(x, (w_q, scale, zero), G=32))
