"""The op `pyops::int8_weight_linear`: every kernel against a float64 oracle and plain PyTorch."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import randint, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int8_weight_linear import int8_weight_linear_ref

pytestmark = pytest.mark.usefixtures("poison")
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
DIGIT_ISAS, DIGIT_ROWS = ("avx512vnni", "amx"), 3
"""Up to so many rows, these take as integers of 32 bits (csrc/digits.h)."""


def form(q_w, packed):
    return ops.pack_int8(q_w) if packed else q_w


def problem(M, N, K, dtype=torch.float32, seed=0):
    q_w, w_scale = ops.quantize_int8(randn(N, K, seed=seed, scale=K**-0.5 if K else 1.0))
    return randn(M, K, dtype=dtype, seed=seed + 1), q_w, w_scale


def assert_close_to_oracle(y, x, q_w, w_scale, bias=None, residual=None, activation="none"):
    """At most twice the error of plain PyTorch in x's dtype, and eps·√K of the largest magnitude that is added."""
    N, K = q_w.shape
    M = math.prod(x.shape[:-1])
    assert y.shape == (*x.shape[:-1], N)
    assert y.dtype == x.dtype
    if not y.numel():
        return
    rows, dtype = x.reshape(M, K).contiguous(), x.dtype  # torch itself reads the NaN beside a bf16 view
    w = q_w.double() * w_scale.double()[:, None]
    terms, plain = [rows.double() @ w.T], rows @ q_w.to(dtype).T * w_scale.to(dtype)
    magnitude = terms[0].abs().max()
    for t in (bias, residual):
        if t is not None:
            t = t.reshape(M, N) if t is residual else t
            terms.append(t.double())
            plain = plain + t.to(dtype)
            magnitude = magnitude + t.abs().max()
    exact = ACTIVATIONS[activation](sum(terms))
    allowed = 2 * (ACTIVATIONS[activation](plain).double() - exact).abs().max()
    allowed += torch.finfo(torch.float32).eps * (math.sqrt(K) + 4) * magnitude
    allowed += torch.finfo(dtype).eps * exact.abs().max() / 2  # the rounding of y itself
    error = (y.reshape(M, N).double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# ------------------------------------------------------------------------------------------- exact sums


@PACKED
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_sums_of_small_integers_are_exact(isa, dtype, packed):
    streams = [
        (1, 33, 577),
        (2, 33, 257),
        (2, 33, 577),
        (3, 33, 257),
        (3, 70, 515),
    ]  # three parts of K, and what is left
    for M, N, K in [*cases.SHAPES, *streams, (5, 33, 1100), (40, 70, 2100)]:
        x, q_w = randint(-3, 3, M, K), randint(-128, 127, N, K)
        exact = (x.double() @ q_w.double().T).to(dtype)
        assert torch.equal(ops.int8_weight_linear(x.to(dtype), form(q_w, packed), torch.ones(N)), exact), (M, N, K)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_bit_of_x_counts(isa, dtype):
    """An identity weight gives x back: a product with a rounded x would not."""
    for M in (1, 2, 3, 4, 5, 20, 33):
        if isa in DIGIT_ISAS and M <= DIGIT_ROWS:
            continue  # the next test
        x = randn(M, 96, dtype=dtype) * 10.0 ** randint(-6, 3, M, 96).to(dtype)
        assert torch.equal(ops.int8_weight_linear(x, torch.eye(96, dtype=torch.int8), torch.ones(96)), x), M


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("M", range(1, DIGIT_ROWS + 1))
def test_what_is_lost_of_few_rows(isa, dtype, M):
    """Nothing down to 2⁻³⁰ of a row's power of two, and at most 2⁻³¹ of its largest magnitude below."""
    eye = torch.eye(96, dtype=torch.int8), torch.ones(96)
    fits = randn(M, 96).sign() * (1 + torch.rand(M, 96).to(dtype).float()) * 2.0 ** randint(-7, 0, M, 96)
    fits = fits.to(dtype)
    assert torch.equal(ops.int8_weight_linear(fits, *eye), fits)
    x = randn(M, 96, dtype=dtype) * 10.0 ** randint(-6, 3, M, 96).to(dtype)
    lost = (ops.int8_weight_linear(x, *eye).double() - x.double()).abs()
    rounding = x.double().abs() * torch.finfo(dtype).eps / 2
    assert (lost <= 2.0**-31 * x.double().abs().amax(1, keepdim=True) + rounding).all()


def test_which_rows_are_rounded(isa):
    """By all that one loses: at most 2⁻²² of Σ |x| below 2⁻⁶ of its power of two. A value of 1000 σ is just within."""
    for sigma, part in ((1, -24), (1000, -22), (10000, None)):
        x = randn(1, 512)
        x[0, 0] = max(x.max().item(), sigma)
        lost = ops.int8_weight_linear(x, torch.eye(512, dtype=torch.int8), torch.ones(512)).double() - x
        if isa not in DIGIT_ISAS or part is None:
            assert not lost.any(), sigma
        else:
            small = x.abs() < 2.0 ** (math.floor(math.log2(x.abs().max())) - 6)
            assert 0 < lost.abs().sum() <= 2.0**part * x.abs()[small].double().sum(), sigma


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("K", [65535, 65536, 65537, 66000])
def test_the_largest_sums(isa, K, sign):
    """All bits of x set, all weights at an end of their range. At 66000 sums of digits would overflow."""
    x = torch.full((DIGIT_ROWS, K), sign * (2.0 - 2.0**-23))
    q_w = torch.tensor([-128, 127]).to(torch.int8)[:, None].expand(2, K).contiguous()
    for M in range(1, DIGIT_ROWS + 1):
        y = ops.int8_weight_linear(x[:M], ops.pack_int8(q_w), torch.ones(2))
        rtol = 2.0**-24 if isa in DIGIT_ISAS and K <= 65536 else 2e-6
        torch.testing.assert_close(y.double(), x[:M].double() @ q_w.double().T, rtol=rtol, atol=0)


def test_every_weight(isa):
    q_w = torch.arange(-128, 128).to(torch.int8)[:, None].expand(256, 5).contiguous()
    for M in (1, 2, 3, 4, 17):
        y = ops.int8_weight_linear(torch.ones(M, 5), ops.pack_int8(q_w), torch.ones(256))
        assert torch.equal(y, (torch.arange(-128, 128) * 5.0).expand(M, 256))


# ------------------------------------------------------------------------------------------- float error


@PACKED
@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_error_against_float64(isa, dtype, activation, packed):
    for M, N, K in ((1, 33, 31), (5, 64, 100), (19, 97, 65)):
        x, q_w, w_scale = problem(M, N, K, dtype)
        rest = (randn(N, seed=5), randn(M, N, dtype=dtype, seed=6, scale=3.0), activation)
        y = ops.int8_weight_linear(x, form(q_w, packed), w_scale, rest[0], residual=rest[1], activation=activation)
        assert_close_to_oracle(y, x, q_w, w_scale, *rest)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.LONG_SHAPES, (300, 48, 2100), (140, 1040, 1030)], ids=str)
def test_error_of_every_shape(isa, shape, dtype):
    x, q_w, w_scale = problem(*shape, dtype)
    assert_close_to_oracle(ops.int8_weight_linear(x, ops.pack_int8(q_w), w_scale), x, q_w, w_scale)


@pytest.mark.parametrize("K", [8, 256, 4096])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4])
def test_an_outlier_that_no_weight_sees(isa, dtype, M, K):
    """What an integer loses is little beside the largest x, which does not help where that is multiplied by zeros."""
    x, q_w, w_scale = problem(M, 33, K)
    q_w[:, 0] = 0
    weight, top = ops.pack_int8(q_w), min(torch.finfo(dtype).max, 3e10)
    for h in (1e3, 3e3, 3e4, 1e6, 1e8, 3e10):
        rows = x * min(1, top / h)
        rows[M // 2, 0] = min(h, top)
        rows = rows.to(dtype)
        assert_close_to_oracle(ops.int8_weight_linear(rows, weight, w_scale), rows, q_w, w_scale)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(isa, data):
    M, N, K = (data.draw(st.integers(0, top), label=name) for name, top in (("M", 40), ("N", 70), ("K", 200)))
    dtype = data.draw(st.sampled_from(cases.FLOATS))
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    seed = data.draw(st.integers(0, 999))
    x = randn(M, K, dtype=dtype, seed=seed, scale=10.0 ** data.draw(st.integers(-3, 0)))
    if M and K:
        x = data.draw(st.sampled_from(list(cases.LAYOUTS.values()) + list(cases.EXPANDED.values())))(x)
    q_w, w_scale = randint(-127, 127, N, K, seed=seed), randn(N, seed=seed).abs() * 0.01
    bias = randn(N, dtype=data.draw(st.sampled_from(cases.FLOATS)), seed=seed + 1) if data.draw(st.booleans()) else None
    residual = randn(M, N, dtype=dtype, seed=seed + 2) if data.draw(st.booleans()) else None
    weight = form(q_w, data.draw(st.booleans(), label="packed"))
    y = ops.int8_weight_linear(x, weight, w_scale, bias, residual=residual, activation=activation)
    assert_close_to_oracle(y, x, q_w, w_scale, bias, residual, activation)


# ------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 40])
def test_nan_and_inf_stay_in_their_row(isa, dtype, M):
    x, q_w, w_scale = problem(M, 40, 67, dtype)
    q_w[q_w == 0] = 1
    clean = ops.int8_weight_linear(x, ops.pack_int8(q_w), w_scale)
    row = M // 2
    others = [m for m in range(M) if m != row]
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[row, 63] = value
        y = ops.int8_weight_linear(bad, ops.pack_int8(q_w), w_scale)
        expected = value * q_w[:, 63].sign()
        assert torch.equal(y[row].float().nan_to_num(0, 1, -1), expected.nan_to_num(0, 1, -1))
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-37, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("M", [1, 2, 3, 20])
def test_tiny_and_huge_rows(isa, M, magnitude):
    """Rows near the ends of fp32, beside usual ones: neither the sums nor the parts that AMX takes leave the range."""
    if isa == "ref" and magnitude == 3e38:
        pytest.skip("the reference takes its sums before the scale, which overflows")
    x = randn(M, 70).clamp(-1, 1)
    x[M // 2] = x[M // 2].double().mul(magnitude).float()
    q_w, w_scale = randint(-127, 127, 33, 70), torch.full((33,), 1e-4)
    y = ops.int8_weight_linear(x, ops.pack_int8(q_w), w_scale).double()
    exact = x.double() @ q_w.double().T * w_scale.double()
    size = x.double().abs() @ q_w.double().abs().T * w_scale.double()
    assert ((y - exact).abs() <= 2e-6 * size + 2.0**-149).all()


def rows_of_all_kinds(K):
    """By name: rows that integers of 32 bits hold, that they do not hold, and both ends of where they are tried."""
    ordinary, outlier, nan = randn(K), randn(K, seed=1), randn(K, seed=2)
    outlier[3], nan[5] = 1e6, torch.nan
    spread = randn(K, seed=4) * 10.0 ** randint(-20, 0, K)
    rows = {"ordinary": ordinary, "zero": torch.zeros(K), "outlier": outlier, "nan": nan, "spread": spread}
    for exponent in (-126, -100, -99, -98, -97, -96, 29, 30, 31, 32, 101, 102, 103, 126):
        rows[f"2^{exponent}"] = (randn(K, seed=3).clamp(-1, 1).double() * 1.5 * 2.0**exponent).float()
    return rows


def test_rows_of_all_kinds(isa):
    """Each is right beside each other, and has the same bits alone and beside any where rows are taken as integers."""
    rows, q_w, w_scale = rows_of_all_kinds(200), randint(-127, 127, 33, 200), torch.full((33,), 1e-4)
    if isa == "ref":
        del rows["2^126"]  # the reference takes its sums before the scale, which overflows
    weight = ops.pack_int8(q_w)
    alone = {name: ops.int8_weight_linear(x[None], weight, w_scale)[0] for name, x in rows.items()}
    for name, x in rows.items():
        exact = q_w.double() @ x.double() * w_scale.double()
        size = q_w.double().abs() @ x.double().abs() * w_scale.double()
        error = (alone[name].double() - exact).abs()
        assert name == "nan" or (error <= 2e-6 * size + 2.0**-149).all(), name
    for names in (
        *itertools.product(rows, repeat=2),
        *itertools.permutations(["ordinary", "zero", "outlier", "nan"], 3),
    ):
        y = ops.int8_weight_linear(torch.stack([rows[name] for name in names]), weight, w_scale)
        for name, got in zip(names, y, strict=True):
            if isa in DIGIT_ISAS:
                assert torch.equal(got.nan_to_num(7), alone[name].nan_to_num(7)), (name, names)
            else:
                size = q_w.double().abs() @ rows[name].double().abs() * w_scale.double()
                error = (got.double() - alone[name].double()).abs()
                assert name == "nan" or (error <= 2e-6 * size + 2.0**-149).all(), (name, names)


def test_zero_rows_give_the_bias(isa):
    bias = randn(33)
    for M in (1, 2, 3, 20):
        y = ops.int8_weight_linear(torch.zeros(M, 70), randint(-127, 127, 33, 70), torch.ones(33), bias)
        assert torch.equal(y, bias.expand(M, 33))


# ------------------------------------------------------------------------------------------- shapes and strides


@PACKED
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(isa, shape, packed):
    M, N, K = shape
    bias, weight = randn(N), form(randint(-127, 127, N, K), packed)
    y = ops.int8_weight_linear(randn(M, K), weight, torch.ones(N), bias, activation="relu")
    assert torch.equal(y, bias.relu().expand(M, N))


@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
def test_leading_dimensions(leading):
    _, q_w, w_scale = problem(1, 19, 37)
    x, residual = randn(*leading, 37), randn(*leading, 19)
    y = ops.int8_weight_linear(x, ops.pack_int8(q_w), w_scale, residual=residual)
    flat = ops.int8_weight_linear(x.reshape(-1, 37), q_w, w_scale, residual=residual.reshape(-1, 19))
    assert torch.equal(y, flat.reshape(*leading, 19))


@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
def test_strides(isa, layout):
    change = {**cases.LAYOUTS, **cases.EXPANDED}[layout]
    x, q_w, w_scale = problem(18, 33, 70)
    same, residual = change(x), change(randn(18, 33))
    y = ops.int8_weight_linear(same, ops.pack_int8(q_w), w_scale, residual=residual)
    assert torch.equal(y, ops.int8_weight_linear(same.contiguous(), q_w, w_scale, residual=residual.contiguous()))


@cases.needs_native  # torch's matmul of floats differs with the number of threads
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_threads_and_repeats_give_the_same_bits(isa, threads, dtype):
    for shape in (
        (1, 1030, 515),
        (2, 1030, 515),
        (3, 1030, 515),
        (4, 260, 300),
        (9, 1030, 515),
        (16, 2080, 1030),
        (130, 260, 1300),
    ):
        x, q_w, w_scale = problem(*shape, dtype)
        x[-1, 0] = 6e4
        packed = ops.pack_int8(q_w)
        threads(1)
        first = ops.int8_weight_linear(x, packed, w_scale, activation="gelu")
        for n in (1, 2, 3):
            threads(n)
            assert torch.equal(ops.int8_weight_linear(x, packed, w_scale, activation="gelu"), first), (shape, n)


# ------------------------------------------------------------------------------------------- gradients and PyTorch


def test_gradients(isa):
    for activation in cases.ACTIVATION_NAMES:
        x, q_w, w_scale = problem(6, 33, 70)
        leaves = [t.requires_grad_() for t in (x.view(2, 3, 70), randn(33), randn(2, 3, 33, seed=9))]
        grad = randn(2, 3, 33, seed=8)
        y = ops.int8_weight_linear(
            leaves[0], ops.pack_int8(q_w), w_scale, leaves[1], residual=leaves[2], activation=activation
        )
        got = torch.autograd.grad(y, leaves, grad)
        doubles = [t.detach().double().requires_grad_() for t in leaves]
        exact = F.linear(doubles[0], q_w.double() * w_scale.double()[:, None], doubles[1]) + doubles[2]
        want = torch.autograd.grad(ACTIVATIONS[activation](exact), doubles, grad.double())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_compile_in_full(fresh_compiler, requires_grad):
    _, q_w, w_scale = problem(5, 33, 70)
    weight = ops.pack_int8(q_w)

    def f(x):
        return ops.int8_weight_linear(x * 2, weight, w_scale, activation="silu") + 1

    cases.assert_compiles_in_full(f, 70, requires_grad)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "x has dtype"),
        ({"x": torch.zeros(3, 5)}, ValueError, "w_q is"),
        ({"w_q": torch.zeros(6, 4)}, TypeError, "w_q has dtype"),
        ({"w_scale": torch.zeros(6, dtype=torch.float16)}, TypeError, "w_scale has dtype"),
        ({"bias": torch.zeros(5)}, ValueError, "bias is"),
        ({"residual": torch.zeros(3, 5)}, ValueError, "residual is"),
        ({"activation": "mish"}, ValueError, "activation='mish'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(change, error, match):
    args = {"x": torch.zeros(3, 4), "w_q": torch.zeros(6, 4, dtype=torch.int8), "w_scale": torch.ones(6), **change}
    with pytest.raises(error, match=match):
        ops.int8_weight_linear(**args)


@cases.needs_native
def test_the_kernel_refuses_what_does_not_fit():
    """The op itself, past the public function's checks."""
    op = torch.ops.pyops.int8_weight_linear
    q_w = torch.zeros(33, 70, dtype=torch.int8)
    for args in (
        (torch.zeros(3, 71), q_w, torch.ones(33)),
        (torch.zeros(3, 70), q_w, torch.ones(34)),
        (torch.zeros(3, 70), ops.pack_int8(q_w)[:1], torch.ones(33)),
        (torch.zeros(3, 70), q_w, torch.ones(33), torch.zeros(32)),
        (torch.zeros(3, 70), q_w, torch.ones(33), None, torch.zeros(2, 33)),
    ):
        with pytest.raises(RuntimeError, match="int8_weight_linear"):
            op(*args)


@cases.needs_native
def test_kernels_agree_with_the_reference():
    x, q_w, w_scale = problem(37, 100, 333)
    reference = int8_weight_linear_ref(x, q_w, w_scale)
    for y in cases.of_every_isa(lambda: ops.int8_weight_linear(x, ops.pack_int8(q_w), w_scale)).values():
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
