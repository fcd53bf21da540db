"""The op `pyops::fp8_linear`: its codes against the definition of e4m3, y against a float64 oracle."""

from __future__ import annotations

import importlib

import cases
import fp8_cases
import numpy as np
import pytest
import torch
from cases import randn
from fp8_cases import GRANULARITIES, assert_close_to_oracle, decode, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.fp8_linear import FP8, quantize_x_ref, scale_shape

pytestmark = pytest.mark.usefixtures("poison")
contract = importlib.import_module("pyops.ops.fp8_linear")  # the function has the same name
BOTH = pytest.mark.parametrize("granularity", GRANULARITIES)
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(FP8)


def same_codes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ------------------------------------------------------------------------------------------- codes


def test_every_code_has_its_value():
    """As a weight: x is 1, which is the code of 448 times 1/448."""
    w = ops.dequantize_fp8(ALL_CODES[:, None], torch.ones(256))[:, 0]
    y = ops.fp8_linear(torch.full((1, 1), 448.0), ALL_CODES[:, None], torch.ones(256))[0] / 448
    for values in (w, y):
        assert values[[0x7F, 0xFF]].isnan().all()
        number = ~values.isnan()
        assert number.sum() == 254
        assert torch.equal(values[number].double(), decode(ALL_CODES)[number])


def test_every_code_is_found_again():
    values = decode(ALL_CODES)[~decode(ALL_CODES).isnan()].float()
    codes, scale = quantize_x_ref(values[None], "row")
    assert scale.item() == 1.0
    assert same_codes(codes[0], ALL_CODES[~decode(ALL_CODES).isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_number_becomes_the_nearest_code(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    codes, _ = quantize_x_ref(x[None], "row", torch.ones(()))
    assert same_codes(codes, fp8_cases.quantize(x[None], len(x), torch.ones(1))[0])


def test_midpoints_and_their_neighbours():
    """The only values for which the direction of rounding is in doubt, and what a double rounding would move."""
    middle = (fp8_cases.VALUES[1:] + fp8_cases.VALUES[:-1]) / 2
    x = np.concatenate([np.nextafter(middle.astype(np.float32), np.float32(to)) for to in (0, 1e9)] + [middle])
    x = torch.from_numpy(np.concatenate([x, -x]).astype(np.float32))
    codes, _ = quantize_x_ref(x[None], "row", torch.ones(()))
    assert same_codes(codes[0].cpu(), torch.from_numpy(fp8_cases.encode(x.numpy())).view(FP8))
    ties = quantize_x_ref(torch.from_numpy(middle.astype(np.float32))[None], "row", torch.ones(()))[0]
    assert not (ties.view(torch.uint8) & 1).any()


@BOTH
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_codes_of_rows_are_those_of_the_definition(granularity, dtype):
    for M, _, K in cases.SHAPES:
        x = problem(M, 1, K, granularity, dtype)[0]
        codes, scale = quantize_x_ref(x, granularity)
        width = K if granularity == "row" else 128
        expected, scales = fp8_cases.quantize(x, width)
        assert same_codes(codes, expected)
        assert torch.equal(scale.view(M, -1).repeat_interleave(width, 1)[:, :K], scales)


def test_quotient_and_product_round_separately():
    """Values at the edge between two codes, where a reciprocal of amax or a quotient would round differently."""
    rng = np.random.default_rng(0)
    amax = rng.uniform(0.5, 4.0, (64, 1)).astype(np.float32)
    middle = ((fp8_cases.VALUES[1:] + fp8_cases.VALUES[:-1]) / 2).astype(np.float32)
    edges = middle * (amax / np.float32(448))
    x = np.concatenate([amax, edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(9))], axis=1)
    expected, _ = fp8_cases.quantize(torch.from_numpy(x), x.shape[1])
    divided = fp8_cases.encode(np.clip(x / (amax / np.float32(448)), -448, 448))
    by_reciprocal = fp8_cases.encode(np.clip(x * (np.float32(1) / (amax / np.float32(448))), -448, 448))
    for other in (divided, by_reciprocal):
        assert (expected.view(torch.uint8).numpy() != other).any(), "the test does not tell them apart"
    assert same_codes(quantize_x_ref(torch.from_numpy(x), "row")[0], expected)


@pytest.mark.parametrize("shape", [*cases.SHAPES, (130, 1, 260), (257, 1, 128), (128, 1, 385)], ids=str)
def test_weights_by_block_share_a_scale(shape):
    N, _, K = shape
    w = randn(N, K) * torch.linspace(0, 4, K).exp2()
    codes, scale = ops.quantize_fp8(w, "block")
    assert tuple(scale.shape) == scale_shape(N, K, "block")
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            own = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            expected, scales = fp8_cases.quantize(w[own].reshape(1, -1), 1 << 20)
            assert same_codes(codes[own].reshape(1, -1), expected)
            assert scale[i, j] == scales[0, 0]
    assert same_codes(ops.quantize_fp8(w.double(), "block")[0], codes)


def test_weights_by_row():
    for N, _, K in cases.SHAPES:
        w = randn(N, K, dtype=torch.bfloat16)
        codes, scale = ops.quantize_fp8(w)
        expected, scales = fp8_cases.quantize(w, K)
        assert same_codes(codes, expected)
        assert torch.equal(scale, scales[:, 0])


def test_large_weights_are_quantized_in_chunks(monkeypatch):
    w = randn(300, 70)
    whole = [ops.quantize_fp8(w, granularity) for granularity in GRANULARITIES]
    monkeypatch.setattr("pyops.memory.CHUNK", 1)
    for (codes, scale), granularity in zip(whole, GRANULARITIES, strict=True):
        again = ops.quantize_fp8(w, granularity)
        assert same_codes(again[0], codes)
        assert torch.equal(again[1], scale)


@BOTH
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_dequantized_weight(granularity, dtype):
    """Within half a step: 2⁻⁴ of the value where it is normal, 2⁻¹⁰ of the scale where it is not."""
    for N, K in ((1, 1), (130, 257), (33, 70)):
        w = randn(N, K) * torch.linspace(-12, 4, K).exp2()
        codes, scale = ops.quantize_fp8(w, granularity)
        back = ops.dequantize_fp8(codes, scale, dtype)
        s = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K] if scale.dim() == 2 else scale[:, None]
        assert torch.equal(back, (decode(codes) * s.double()).float().to(dtype))
        step = torch.maximum(w.abs() * 2.0**-4, s * 2.0**-10)
        info = torch.finfo(dtype)
        allowed = step.double() * (1 + 1e-6) + info.eps * (w.abs() + info.smallest_normal)
        assert ((back.double() - w).abs() <= allowed).all()


@BOTH
def test_signal_to_noise(granularity):
    """Gaussian weights and activations: about 28.5 dB; with outliers in a few columns blocks keep it, rows lose."""
    x, w = randn(64, 1024), randn(96, 1024)
    assert sqnr_db(x, w, granularity) > 28
    x[:, :4] *= 3e4
    w[:, :4] *= 1e-6
    assert (sqnr_db(x, w, granularity) > 26) == (granularity == "block")


def sqnr_db(x, w, granularity):
    exact = x.double() @ w.double().T
    y = ops.fp8_linear(x, *ops.quantize_fp8(w, granularity))
    return 10 * torch.log10(exact.square().sum() / (y - exact).square().sum())


# ------------------------------------------------------------------------------------------- error of y


@BOTH
@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_error_against_float64(granularity, dtype, activation):
    for M, N, K in ((1, 33, 31), (5, 64, 300), (19, 130, 128)):
        x, *w = problem(M, N, K, granularity, dtype)
        rest = (randn(N, seed=5), randn(M, N, dtype=dtype, seed=6, scale=3.0), activation)
        y = ops.fp8_linear(x, *w, rest[0], residual=rest[1], activation=activation)
        assert_close_to_oracle(y, x, *w, *rest)


@BOTH
@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.LONG_SHAPES], ids=str)
def test_error_of_every_shape(granularity, shape):
    x, *w = problem(*shape, granularity)
    assert_close_to_oracle(ops.fp8_linear(x, *w), x, *w)


@BOTH
def test_reference_computes_in_tiles(granularity, monkeypatch):
    """N is cut where a tile of outputs or of decoded weights ends, also inside a block of weights."""
    x, *w = problem(3, 300, 200, granularity)
    expected = ops.fp8_linear(x, *w)
    for tile, decoded in ((1, 1), (3 * 100, 1 << 20), (1 << 20, 200 * 128), (1 << 20, 200 * 131)):
        monkeypatch.setattr(contract, "TILE", tile)
        monkeypatch.setattr(contract, "DECODED", decoded)
        torch.testing.assert_close(ops.fp8_linear(x, *w), expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_precision_of_fp32_matmuls_does_not_matter(granularity):
    """Codes are exact in bf16: only products of scaled values would not be."""
    before = torch.get_float32_matmul_precision()
    x, *w = problem(70, 200, 300, granularity)
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert_close_to_oracle(ops.fp8_linear(x, *w), x, *w)
    finally:
        torch.set_float32_matmul_precision(before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(data):
    M, N, K = (data.draw(st.integers(0, top), label=name) for name, top in (("M", 40), ("N", 150), ("K", 300)))
    granularity = data.draw(st.sampled_from(GRANULARITIES))
    dtype = data.draw(st.sampled_from(cases.FLOATS))
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    scale = 10.0 ** data.draw(st.integers(-3, 2), label="log10 of the magnitude")
    seed = data.draw(st.integers(0, 999))
    x = randn(M, K, dtype=dtype, seed=seed, scale=scale)
    if M and K:
        x = data.draw(st.sampled_from(list(cases.LAYOUTS.values()) + list(cases.EXPANDED.values())))(x)
    w = ops.quantize_fp8(randn(N, K, seed=seed, scale=0.1), granularity)
    bias = randn(N, dtype=data.draw(st.sampled_from(cases.FLOATS)), seed=seed + 1) if data.draw(st.booleans()) else None
    residual = None
    if data.draw(st.booleans()):
        residual = randn(M, N, dtype=dtype, seed=seed + 2)
        residual = residual.T.contiguous().T if data.draw(st.booleans()) else residual
    static = data.draw(st.sampled_from(["dynamic", "one", "rows"])) if granularity == "row" else "dynamic"
    x_scale = {"dynamic": None, "one": torch.tensor(scale / 200), "rows": torch.full((M,), scale / 100)}[static]
    y = ops.fp8_linear(x, *w, bias, residual=residual, activation=activation, x_scale=x_scale)
    assert_close_to_oracle(y, x, *w, bias, residual, activation, x_scale)


# ------------------------------------------------------------------------------------------- shapes and strides


@BOTH
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(granularity, shape):
    M, N, K = shape
    bias = randn(N)
    y = ops.fp8_linear(randn(M, K), *ops.quantize_fp8(randn(N, K), granularity), bias, activation="relu")
    assert torch.equal(y, bias.relu().expand(M, N))


@BOTH
@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
def test_leading_dimensions(granularity, leading):
    w = ops.quantize_fp8(randn(19, 37), granularity)
    x, residual = randn(*leading, 37), randn(*leading, 19)
    y = ops.fp8_linear(x, *w, residual=residual)
    flat = ops.fp8_linear(x.reshape(-1, 37), *w, residual=residual.reshape(-1, 19))
    assert torch.equal(y, flat.reshape(*leading, 19))


@BOTH
@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
def test_strides(granularity, layout):
    change = {**cases.LAYOUTS, **cases.EXPANDED}[layout]
    x, w_q, w_scale = problem(18, 150, 140, granularity)
    bias, residual = randn(150), randn(18, 150)
    same, r = change(x), change(residual)
    y = ops.fp8_linear(same, w_q, w_scale, bias.repeat_interleave(3)[::3], residual=r)
    assert torch.equal(y, ops.fp8_linear(same.contiguous(), w_q, w_scale, bias, residual=r.contiguous()))
    strided = change(w_q.view(torch.uint8)).view(FP8)
    scale = w_scale.repeat_interleave(2, dim=0)[::2]
    assert torch.equal(ops.fp8_linear(x, strided, scale), ops.fp8_linear(x, strided.contiguous(), w_scale))


# ------------------------------------------------------------------------------------------- special rows


@BOTH
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_nan_and_inf_stay_in_their_row(granularity, dtype):
    x, *w = problem(9, 40, 300, granularity, dtype)
    clean = ops.fp8_linear(x, *w)
    others = [0, *range(2, 9)]
    for value in (torch.nan, torch.inf, -torch.inf):
        for k in (0, 127, 299):
            bad = x.clone()
            bad[1, k] = value
            for activation in ("none", "relu", "relu6", "sigmoid"):
                assert ops.fp8_linear(bad, *w, activation=activation)[1].isnan().all()
            assert torch.equal(ops.fp8_linear(bad, *w)[others], clean[others])
            if granularity == "row":
                assert ops.fp8_linear(bad, *w, x_scale=0.01)[1].isnan().all()


@BOTH
def test_zero_and_tiny_rows_give_the_bias(granularity):
    x = randn(6, 70)
    x[1], x[2], x[3], x[4] = 0.0, 1e-45, 2.0**-126, 2.0**-117 * (1 - 2**-24)
    bias = randn(33)
    y = ops.fp8_linear(x, *ops.quantize_fp8(randn(33, 70), granularity), bias)
    assert torch.equal(y[1:5], bias.expand(4, 33))


def test_smallest_and_largest_rows():
    """2⁻¹¹⁷ is the smallest magnitude that is kept; the largest finite row must not overflow."""
    x = torch.zeros(2, 2)
    x[0, 0], x[1, 1] = 2.0**-117, torch.finfo(torch.float32).max
    codes, scale = quantize_x_ref(x, "row")
    assert codes.float().tolist() == [[448, 0], [0, 448]]
    assert scale[0] >= torch.finfo(torch.float32).smallest_normal
    y = ops.fp8_linear(x, torch.eye(2).to(FP8), torch.ones(2))
    assert y.isfinite().all()
    torch.testing.assert_close(y, x, rtol=1e-6, atol=0)


def test_a_block_of_zeros_beside_others():
    x = randn(3, 384)
    x[:, 128:256] = 0
    w = randn(5, 384)
    w[:, 128:256] = 0
    q = ops.quantize_fp8(w, "block")
    assert q[1][0, 1] == 0
    assert_close_to_oracle(ops.fp8_linear(x, *q), x, *q)


def test_static_scale_saturates():
    x = torch.tensor([[0.4, 449.0, -1e9, 464.0, 463.9, 500.0, 0.0, -448.0]])
    y = ops.fp8_linear(x, torch.eye(8).to(FP8), torch.ones(8), x_scale=1.0)
    assert y.tolist() == [[0.40625, 448, -448, 448, 448, 448, 0, -448]]


def test_static_scale_of_each_row():
    x, *w = problem(21, 40, 67, "row")
    scales = randn(21).abs() * 0.01 + 0.005
    y = ops.fp8_linear(x.view(3, 7, 67), *w, x_scale=scales.view(3, 7))
    rows = [ops.fp8_linear(x[m : m + 1], *w, x_scale=float(scales[m])) for m in range(21)]
    torch.testing.assert_close(y.view(21, 40), torch.cat(rows), rtol=1e-6, atol=1e-6)
    assert_close_to_oracle(y.view(21, 40), x, *w, None, None, "none", scales)


# ------------------------------------------------------------------------------------------- gradients


@BOTH
@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
def test_gradients_are_straight_through(granularity, activation):
    x, *w = problem(6, 150, 140, granularity)
    leaves = [t.requires_grad_() for t in (x.view(2, 3, 140), randn(150), randn(2, 3, 150, seed=9))]
    grad = randn(2, 3, 150, seed=8)
    y = ops.fp8_linear(leaves[0], *w, leaves[1], residual=leaves[2], activation=activation)
    got = torch.autograd.grad(y, leaves, grad)
    linear = [t.detach() for t in leaves]
    z = fp8_cases.oracle(linear[0], *w, linear[1], linear[2])[0].requires_grad_()
    (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, grad.double())
    want = (dz @ ops.dequantize_fp8(*w).double(), dz.sum((0, 1)), dz)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_gradient_of_the_input_alone():
    for arguments in ({}, {"bias": randn(5)}, {"activation": "gelu"}, {"residual": randn(3, 5)}):
        x, *w = problem(3, 5, 7, "row")
        ops.fp8_linear(x.requires_grad_(), *w, **arguments).sum().backward()
        assert x.grad.isfinite().all()


def test_gradients_of_empty_problems():
    for granularity in GRANULARITIES:
        for M, N, K in cases.EMPTY_SHAPES:
            leaves = [randn(M, K).requires_grad_(), randn(N).requires_grad_(), randn(M, N).requires_grad_()]
            w = ops.quantize_fp8(randn(N, K), granularity)
            y = ops.fp8_linear(leaves[0], *w, leaves[1], residual=leaves[2])
            assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [t.shape for t in leaves]


def test_gradient_stops_where_a_static_scale_clamps():
    x = torch.tensor([[1.0, 500.0, -500.0, 463.0]], requires_grad=True)
    ops.fp8_linear(x, torch.eye(4).to(FP8), torch.ones(4), x_scale=1.0).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_gradients_keep_their_dtypes(dtype):
    x, *w = problem(3, 5, 7, "row", dtype)
    leaves = [x.requires_grad_(), randn(5).requires_grad_(), randn(3, 5, dtype=dtype).requires_grad_()]
    ops.fp8_linear(leaves[0], *w, leaves[1], residual=leaves[2], activation="silu").sum().backward()
    assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, dtype]


def test_no_graph_without_gradients():
    x, *w = problem(3, 5, 7, "row")
    bias = randn(5).requires_grad_()
    with torch.no_grad():
        assert not ops.fp8_linear(x, *w, bias).requires_grad
    assert ops.fp8_linear(x, *w, bias).requires_grad
    assert not ops.fp8_linear(x, *w).requires_grad


# ------------------------------------------------------------------------------------------- PyTorch


@BOTH
def test_opcheck_of_the_type_itself(granularity):
    """All but the comparison of arguments before and after, which torch cannot do in float8; with bytes it is done."""
    x, *w = problem(4, 33, 140, granularity)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.pyops.fp8_linear.default, (x.requires_grad_(), *w), test_utils=checks)


@BOTH
def test_bytes_are_the_codes(granularity):
    x, w_q, w_scale = problem(4, 33, 140, granularity)
    assert torch.equal(torch.ops.pyops.fp8_linear(x, w_q.view(torch.uint8), w_scale), ops.fp8_linear(x, w_q, w_scale))


@BOTH
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_compile_in_full(fresh_compiler, granularity, requires_grad):
    _, *w = problem(5, 33, 140, granularity)
    bias = randn(33)

    def f(x):
        return ops.fp8_linear(x * 2, *w, bias, activation="silu") + 1

    cases.assert_compiles_in_full(f, 140, requires_grad)


@BOTH
def test_fake_tensors_of_cuda(granularity):
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 140, dtype=torch.bfloat16, device="cuda")
        w_q = torch.empty(33, 140, dtype=FP8, device="cuda")
        w_scale = torch.empty(scale_shape(33, 140, granularity), device="cuda")
        residual = torch.empty(2, 3, 33, dtype=torch.bfloat16, device="cuda")
        y = ops.fp8_linear(x, w_q, w_scale, torch.empty(33, device="cuda"), residual=residual)
        assert y.shape == (2, 3, 33)
        assert (y.device.type, y.dtype) == ("cuda", torch.bfloat16)


@BOTH
def test_meta(granularity):
    y = ops.fp8_linear(*(t.to("meta") for t in problem(3, 5, 7, granularity, torch.float16)))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.float16, (3, 5))


# ------------------------------------------------------------------------------------------- what is refused


BAD = {
    "x is a list": (TypeError, r"x must be a tensor, got list", {"x": [1.0]}),
    "x is int": (TypeError, r"x has dtype torch\.int64; allowed", {"x": torch.ones(3, 7, dtype=torch.int64)}),
    "x is fp64": (TypeError, r"x has dtype torch\.float64", {"x": torch.ones(3, 7, dtype=torch.float64)}),
    "x is fp8": (TypeError, r"x has dtype torch\.float8_e4m3fn", {"x": torch.ones(3, 7).to(FP8)}),
    "x is 0-dim": (ValueError, r"x must be \[\.\.\., K\]", {"x": torch.ones(())}),
    "x has another K": (ValueError, r"x has K=8; w_q is \(5, 7\)", {"x": torch.ones(3, 8)}),
    "x is on meta": (ValueError, r"x is on meta, w_q on cpu", {"x": torch.ones(3, 7, device="meta")}),
    "K is too large": (
        ValueError,
        r"x has K=16777201; allowed: up to 16777200",
        {"x": torch.ones(1).expand(3, 16777201), "w_q": torch.zeros(1).to(FP8).expand(5, 16777201)},
    ),
    "w_q is float": (TypeError, r"dtype torch\.float32; allowed: torch\.float8_e4m3fn", {"w_q": torch.ones(5, 7)}),
    "w_q is e5m2": (TypeError, r"w_q has dtype torch\.float8_e5m2;", {"w_q": torch.ones(5, 7).to(torch.float8_e5m2)}),
    "w_q is uint8": (TypeError, r"w_q has dtype torch\.uint8", {"w_q": torch.ones(5, 7, dtype=torch.uint8)}),
    "w_q is None": (TypeError, r"w_q must be a tensor, got NoneType", {"w_q": None}),
    "w_q is 1-D": (ValueError, r"w_q must be \[N, K\], got shape \(7,\)", {"w_q": torch.ones(7).to(FP8)}),
    "w_scale is bf16": (TypeError, r"w_scale has dtype torch\.bfloat16", {"w_scale": torch.ones(5).bfloat16()}),
    "w_scale is short": (ValueError, r"is \(4,\); w_q \(5, 7\) needs \(5,\) or \(1, 1\)", {"w_scale": torch.ones(4)}),
    "w_scale is a column": (ValueError, r"w_scale is \(5, 1\)", {"w_scale": torch.ones(5, 1)}),
    "w_scale is on meta": (ValueError, r"w_scale is on meta", {"w_scale": torch.ones(5, device="meta")}),
    **cases.BAD_EPILOGUES,
    "x_scale of two": (ValueError, r"x_scale has 2 elements; expected 1 or 3", {"x_scale": torch.ones(2)}),
    "x_scale is int": (TypeError, r"x_scale has dtype torch\.int64", {"x_scale": torch.tensor(1)}),
    "x_scale is zero": (ValueError, r"x_scale goes from 0\.0 to 0\.0; it must be finite", {"x_scale": 0.0}),
    "x_scale is negative": (ValueError, r"x_scale goes from -1\.0", {"x_scale": torch.tensor([1.0, -1.0, 1.0])}),
    "x_scale is NaN": (ValueError, r"x_scale goes from nan", {"x_scale": float("nan")}),
    "x_scale is text": (TypeError, r"x_scale must be a tensor, got str", {"x_scale": "1"}),
    "x_scale with blocks": (
        ValueError,
        r"x_scale goes with scales by row",
        {"x_scale": 1.0, "w_scale": torch.ones(1, 1)},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    error, message, changes = BAD[name]
    w_q, w_scale = ops.quantize_fp8(randn(5, 7))
    arguments = {"x": randn(3, 7), "w_q": w_q, "w_scale": w_scale, "bias": randn(5), "residual": randn(3, 5), **changes}
    with pytest.raises(error, match=message):
        ops.fp8_linear(**arguments)


@pytest.mark.parametrize(
    ("w", "granularity", "error", "message"),
    [
        ([1.0], "row", TypeError, "w must be a tensor of fp32, bf16, fp16 or fp64, got list"),
        (torch.ones(2, 2, dtype=torch.int8), "row", TypeError, r"got torch\.int8"),
        (torch.ones(2, 2).to(FP8), "row", TypeError, r"got torch\.float8_e4m3fn"),
        (torch.ones(4), "row", ValueError, r"w must be \[N, K\]"),
        (torch.ones(4, 4), "tensor", ValueError, "granularity='tensor' is not one of row, block"),
        (torch.tensor([[1.0, torch.nan]]), "row", ValueError, "NaN or Inf"),
        (torch.tensor([[1.0, torch.inf]]), "block", ValueError, "NaN or Inf"),
    ],
    ids=str,
)
def test_bad_weights_to_quantize(w, granularity, error, message):
    with pytest.raises(error, match=message):
        ops.quantize_fp8(w, granularity)


def test_bad_weights_to_dequantize():
    with pytest.raises(TypeError, match=r"w_q has dtype torch\.float32"):
        ops.dequantize_fp8(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"w_scale is \(3,\)"):
        ops.dequantize_fp8(torch.ones(2, 2).to(FP8), torch.ones(3))


def test_op_refuses_tensors_of_other_devices():
    x, *w = problem(3, 5, 7, "row")
    with pytest.raises(RuntimeError):
        torch.ops.pyops.fp8_linear(x, *w, torch.ones(5, device="meta")).sum().item()
