"""The op `pyops::int8_linear`: every kernel against exact integers, a float64 oracle and the reference."""

from __future__ import annotations

import math

import cases
import conftest
import numpy as np
import pytest
import torch
from cases import randint, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import backend, ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int8_linear import int8_linear_ref, packed_shape, quantize_rows_ref, wants_packed

pytestmark = pytest.mark.usefixtures("poison")
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
ONE = torch.ones(())


def oracle(x, q_w, w_scale, bias=None, residual=None, activation="none", x_scale=None, smooth=None):
    """The equation in float64 on the same integers, with the magnitude of the terms that it adds."""
    N, K = q_w.shape
    q_x, s_x = quantize_rows_ref(x.reshape(math.prod(x.shape[:-1]), K), x_scale, smooth)
    acc = (q_x.double() @ q_w.double().T) * (s_x.double()[:, None] * w_scale.double())
    terms = [acc]
    terms += [] if bias is None else [bias.double().expand_as(acc)]
    terms += [] if residual is None else [residual.double().reshape(acc.shape)]
    y = ACTIVATIONS[activation](sum(terms))
    magnitude = sum(t.abs() for t in terms)
    return y.reshape(*x.shape[:-1], N), magnitude.reshape(*x.shape[:-1], N)


def assert_close_to_oracle(y, x, q_w, w_scale, *rest):
    """At most twice the error of the reference, and four roundings of fp32."""
    exact, magnitude = oracle(x, q_w, w_scale, *rest)
    reference = int8_linear_ref(x, q_w, w_scale, *rest)
    assert y.shape == reference.shape
    assert y.dtype == x.dtype
    if not y.numel():
        return
    allowed = 2 * (reference.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * magnitude.max()
    error = (y.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def problem(M, N, K, dtype=torch.float32, seed=0):
    q_w, w_scale = ops.quantize_int8(randn(N, K, seed=seed, scale=K**-0.5 if K else 1.0))
    return randn(M, K, dtype=dtype, seed=seed + 1), q_w, w_scale


def form(q_w, packed):
    return ops.pack_int8(q_w) if packed else q_w


# ------------------------------------------------------------------------------------------- exact integers


@PACKED
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_integers_are_exact(isa, dtype, packed):
    for M, N, K in cases.SHAPES:
        x, q_w = randint(-127, 127, M, K), randint(-128, 127, N, K)
        exact = (x.double() @ q_w.double().T).to(dtype)
        x[:, 0] = x[:, 0].sign() * 127 + (x[:, 0] == 0) * 127  # so that the dynamic scale is 1 as well
        dynamic = (x.double() @ q_w.double().T).to(dtype)
        y = ops.int8_linear(x.to(dtype), form(q_w, packed), torch.ones(N))
        assert torch.equal(y, dynamic), (M, N, K)
        x = randint(-127, 127, M, K).to(dtype)
        y = ops.int8_linear(x, form(q_w, packed), torch.ones(N), x_scale=1.0)
        assert torch.equal(y, exact), (M, N, K)


@PACKED
@pytest.mark.parametrize("shape", cases.LONG_SHAPES, ids=str)
def test_extreme_integers_do_not_saturate(isa, shape, packed):
    M, N, K = shape
    for a in (127, -127):
        for b in (127, -127, -128):
            x, q_w = torch.full((M, K), float(a)), torch.full((N, K), b, dtype=torch.int8)
            y = ops.int8_linear(x, form(q_w, packed), torch.ones(N), x_scale=1.0)
            assert torch.equal(y, torch.full((M, N), K * a * b).float()), (a, b)


def test_alternating_extremes_do_not_saturate(isa):
    """Pairs of equal sign fill the 16-bit sums of AVX2; pairs of opposite sign hide an overflow."""
    K = 256
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]]).repeat(1, K // 4)
    q_w = (signs * 127).clamp(-128, 127).to(torch.int8)
    q_w[3] = -128
    y = ops.int8_linear((signs * 127).float(), ops.pack_int8(q_w), torch.ones(4), x_scale=1.0)
    assert torch.equal(y, ((signs * 127).double() @ q_w.double().T).float())


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_quantized_rows_are_those_of_the_reference(isa, dtype):
    """An identity weight shows s_x · q_x."""
    for M, K in ((1, 1), (3, 31), (5, 64), (17, 129), (40, 300)):
        x = randn(M, K, dtype=dtype, scale=3.0)
        x[:, : K // 3] *= 1e-2
        q, s = quantize_rows_ref(x)
        y = ops.int8_linear(x, torch.eye(K, dtype=torch.int8), torch.ones(K))
        assert torch.equal(y, (q.float() * s[:, None]).to(dtype))


def test_ties_round_to_even(isa):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    y = ops.int8_linear(x, torch.eye(8, dtype=torch.int8), torch.ones(8))
    assert y.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


# ------------------------------------------------------------------------------------------- float error


@PACKED
@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_error_against_float64(isa, dtype, activation, packed):
    for M, N, K in ((1, 33, 31), (5, 64, 100), (19, 97, 65)):
        x, q_w, w_scale = problem(M, N, K, dtype)
        rest = (randn(N, seed=5), randn(M, N, dtype=dtype, seed=6, scale=3.0), activation)
        y = ops.int8_linear(x, form(q_w, packed), w_scale, rest[0], residual=rest[1], activation=activation)
        assert_close_to_oracle(y, x, q_w, w_scale, *rest)


@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.LONG_SHAPES], ids=str)
def test_error_of_every_shape(isa, shape):
    x, q_w, w_scale = problem(*shape)
    y = ops.int8_linear(x, ops.pack_int8(q_w), w_scale)
    assert_close_to_oracle(y, x, q_w, w_scale)


def test_canonical_and_packed_weight_give_the_same_bits(isa):
    for shape in cases.SHAPES:
        x, q_w, w_scale = problem(*shape, torch.bfloat16)
        assert torch.equal(ops.int8_linear(x, q_w, w_scale), ops.int8_linear(x, ops.pack_int8(q_w), w_scale)), shape


@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
def test_activations_at_their_ends(isa, activation):
    """Large, tiny and zero arguments: exact limits, no NaN from an overflowing exp."""
    z = torch.tensor([0.0, 1e-30, 1e-6, 0.1, 1, 3, 6, 10, 20, 88, 89, 100, 1e4, 1e20, 1e30, 1e37])
    z = torch.cat([z, -z, torch.linspace(-95, 95, 9001)])  # the sweep meets every rounding of an exponent
    zero = torch.zeros(len(z), 1, dtype=torch.int8)
    y = ops.int8_linear(torch.ones(1, 1), zero, torch.ones(len(z)), z, activation=activation)[0]
    exact = ACTIVATIONS[activation](z.double())
    reference = ACTIVATIONS[activation](z).double()
    allowed = 2 * (reference - exact).abs() + 4 * torch.finfo(torch.float32).eps * z.double().abs().clamp(max=10)
    assert y.isfinite().all()
    assert ((y.double() - exact).abs() <= allowed + 1e-6 * exact.abs() + 1e-8).all(), (
        y.double() - exact
    ).abs() - allowed


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize(("M", "N", "K"), cases.BLOCKED)
def test_blocks_waves_and_streaming_stores(isa, M, N, K, dtype):
    """Shapes that are cut: several blocks and waves of rows, K in slices, results stored past the caches."""
    if isa == "generic" and M * N * K > 1e9:
        pytest.skip("nothing of its own there, and slow")
    if dtype != torch.float32:
        M *= 2  # the same bytes of result
    x, q_w, bias = randint(-127, 127, M, K), randint(-128, 127, N, K), randn(N, seed=1)
    exact = (x.double() @ q_w.double().T) * 2.0**-12  # powers of two: the only rounding is that of the epilogue
    y = ops.int8_linear(x.to(dtype), ops.pack_int8(q_w), torch.full((N,), 2.0**-12), bias, x_scale=1.0)
    ulps = 2.0**-22 * (exact.abs() + bias.abs()) + torch.finfo(dtype).eps / 2 * (exact + bias).abs()
    assert ((y - (exact + bias)).abs() <= ulps).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(isa, data):
    M, N, K = (data.draw(st.integers(0, top), label=name) for name, top in (("M", 40), ("N", 70), ("K", 200)))
    dtype = data.draw(st.sampled_from(cases.FLOATS))
    activation = data.draw(st.sampled_from(cases.ACTIVATION_NAMES))
    scale = 10.0 ** data.draw(st.integers(-3, 2), label="log10 of the magnitude")
    seed = data.draw(st.integers(0, 999))
    x = randn(M, K, dtype=dtype, seed=seed, scale=scale)
    if M and K:
        x = data.draw(st.sampled_from(list(cases.LAYOUTS.values()) + list(cases.EXPANDED.values())))(x)
    q_w = randint(-127, 127, N, K, seed=seed)
    w_scale = randn(N, seed=seed).abs() * 0.01
    bias = randn(N, dtype=data.draw(st.sampled_from(cases.FLOATS)), seed=seed + 1) if data.draw(st.booleans()) else None
    residual = None
    if data.draw(st.booleans()):
        residual = randn(M, N, dtype=dtype, seed=seed + 2)
        residual = residual.T.contiguous().T if data.draw(st.booleans()) else residual
    static = data.draw(st.sampled_from(["dynamic", "one", "rows"]))
    x_scale = {"dynamic": None, "one": torch.tensor(scale / 50), "rows": torch.full((M,), scale / 40)}[static]
    smooth = randn(K, seed=seed + 3).abs() + 0.05 if data.draw(st.booleans(), label="smooth") else None
    weight = form(q_w, data.draw(st.booleans(), label="packed"))
    y = ops.int8_linear(
        x, weight, w_scale, bias, residual=residual, activation=activation, x_scale=x_scale, smooth=smooth
    )
    assert_close_to_oracle(y, x, q_w, w_scale, bias, residual, activation, x_scale, smooth)


# ------------------------------------------------------------------------------------------- shapes and strides


@PACKED
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(isa, shape, packed):
    M, N, K = shape
    bias = randn(N)
    y = ops.int8_linear(randn(M, K), form(randint(-127, 127, N, K), packed), torch.ones(N), bias, activation="relu")
    assert torch.equal(y, bias.relu().expand(M, N))


@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
def test_leading_dimensions(leading):
    _, q_w, w_scale = problem(1, 19, 37)
    x, residual = randn(*leading, 37), randn(*leading, 19)
    y = ops.int8_linear(x, ops.pack_int8(q_w), w_scale, residual=residual)
    flat = ops.int8_linear(x.reshape(-1, 37), q_w, w_scale, residual=residual.reshape(-1, 19))
    assert torch.equal(y, flat.reshape(*leading, 19))


@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
def test_strides(isa, layout):
    change = {**cases.LAYOUTS, **cases.EXPANDED}[layout]
    x, q_w, w_scale = problem(18, 33, 70)
    bias, residual = randn(33), randn(18, 33)
    same = change(x)
    y = ops.int8_linear(same, ops.pack_int8(q_w), w_scale)
    assert torch.equal(y, ops.int8_linear(same.contiguous(), q_w, w_scale))
    assert torch.equal(ops.int8_linear(x, change(q_w), w_scale), ops.int8_linear(x, change(q_w).contiguous(), w_scale))
    r = change(residual)
    y = ops.int8_linear(x, q_w, w_scale.repeat_interleave(2)[::2], bias.repeat_interleave(3)[::3], residual=r)
    assert torch.equal(y, ops.int8_linear(x, q_w, w_scale, bias, residual=r.contiguous()))


@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.EMPTY_SHAPES], ids=str)
def test_pack_is_invertible(shape):
    _, N, K = shape
    q_w = randint(-128, 127, N, K)
    packed = ops.pack_int8(q_w)
    assert packed.shape == packed_shape(N, K)
    assert torch.equal(ops.unpack_int8(packed, N, K), q_w)
    panels = packed.shape[0]
    compensation = packed[:, 0].contiguous().view(torch.int32).view(-1)
    assert torch.equal(compensation[:N], -128 * q_w.sum(dim=1, dtype=torch.int32))
    assert not compensation[N:].any()
    everything = ops.unpack_int8(packed, panels * 32, (packed.shape[1] - 1) * 4)
    assert torch.equal(everything[:N, :K], q_w)
    assert not everything[N:].any(), "padding is not zero"
    assert not everything[:, K:].any(), "padding is not zero"


# ------------------------------------------------------------------------------------------- special rows


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("M", [3, 40])
def test_nan_and_inf_stay_in_their_row(isa, dtype, M):
    x, q_w, w_scale = problem(M, 40, 67, dtype)
    clean = ops.int8_linear(x, ops.pack_int8(q_w), w_scale)
    for value in (torch.nan, torch.inf, -torch.inf):
        for k in (0, 63, 66):
            bad = x.clone()
            bad[1, k] = value
            for x_scale in (None, ONE):
                y = ops.int8_linear(bad, ops.pack_int8(q_w), w_scale, x_scale=x_scale)
                assert y[1].isnan().all()
                if x_scale is None:
                    assert torch.equal(y[[0, *range(2, M)]], clean[[0, *range(2, M)]])


def test_zero_and_subnormal_rows_give_the_bias(isa):
    x = randn(6, 70)
    x[1], x[2], x[3], x[4] = 0.0, 1e-45, 1e-39, 2.0**-120
    bias = randn(33)
    y = ops.int8_linear(x, randint(-127, 127, 33, 70), torch.ones(33), bias)
    assert torch.equal(y[1:5], bias.expand(4, 33))


def test_smallest_and_largest_rows(isa):
    """2⁻¹¹⁹ is the smallest magnitude with a finite reciprocal; the largest finite row must not overflow."""
    x = torch.zeros(2, 70)
    x[0, 3], x[1, 3] = 2.0**-119, 3.4e38
    y = ops.int8_linear(x, torch.eye(70, dtype=torch.int8), torch.ones(70))
    assert torch.equal(y, int8_linear_ref(x, torch.eye(70, dtype=torch.int8), torch.ones(70)))
    assert y[0, 3] > 0
    assert y.isfinite().all()


def test_static_scale_saturates(isa):
    x = torch.tensor([[0.4, 0.6, -300.0, 300.0, 126.6, 127.4, 0.0, -127.6]])
    y = ops.int8_linear(x, torch.eye(8, dtype=torch.int8), torch.ones(8), x_scale=1.0)
    assert y.tolist() == [[0, 1, -127, 127, 127, 127, 0, -127]]


def test_static_scale_of_each_row(isa):
    x, q_w, w_scale = problem(21, 40, 67)
    scales = randn(21).abs() * 0.01 + 0.005
    y = ops.int8_linear(x.view(3, 7, 67), ops.pack_int8(q_w), w_scale, x_scale=scales.view(3, 7))
    rows = [ops.int8_linear(x[m : m + 1], q_w, w_scale, x_scale=float(scales[m])) for m in range(21)]
    assert torch.equal(y.view(21, 40), torch.cat(rows))


def quantize_by_hand(x, scale, smooth):
    """The integers of the contract, written out in numpy, one rounding to fp32 after the other."""
    with np.errstate(all="ignore"):
        v = x.float().numpy()
        if smooth is not None:
            v = v * (np.float32(1) / smooth.numpy())
        amax = np.abs(v).max(axis=1, keepdims=True)
        inverse = np.float32(127) / amax if scale is None else np.float32(1) / scale.numpy().reshape(-1, 1)
        q = np.clip(np.rint(v * inverse), -127, 127)
    s = amax / np.float32(127) if scale is None else np.broadcast_to(scale.numpy().reshape(-1, 1), amax.shape)
    assert v.dtype == inverse.dtype == np.float32
    return torch.from_numpy(q), torch.from_numpy(s.copy())


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smooth"])
@pytest.mark.parametrize("scales", ["dynamic", "one", "rows"])
def test_static_and_smoothed_integers_are_exact(isa, scales, smoothed, dtype):
    """An identity weight shows s_x · q_x, of every tail of a vector and of 64."""
    for M, K in ((1, 1), (1, 63), (3, 31), (5, 64), (17, 129), (40, 300)):
        x = randn(M, K, dtype=dtype, scale=3.0)
        smooth = randn(K, seed=4).exp() if smoothed else None
        scale = {"dynamic": None, "one": torch.tensor(0.031), "rows": randn(M, seed=3).abs() * 0.02 + 0.01}[scales]
        q, s = quantize_by_hand(x, scale, smooth)
        y = ops.int8_linear(x, torch.eye(K, dtype=torch.int8), torch.ones(K), x_scale=scale, smooth=smooth)
        assert torch.equal(y, (q * s).to(dtype)), (M, K)
        q_ref, s_ref = quantize_rows_ref(x, scale, smooth)
        assert torch.equal(q_ref.float(), q)
        assert torch.equal(s_ref, s[:, 0])


def test_huge_finite_values_saturate(isa):
    """x · (1 / s_x) overflows to Inf, which is clamped as any number beyond 127; NaN and Inf of x itself are not."""
    x = torch.tensor([[3e38, -3e38, 1.0, -1e10, 0.0, 1e-45], [1.0, torch.nan, 3e38, 1.0, 1.0, 1.0]])
    y = ops.int8_linear(x, torch.eye(6, dtype=torch.int8), torch.ones(6), x_scale=1e-30)
    assert torch.equal(y[0], torch.tensor([127.0, -127, 127, -127, 0, 0]) * torch.tensor(1e-30))
    assert y[1].isnan().all()


def test_a_row_that_overflows_when_smoothed_is_not_finite(isa):
    x = torch.tensor([[1e38, 1.0], [1.0, 2.0]])
    for x_scale in (None, 0.1):
        y = ops.int8_linear(
            x, torch.eye(2, dtype=torch.int8), torch.ones(2), x_scale=x_scale, smooth=torch.tensor([1e-3, 1.0])
        )
        assert y[0].isnan().all()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("static", [False, True])
def test_gradient_of_a_smoothed_input(static):
    smooth = torch.tensor([0.5, 2.0, 4.0])
    q_w = torch.tensor([[10, -20, 127], [3, 50, -7]], dtype=torch.int8)
    x = torch.tensor([[1.0, -300.0, 2.0]], requires_grad=True)
    y = ops.int8_linear(x, q_w, torch.ones(2), x_scale=1.0 if static else None, smooth=smooth)
    y.backward(torch.tensor([[1.0, 2.0]]))
    inside = torch.tensor([1.0, 0.0, 1.0]) if static else torch.ones(3)  # -300 / 2 lies beyond -127.5
    assert torch.equal(x.grad[0], (q_w[0] + 2.0 * q_w[1]) / smooth * inside)


# ------------------------------------------------------------------------------------------- determinism


def test_threads_and_repeats_give_the_same_bits(isa, threads):
    for shape in ((1, 1030, 515), (130, 260, 300), (700, 64, 2048)):
        x, q_w, w_scale = problem(*shape)
        packed = ops.pack_int8(q_w)
        threads(1)
        first = ops.int8_linear(x, packed, w_scale, activation="gelu")
        for n in (1, 2, 2, 3):
            threads(n)
            assert torch.equal(ops.int8_linear(x, packed, w_scale, activation="gelu"), first), (shape, n)


@cases.needs_native  # torch's activations differ with where a value lies
@pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
@pytest.mark.parametrize("scale", [None, 0.02], ids=["dynamic", "static"])
def test_a_row_has_the_same_bits_alone(isa, scale, packed):
    """Every kernel and every height of its tiles, K in one range and in several."""
    for N, K, dtype in ((45, 333, torch.bfloat16), (33, 1301, torch.float32)):
        x, q_w, w_scale = problem(700, N, K, dtype)
        options = {"activation": "gelu", "x_scale": None if scale is None else torch.tensor(scale)}
        args = form(q_w, packed), w_scale, randn(N)
        cases.assert_rows_are_those_alone(lambda x, a=args, o=options: ops.int8_linear(x, *a, **o), x)


@cases.needs_native
def test_every_isa_gives_the_same_integers():
    """Only the rounding of the epilogue may differ, and it is the same fp32 arithmetic."""
    x, q_w, w_scale = problem(37, 100, 333)
    results = cases.of_every_isa(lambda: ops.int8_linear(x, ops.pack_int8(q_w), w_scale))
    for result in results.values():
        torch.testing.assert_close(result, results["generic"], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------- gradients


def test_gradients_are_straight_through(isa):
    for activation in cases.ACTIVATION_NAMES:
        for packed in (False, True):
            x, q_w, w_scale = problem(6, 33, 70)
            leaves = [t.requires_grad_() for t in (x.view(2, 3, 70), randn(33), randn(2, 3, 33, seed=9))]
            grad = randn(2, 3, 33, seed=8)
            y = ops.int8_linear(
                leaves[0], form(q_w, packed), w_scale, leaves[1], residual=leaves[2], activation=activation
            )
            got = torch.autograd.grad(y, leaves, grad)
            w = q_w.double() * w_scale.double()[:, None]
            q_x, s_x = quantize_rows_ref(x)
            z = (q_x.double() * s_x.double()[:, None]) @ w.T
            z = (z.view(2, 3, 33) + leaves[1].double() + leaves[2].double()).detach().requires_grad_()
            (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, grad.double())
            want = (dz @ w, dz.sum((0, 1)), dz)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_gradient_of_the_input_alone():
    """The dispatcher drops trailing arguments that are at their default, and autograd then knows fewer inputs."""
    for arguments in ({}, {"bias": randn(5)}, {"activation": "gelu"}, {"residual": randn(3, 5)}):
        x, q_w, w_scale = problem(3, 5, 7)
        ops.int8_linear(x.requires_grad_(), q_w, w_scale, **arguments).sum().backward()
        assert x.grad.shape == x.shape
        assert x.grad.isfinite().all()


def test_gradients_of_empty_problems():
    for M, N, K in cases.EMPTY_SHAPES:
        leaves = [randn(M, K).requires_grad_(), randn(N).requires_grad_(), randn(M, N).requires_grad_()]
        y = ops.int8_linear(leaves[0], randint(-9, 9, N, K), torch.ones(N), leaves[1], residual=leaves[2])
        assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [t.shape for t in leaves]


def test_gradient_stops_where_a_static_scale_clamps():
    x = torch.tensor([[1.0, 200.0, -200.0, 127.4]], requires_grad=True)
    ops.int8_linear(x, torch.eye(4, dtype=torch.int8), torch.ones(4), x_scale=1.0).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_gradients_keep_their_dtypes(dtype):
    x, q_w, w_scale = problem(3, 5, 7, dtype)
    leaves = [x.requires_grad_(), randn(5).requires_grad_(), randn(3, 5, dtype=dtype).requires_grad_()]
    y = ops.int8_linear(leaves[0], q_w, w_scale, leaves[1], residual=leaves[2], activation="silu")
    y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, dtype]


def test_no_graph_without_gradients():
    x, q_w, w_scale = problem(3, 5, 7)
    bias = randn(5).requires_grad_()
    with torch.no_grad():
        assert not ops.int8_linear(x, q_w, w_scale, bias).requires_grad
    assert ops.int8_linear(x, q_w, w_scale, bias).requires_grad
    assert not ops.int8_linear(x, q_w, w_scale).requires_grad


# ------------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_compile_in_full(fresh_compiler, requires_grad):
    _, q_w, w_scale = problem(5, 33, 70)
    weight = ops.pack_int8(q_w)
    bias = randn(33)

    def f(x):
        return ops.int8_linear(x * 2, weight, w_scale, bias, activation="silu") + 1

    cases.assert_compiles_in_full(f, 70, requires_grad)


def test_fake_tensors_of_cuda():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 70, dtype=torch.bfloat16, device="cuda")
        q_w, w_scale = torch.empty(33, 70, dtype=torch.int8, device="cuda"), torch.empty(33, device="cuda")
        residual = torch.empty(2, 3, 33, dtype=torch.bfloat16, device="cuda")
        y = ops.int8_linear(x, q_w, w_scale, w_scale, residual=residual)
        assert y.shape == (2, 3, 33)
        assert (y.device.type, y.dtype) == ("cuda", torch.bfloat16)


def test_meta():
    y = ops.int8_linear(*(t.to("meta") for t in problem(3, 5, 7, torch.float16)))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("meta", torch.float16, (3, 5))


def test_wants_packed():
    assert wants_packed(torch.device("cpu")) == (backend.native is not None)
    assert not wants_packed(torch.device("cuda"))
    assert not wants_packed(torch.device("meta"))


@pytest.mark.skipif(not conftest.MALLOC_POISONED, reason="this libc cannot fill new memory")
def test_memory_is_poisoned():
    torch.utils.deterministic.fill_uninitialized_memory = False
    for size in (8, 1000, 300_000):
        assert (torch.empty(size, dtype=torch.uint8) == conftest.POISON_BYTE).all()
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(5).isnan().all()
