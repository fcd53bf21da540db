"""kernels/fp8_linear.py against its contract; run by test_triton_interpreter.py."""

import fp8_cases
import interpreter
import pytest
import torch
import triton
from fp8_cases import GRANULARITIES, assert_close_to_oracle, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops.kernels import fp8_linear as kernels
from pyops.kernels import quantize
from pyops.ops import fp8_linear
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.fp8_linear import FP8, quantize_x_ref

interpreter.install()
torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN and large integers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("granularity", GRANULARITIES)


@pytest.fixture(autouse=True)
def first_config(monkeypatch):
    """One config for each row tile, so that tuning has nothing to choose; test_every_config takes the others."""
    tuner = kernels._fp8_linear_kernel
    seen, configs = set(), []
    for config in kernels.CONFIGS:
        if config.kwargs["BLOCK_K"] == 128 and config.kwargs["BLOCK_M"] not in seen:
            seen.add(config.kwargs["BLOCK_M"])
            configs.append(config)
    monkeypatch.setattr(tuner, "configs", configs)
    monkeypatch.setattr(tuner, "cache", {})


def make(M, N, K, granularity, dtype=torch.float32):
    """x, w_q, w_scale, bias, residual."""
    g = torch.Generator().manual_seed(M + N + K)
    bias, residual = torch.randn(N, generator=g), torch.randn(M, N, generator=g).to(dtype)
    return *problem(M, N, K, granularity, dtype), bias, residual


def check_codes(x, granularity, x_scale=None):
    """The launcher's codes and scales are those of the reference, and 0 beyond K."""
    K = x.shape[1]
    codes, s = kernels.quantize_x(x, granularity == "block", x_scale)
    expected, scale = quantize_x_ref(x, granularity, x_scale)
    bits = codes.view(torch.uint8)
    assert torch.equal(bits[:, :K], expected.contiguous().view(torch.uint8))
    assert not bits[:, K:].any()
    assert codes.shape[1] % quantize.K_ALIGNMENT == 0
    torch.testing.assert_close(s.T if granularity == "block" else s, scale, rtol=0, atol=0, equal_nan=True)
    return codes


# -------------------------------------------------------------------------------------------------------- quantization


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 7), (2, 16), (33, 129), (5, 2048), (1, 4099), (70, 260)])
def test_codes_are_exact(M, K, dtype, granularity):
    check_codes(problem(M, 1, K, granularity, dtype)[0], granularity)


def test_every_code_and_midpoint():
    values = torch.from_numpy(fp8_cases.VALUES).float()
    middle = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middle, torch.nextafter(middle, values[:-1]), torch.nextafter(middle, values[1:])])
    x = torch.cat([x, -x])[None]
    codes = check_codes(x, "row")
    expected = torch.from_numpy(fp8_cases.encode(x.numpy()))
    assert torch.equal(codes.view(torch.uint8)[:, : x.shape[1]], expected)
    assert torch.equal(codes[0, :127].float(), values)


@pytest.mark.parametrize("static", [False, True])
def test_long_rows_are_read_twice(static, monkeypatch):
    monkeypatch.setattr(quantize, "ROW_IN_REGISTERS", 64)
    monkeypatch.setattr(quantize, "QUANTIZE_TILE", 32)
    x = problem(5, 1, 131, "row")[0]
    x[1, 130] = float("nan")
    x[2, 0] = 100.0
    check_codes(x, "row", torch.tensor([0.01]) if static else None)


@pytest.mark.parametrize("granularity", ["row", "block", "static"])
def test_rows_that_are_not_finite(granularity):
    scale = torch.tensor(0.01) if granularity == "static" else None
    granularity = "row" if scale is not None else granularity
    x, w_q, w_scale, bias, _ = make(6, 20, 150, granularity)
    x[1, 7], x[2, 0], x[3, 149] = float("nan"), float("inf"), -float("inf")
    x[4], x[5] = 0.0, 2.0**-118
    check_codes(x, granularity, scale)
    for activation in ACTIVATIONS:
        y = kernels.fp8_linear(x, w_q, w_scale, bias, None, activation, scale)
        assert y[1:4].isnan().all(), activation
        finite = [0, 4, 5]
        assert_close_to_oracle(y[finite], x[finite], w_q, w_scale, bias, None, activation, scale)


def test_smallest_magnitudes():
    x = torch.tensor([[2.0**-117, -(2.0**-118)], [2.0**-117 * (1 - 2**-24), 0.0], [1e-45, 0.0], [3.4e38, -1e38]])
    for granularity in GRANULARITIES:
        check_codes(x, granularity)
    assert kernels.quantize_x(x)[1].ne(0).tolist() == [True, False, False, True]


# -------------------------------------------------------------------------------------------------------------- matmul


SHAPES = [(1, 1, 1), (1, 97, 2048), (2, 33, 31), (7, 64, 129)]
SHAPES += [(17, 130, 48), (31, 5, 1155), (67, 140, 300), (131, 259, 80)]
SIZE = st.integers(0, 70)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_shapes(M, N, K, dtype, granularity):
    x, w_q, w_scale, bias, residual = make(M, N, K, granularity, dtype)
    assert_close_to_oracle(kernels.fp8_linear(x, w_q, w_scale), x, w_q, w_scale)
    args = x, w_q, w_scale, bias.to(dtype), residual, "relu"
    assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(SIZE, SIZE, st.integers(0, 300), st.sampled_from(DTYPES), st.sampled_from([*ACTIVATIONS]), st.booleans())
def test_any_shape(M, N, K, dtype, activation, by_block):
    args = *make(M, N, K, "block" if by_block else "row", dtype), activation
    assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@BOTH
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_empty(shape, granularity):
    args = *make(*shape, granularity), "silu"
    assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@BOTH
@pytest.mark.parametrize(("M", "K"), [(5, 2048), (70, 96)], ids=["split", "whole"])
def test_epilogues(M, K, granularity):
    x, w_q, w_scale, bias, residual = make(M, 50, K, granularity)
    for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
        for activation in ("none", "gelu", "tanh", "hardswish"):
            args = x, w_q, w_scale, b, r, activation
            assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_static_scales(rows, dtype):
    x, w_q, w_scale, bias, residual = make(9, 40, 70, "row", dtype)
    scale = torch.tensor(0.02) if rows == "one" else torch.linspace(0.001, 0.05, 9)
    codes = check_codes(x, "row", scale)
    assert codes.float().abs().max() == 448
    args = x, w_q, w_scale, bias, residual, "none", scale
    assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@BOTH
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[::3],
        lambda x: x.T[:40],
        lambda x: x[:, 1:],
        lambda x: x[:1].expand(9, -1),
        lambda x: x.reshape(6, 8, 40).transpose(0, 1),
        lambda x: x[0],
    ],
    ids=["columns", "rows", "transposed", "offset", "expanded", "permuted", "1-D"],
)
def test_strides(view, granularity):
    x = view(problem(48, 1, 40, granularity)[0])
    N, K = 21, x.shape[-1]
    _, w_q, w_scale, bias, _ = make(1, 2 * N, K, granularity)
    rows = w_scale[::2] if granularity == "row" else w_scale
    residual = torch.randn(N, *x.shape[:-1]).movedim(0, -1)
    args = x, w_q[::2], rows, bias[::2], residual, "tanh"
    assert_close_to_oracle(kernels.fp8_linear(*args), *args)


def test_unaligned_weight():
    x, w_q, w_scale, *_ = make(4, 50, 64, "row")
    shifted = torch.zeros(50 * 64 + 1, dtype=torch.uint8)[1:].view(FP8).view(50, 64).copy_(w_q)
    assert torch.equal(kernels.fp8_linear(x, shifted, w_scale), kernels.fp8_linear(x, w_q, w_scale))


@BOTH
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_every_config(config, granularity, monkeypatch):
    if granularity == "block" and config.kwargs["BLOCK_K"] != 128:
        return  # pruned: test_pruning_leaves_configs_that_fit
    monkeypatch.setattr(kernels._fp8_linear_kernel, "configs", [config])
    for M, N, K in ((5, 300, 1100), (150, 70, 272)):
        args = *make(M, N, K, granularity), "gelu"
        assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@BOTH
@pytest.mark.parametrize("M", [1, 16, 17, 32, 33, 64, 65, 100, 5000])
def test_pruning_leaves_configs_that_fit(M, granularity):
    bucket = min(max(triton.next_power_of_2(M), 16), 4096)
    sizes = {"c_ptr": torch.empty(0), "M_BUCKET": bucket, "BY_BLOCK": granularity == "block"}
    left = kernels._prune(kernels.CONFIGS, sizes)
    assert len(left) >= 2
    assert all(bucket <= 2 * config.kwargs["BLOCK_M"] or config.kwargs["BLOCK_M"] >= 64 for config in left)
    assert granularity == "row" or all(config.kwargs["BLOCK_K"] == 128 for config in left)


@BOTH
def test_split_of_k(granularity, monkeypatch):
    args = *make(19, 70, 2500, granularity), "silu"
    for split in (1, 2, 4, 16):
        monkeypatch.setattr(kernels, "choose_split", lambda *_, split=split: split)
        assert_close_to_oracle(kernels.fp8_linear(*args), *args)


@BOTH
@pytest.mark.parametrize(("M", "N", "K"), [(10, 200, 1536), (260, 520, 64)])
def test_order_of_programs_does_not_change_a_bit(M, N, K, granularity):
    args = *make(M, N, K, granularity), "gelu_tanh"
    expected = kernels.fp8_linear(*args)
    for seed in range(2):
        with interpreter.shuffled_programs(seed):
            assert torch.equal(kernels.fp8_linear(*args), expected)


@BOTH
def test_through_the_dispatcher(granularity):
    x, w_q, w_scale, bias, residual = make(6, 40, 70, granularity, torch.bfloat16)
    y = fp8_linear(x, w_q, w_scale, bias, residual=residual, activation="silu")
    assert torch.equal(y, kernels.fp8_linear(x, w_q, w_scale, bias, residual, "silu"))


# ------------------------------------------------------------------------------------------------------------ the plan


LARGE = {"capability": 90, "M": 1024, "N": 4096, "K": 4096, "by_block": False, "dtype": torch.bfloat16}
PLANS = {
    "large": ({}, "scaled_mm", "many rows on Hopper"),
    "bias": ({"bias": torch.bfloat16}, "scaled_mm", "many rows on Hopper"),
    "fewest rows": ({"M": kernels.SCALED_MM_M}, "scaled_mm", "many rows on Hopper"),
    "Ada": ({"capability": 89}, "triton", "made for Hopper"),
    "Blackwell": ({"capability": 100}, "triton", "made for Hopper"),
    "Ampere": ({"capability": 80}, "dense", "no e4m3"),
    "Turing by block": ({"capability": 75, "by_block": True}, "dense", "no e4m3"),
    "another maker": ({"capability": 0}, "dense", "no e4m3"),
    "by block": ({"by_block": True}, "triton", "by block"),
    "few rows": ({"M": kernels.SCALED_MM_M - 1}, "triton", "rows"),
    "fp16": ({"dtype": torch.float16}, "triton", "bf16"),
    "fp32": ({"dtype": torch.float32}, "triton", "bf16"),
    "odd N": ({"N": 4097}, "triton", "multiple of 16"),
    "odd K": ({"K": 4104}, "triton", "multiple of 16"),
    "no K": ({"K": 0}, "triton", "multiple of 16"),
    "fp32 bias": ({"bias": torch.float32}, "triton", "bias is not bf16"),
    "residual": ({"residual": True}, "triton", "epilogue"),
    "activation": ({"activation": "relu"}, "triton", "epilogue"),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name):
    changes, gemm, reason = PLANS[name]
    plan = kernels._plan(**{**LARGE, **changes})
    assert plan.gemm == gemm
    assert reason in plan.reason


@pytest.mark.parametrize("with_bias", [False, True])
def test_scaled_mm(with_bias, monkeypatch):
    """torch's CPU kernel in place of CUTLASS: shows the layout of the arguments, and that rows of NaN stay so."""
    called = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: called.append(1) or scaled_mm(*a, **k))
    x, w_q, w_scale, bias, _ = make(260, 48, 64, "row", torch.bfloat16)
    rest = (bias.bfloat16(),) if with_bias else ()
    y = kernels.fp8_linear(x.view(26, 10, 64), w_q, w_scale, *rest)
    assert called
    assert_close_to_oracle(y, x.view(26, 10, 64), w_q, w_scale, *rest)
    x[3, 5] = float("inf")
    assert kernels.fp8_linear(x, w_q, w_scale, *rest)[3].isnan().all()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_without_fp8(granularity, dtype, monkeypatch):
    """At most the error that a dense layer over the same dequantized values makes, twice."""
    monkeypatch.setattr(kernels, "_capability", lambda index: 80)
    for shape in ((5, 40, 300), (300, 33, 70), (3, 5, 0)):
        x, w_q, w_scale, bias, residual = make(*shape, granularity, dtype)
        y = kernels.fp8_linear(x, w_q, w_scale, bias, residual, "silu")
        exact, magnitude = fp8_cases.oracle(x, w_q, w_scale, bias, residual, "silu")
        eps = torch.finfo(dtype).eps + 100 * torch.finfo(torch.float32).eps
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= 2 * eps * (magnitude + 1)).all()
    x[1] = torch.nan
    assert kernels.fp8_linear(x, w_q, w_scale).shape == (3, 5)
