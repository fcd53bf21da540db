"""The op `pyops::int4_linear`: every kernel against exact integers, a float64 oracle and the reference."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from cases import randint, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyops import backend, ops
from pyops.ops.epilogue import ACTIVATIONS
from pyops.ops.int4_linear import int4_linear_ref, wants_packed
from pyops.ops.int4_weight import MIDDLE, SCALE_DTYPES, dequantize_int4, group_count, pack_nibbles, unpack_nibbles
from pyops.ops.int8_linear import quantize_rows_ref

pytestmark = pytest.mark.usefixtures("poison")
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["canonical", "packed"])
COMPUTE = pytest.mark.parametrize("compute", ["int8", "float"])
GROUPS = (32, 64, 128, 1024, -1)
EPS = torch.finfo(torch.float32).eps


def weight(N, K, G, zero=True, scale_dtype=torch.float32, seed=0):
    """Random codes, zero points and scales, as no quantizer need have made them: zero points go to 16."""
    count = group_count(K, G)
    q = pack_nibbles(randint(0, 15, N, K, seed=seed))
    scale = (randn(N, count, seed=seed + 1).abs() * K**-0.5 / 4 if K else randn(N, count)).to(scale_dtype)
    return q, scale, randint(0, 16, N, count, seed=seed + 2).to(torch.uint8) if zero else None


def form(w, K, G, packed):
    """Arguments of `ops.int4_linear` for a weight in either form."""
    return ops.pack_int4(*w, K, G) if packed else w


def call(x, w, G, packed=True, **options):
    N = w[0].shape[0]
    return ops.int4_linear(x, *form(w, x.shape[-1], G, packed), group_size=G, out_features=N, **options)


def oracle(x, w, G, bias=None, residual=None, activation="none", order=None, compute="int8"):
    """The equation in float64, on the same quantized rows with int8, and the magnitude of the terms that it adds."""
    N, K = w[0].shape[0], x.shape[-1]
    rows = x.reshape(math.prod(x.shape[:-1]), K)
    rows = rows if order is None else rows[:, order.long()]
    if compute == "int8":
        q_x, s_x = quantize_rows_ref(rows)
        rows = q_x.double() * s_x.double()[:, None]
    count = group_count(K, G)
    z = torch.full((N, count), MIDDLE) if w[2] is None else w[2]
    length = G if G > 0 else max(K, 1)
    spread = [t.double().repeat_interleave(length, dim=1)[:, :K] for t in (w[1], z)]
    dense = (unpack_nibbles(w[0], K).double() - spread[1]) * spread[0]
    acc = rows.double() @ dense.T
    terms = [acc] + ([] if bias is None else [bias.double().expand_as(acc)])
    terms += [] if residual is None else [residual.double().reshape(acc.shape)]
    magnitude = rows.double().abs() @ dense.abs().T + sum(t.abs() for t in terms[1:])
    y = ACTIVATIONS[activation](sum(terms))
    return y.reshape(*x.shape[:-1], N), magnitude.reshape(*x.shape[:-1], N)


def assert_close_to_oracle(y, x, w, G, bias=None, residual=None, activation="none", order=None, compute="int8"):
    """At most twice the error of the reference, and four eps of the magnitude of the terms."""
    exact, magnitude = oracle(x, w, G, bias, residual, activation, order, compute)
    reference = int4_linear_ref(x, *w, bias, residual, activation, G, w[0].shape[0], order, compute)
    assert y.shape == reference.shape
    assert y.dtype == x.dtype
    if not y.numel():
        return
    allowed = 2 * (reference.double() - exact).abs().max() + 4 * EPS * magnitude.max()
    error = (y.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# ------------------------------------------------------------------------------------------- exact integers


@PACKED
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("G", GROUPS)
def test_integers_are_exact(isa, G, zero, packed):
    """Scales that are powers of two: the result is a multiple of the smallest, and fp32 holds it."""
    for M, N, K in cases.SHAPES:
        x = randint(-127, 127, M, K)
        x[:, 0] = 127  # so that the dynamic scale is 1
        q, scale, z = weight(N, K, G, zero)
        scale = 2.0 ** randint(-2, 2, *scale.shape)
        exact, _ = oracle(x.float(), (q, scale, z), G)
        y = call(x.float(), (q, scale, z), G, packed, compute="int8")
        assert torch.equal(y, exact.float()), (M, N, K)


@PACKED
@pytest.mark.parametrize("shape", cases.LONG_SHAPES, ids=str)
def test_extreme_integers_do_not_overflow(isa, shape, packed):
    M, N, K = shape
    for G in (32, 128, -1):
        count = group_count(K, G)
        for a, q, z in ((127, 15, 0), (-127, 15, 0), (127, 0, 16), (-127, 0, 16)):
            x = torch.full((M, K), float(a))
            w = pack_nibbles(torch.full((N, K), q)), torch.ones(N, count), torch.full((N, count), z).to(torch.uint8)
            assert torch.equal(call(x, w, G, packed, compute="int8"), torch.full((M, N), float(K * a * (q - z))))


def test_every_code_in_every_place(isa):
    """An identity for x shows the weight itself: each of the 16 codes at each k of two steps, and each zero point."""
    K, N = 128, 48
    q = (torch.arange(N)[:, None] + torch.arange(K)[None, :]) % 16
    zero = (torch.arange(N)[:, None] * 3 + torch.arange(K // 32)) % 17
    w = pack_nibbles(q), torch.ones(N, K // 32), zero.to(torch.uint8)
    exact = (q - zero.repeat_interleave(32, dim=1)).T.float()
    for compute in ("int8", "float"):
        assert torch.equal(call(torch.eye(K) * 127, w, 32, compute=compute) / 127, exact)
        assert torch.equal(call(torch.eye(K)[:3] * 127, w, 32, compute=compute) / 127, exact[:3])


# ------------------------------------------------------------------------------------------- float error


@PACKED
@COMPUTE
@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_error_against_float64(isa, dtype, activation, compute, packed):
    for M, N, K, G in ((1, 33, 31, 32), (5, 64, 200, 128), (19, 97, 65, -1)):
        w = weight(N, K, G, scale_dtype=dtype)
        x, bias, residual = randn(M, K, dtype=dtype), randn(N, seed=5), randn(M, N, dtype=dtype, seed=6, scale=3.0)
        y = call(x, w, G, packed, bias=bias, residual=residual, activation=activation, compute=compute)
        assert_close_to_oracle(y, x, w, G, bias, residual, activation, compute=compute)


@COMPUTE
@pytest.mark.parametrize("G", GROUPS)
def test_error_of_every_shape(isa, G, compute):
    for i, (M, N, K) in enumerate((*cases.SHAPES, (3, 5, 4001), (18, 32, 6000))):
        w = weight(N, K, G, zero=i % 2 == 0, scale_dtype=SCALE_DTYPES[i % 3])
        x = randn(M, K)
        assert_close_to_oracle(call(x, w, G, compute=compute), x, w, G, compute=compute)


@COMPUTE
def test_canonical_and_packed_weight_give_the_same_bits(isa, compute):
    for M, N, K in cases.SHAPES:
        for G in (32, 128, -1):
            w, x = weight(N, K, G), randn(M, K, dtype=torch.bfloat16)
            assert torch.equal(call(x, w, G, True, compute=compute), call(x, w, G, False, compute=compute)), (M, N, K)


@pytest.mark.parametrize(("M", "N", "K"), cases.BLOCKED)
def test_blocks_waves_and_streaming_stores(isa, M, N, K):
    """Shapes that are cut: several blocks and waves of rows, K in ranges, results stored past the caches."""
    if isa == "generic" and M * N * K > 1e9:
        pytest.skip("nothing of its own there, and slow")
    x, bias = randint(-127, 127, M, K).float(), randn(N, seed=1)
    x[:, 0] = 127
    for G in (32, 128, 1024):
        q, scale, z = weight(N, K, G)
        w = q, torch.full_like(scale, 2.0**-12), z  # powers of two: the only rounding is that of the epilogue
        exact = (x.double() @ dequantize_int4(*w, K, G).double().T) + bias
        y = call(x, w, G, bias=bias, compute="int8")
        assert ((y - exact).abs() <= 2.0**-22 * (exact.abs() + 2 * bias.abs())).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem(isa, data):
    M, N, K = (data.draw(st.integers(0, top), label=name) for name, top in (("M", 40), ("N", 70), ("K", 300)))
    G = data.draw(st.sampled_from((32, 64, 128, 192, 256, -1)))
    dtype, bias_dtype = data.draw(st.sampled_from(cases.FLOATS)), data.draw(st.sampled_from(cases.FLOATS))
    activation, compute = (
        data.draw(st.sampled_from(cases.ACTIVATION_NAMES)),
        data.draw(st.sampled_from(["int8", "float"])),
    )
    seed = data.draw(st.integers(0, 999))
    w = weight(N, K, G, data.draw(st.booleans(), label="zero"), data.draw(st.sampled_from(SCALE_DTYPES)), seed)
    x = randn(M, K, dtype=dtype, seed=seed, scale=10.0 ** data.draw(st.integers(-3, 2)))
    if M and K:
        x = data.draw(st.sampled_from(list(cases.LAYOUTS.values()) + list(cases.EXPANDED.values())))(x)
    bias = randn(N, dtype=bias_dtype, seed=seed + 1) if data.draw(st.booleans()) else None
    residual = randn(M, N, dtype=dtype, seed=seed + 2) if data.draw(st.booleans()) else None
    order = None
    if data.draw(st.booleans(), label="order"):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).int()
    rest = {"bias": bias, "residual": residual, "activation": activation, "order": order, "compute": compute}
    y = call(x, w, G, data.draw(st.booleans(), label="packed"), **rest)
    assert_close_to_oracle(y, x, w, G, **rest)


# ------------------------------------------------------------------------------------------- shapes and strides


@PACKED
@COMPUTE
@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=str)
def test_empty(isa, shape, compute, packed):
    M, N, K = shape
    bias = randn(N)
    for G in (32, -1):
        y = call(randn(M, K), weight(N, K, G), G, packed, bias=bias, activation="relu", compute=compute)
        assert torch.equal(y, bias.relu().expand(M, N))


@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
def test_leading_dimensions(leading):
    w = weight(19, 37, 32)
    x, residual = randn(*leading, 37), randn(*leading, 19)
    y = call(x, w, 32, residual=residual)
    assert torch.equal(y, call(x.reshape(-1, 37), w, 32, residual=residual.reshape(-1, 19)).reshape(*leading, 19))


@COMPUTE
@pytest.mark.parametrize("layout", [*cases.LAYOUTS, *cases.EXPANDED])
def test_strides(isa, layout, compute):
    change = {**cases.LAYOUTS, **cases.EXPANDED}[layout]
    w = weight(33, 70, 32)
    x, residual = change(randn(18, 70)), change(randn(18, 33))
    y = call(x, w, 32, residual=residual, compute=compute)
    assert torch.equal(y, call(x.contiguous(), w, 32, residual=residual.contiguous(), compute=compute))
    strided = tuple(change(t) for t in w)
    assert torch.equal(
        call(x, strided, 32, packed=False, compute=compute),
        call(x, tuple(t.contiguous() for t in strided), 32, compute=compute),
    )


@COMPUTE
def test_order(isa, compute):
    """Column k of the weight belongs to x[..., order[k]]."""
    for M, N, K in ((1, 33, 70), (4, 7, 129), (40, 65, 257)):
        w, x = weight(N, K, 32), randn(M, K)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(1)).int()
        y = call(x, w, 32, order=order, compute=compute)
        assert torch.equal(y, call(x[:, order.long()], w, 32, compute=compute))
        same = call(x, w, 32, order=torch.arange(K, dtype=torch.int32), compute=compute)
        assert torch.equal(same, call(x, w, 32, compute=compute))


# ------------------------------------------------------------------------------------------- special rows


@COMPUTE
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("M", [3, 40])
def test_nan_and_inf_stay_in_their_row(isa, dtype, M, compute):
    w, x = weight(40, 67, 32), randn(M, 67, dtype=dtype)
    clean = call(x, w, 32, compute=compute)
    for value in (torch.nan, torch.inf, -torch.inf):
        for k in (0, 63, 66):
            bad = x.clone()
            bad[1, k] = value
            y = call(bad, w, 32, compute=compute)
            assert not y[1].isfinite().any() if compute == "int8" else not y[1].isfinite().all()
            assert torch.equal(y[[0, *range(2, M)]], clean[[0, *range(2, M)]])


def test_zero_and_subnormal_rows_give_the_bias(isa):
    x = randn(6, 70)
    x[1], x[2], x[3], x[4] = 0.0, 1e-45, 1e-39, 2.0**-120
    bias = randn(33)
    y = call(x, weight(33, 70, 32), 32, bias=bias, compute="int8")
    assert torch.equal(y[1:5], bias.expand(4, 33))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_power_of_two_passes_through(isa, dtype):
    """compute="float": whatever the magnitude of a row, its result has the same bits."""
    for M, N, K, G in ((2, 33, 70, 32), (3, 40, 300, 64), (40, 65, 1300, 192)):
        w, x = weight(N, K, G), randn(M, K, dtype=dtype)
        y = call(x, w, G, compute="float")
        for e in (-100, 100):
            assert torch.equal(call(x * 2.0**e, w, G, compute="float"), y * 2.0**e), (M, N, K, e)


@cases.needs_native  # the reference multiplies in fp32 as it is
@pytest.mark.parametrize("M", [1, 3, 40])
def test_sums_larger_than_fp32_cancel(isa, M):
    K = 256
    w = pack_nibbles(torch.full((32, K), 15)), torch.full((32, 2), 1.0), torch.zeros(32, 2, dtype=torch.uint8)
    x = torch.full((M, K), 2.0**126)
    x[:, K // 2 :] *= -1
    assert torch.equal(call(x, w, 128, compute="float"), torch.zeros(M, 32))


def test_groups_of_scale_zero(isa):
    q, scale, zero = weight(33, 200, 64)
    scale[:, 1] = 0.0
    for compute in ("int8", "float"):
        x = randn(5, 200)
        y = call(x, (q, scale, zero), 64, compute=compute)
        x[:, 64:128] = x[:, 64:128].flip(1)  # keeps the row's maximum
        assert torch.equal(y, call(x, (q, scale, zero), 64, compute=compute))


# ------------------------------------------------------------------------------------------- determinism


@COMPUTE
def test_threads_and_repeats_give_the_same_bits(isa, threads, compute):
    if isa == "ref" and compute == "float":
        pytest.skip("torch's matmul of floats differs with the number of threads")
    for M, N, K in ((1, 1030, 515), (6, 70, 1300), (130, 260, 300), (700, 64, 2048)):
        w, x = weight(N, K, 128), randn(M, K)
        packed = ops.pack_int4(*w, K, 128)
        results = []
        for n in (1, 1, 2, 2, 3):
            threads(n)
            results.append(
                ops.int4_linear(x, *packed, activation="gelu", group_size=128, out_features=N, compute=compute)
            )
        assert all(torch.equal(r, results[0]) for r in results), (M, N, K)


@cases.needs_native  # torch's activations differ with where a value lies
@PACKED
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("G", [32, 64, 128, -1])
def test_a_row_of_int8_has_the_same_bits_alone(isa, G, zero, packed):
    """Every kernel and every height of its tiles; K that no group divides, in one range and in several."""
    for (N, K), dtype in zip(((45, 333), (33, 1301)), (torch.bfloat16, torch.float32), strict=True):
        w = form(weight(N, K, G, zero, dtype), K, G, packed)
        options = {"group_size": G, "out_features": N, "activation": "silu", "compute": "int8"}
        x, bias = randn(700, K, dtype=dtype), randn(N)
        cases.assert_rows_are_those_alone(lambda x, w=w, b=bias, o=options: ops.int4_linear(x, *w, b, **o), x)


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("G", [32, 64, 128, -1])
def test_a_row_of_float_differs_by_the_order_of_its_sums(isa, G, zero):
    """compute="float": few rows and many are summed in other orders, whose results are this close."""
    N, K = 33, 1301
    x, w = randn(700, K), weight(N, K, G, zero)
    _, magnitude = oracle(x, w, G, compute="float")
    packed = form(w, K, G, True)
    options = {"group_size": G, "out_features": N, "compute": "float"}
    alone = torch.cat([ops.int4_linear(row, *packed, **options) for row in x.split(1)])
    for M in cases.ROW_COUNTS:
        y = ops.int4_linear(x[:M], *packed, **options)
        assert ((y - alone[:M]).abs() <= 8 * EPS * magnitude[:M]).all(), M


@cases.needs_native
@COMPUTE
def test_every_isa_gives_the_same_result(compute):
    """The integers are the same; without FMA a term of the fp32 sum over groups is rounded twice."""
    w, x = weight(100, 333, 64), randn(37, 333)
    results = cases.of_every_isa(lambda: call(x, w, 64, compute=compute, activation="gelu"))
    generic = results.pop("generic")
    for result in results.values():
        torch.testing.assert_close(result, generic, rtol=2e-6, atol=2e-6)
    if compute == "int8":
        first, *others = results.values() or [generic]
        assert all(torch.equal(other, first) for other in others)


# ------------------------------------------------------------------------------------------- gradients


@COMPUTE
@PACKED
def test_gradients_are_straight_through(isa, compute, packed):
    for i, activation in enumerate(cases.ACTIVATION_NAMES):
        G = (32, 64, -1)[i % 3]
        w = weight(33, 70, G)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).int() if i % 2 else None
        leaves = [t.requires_grad_() for t in (randn(2, 3, 70), randn(33), randn(2, 3, 33, seed=9))]
        grad = randn(2, 3, 33, seed=8)
        options = {"bias": leaves[1], "residual": leaves[2], "activation": activation, "order": order}
        y = call(leaves[0], w, G, packed, compute=compute, **options)
        got = torch.autograd.grad(y, leaves, grad)
        dense = dequantize_int4(*w, 70, G, torch.float64)
        if order is not None:
            dense = torch.empty_like(dense).index_copy_(1, order.long(), dense)
        rows = leaves[0].detach().reshape(6, 70)
        if compute == "int8":
            q_x, s_x = quantize_rows_ref(rows)
            rows = q_x.double() * s_x.double()[:, None]
        z = (rows.double() @ dense.T).view(2, 3, 33) + leaves[1].double() + leaves[2].double()
        z = z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, grad.double())
        for a, b in zip(got, (dz @ dense, dz.sum((0, 1)), dz), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=5e-5, atol=5e-5)


def test_gradients_of_empty_problems():
    for M, N, K in cases.EMPTY_SHAPES:
        leaves = [randn(M, K).requires_grad_(), randn(N).requires_grad_(), randn(M, N).requires_grad_()]
        y = call(leaves[0], weight(N, K, 32), 32, bias=leaves[1], residual=leaves[2])
        assert [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [t.shape for t in leaves]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_gradients_keep_their_dtypes(dtype):
    leaves = [randn(3, 7, dtype=dtype), randn(5), randn(3, 5, dtype=dtype)]
    x, bias, residual = (t.requires_grad_() for t in leaves)
    call(x, weight(5, 7, 32), 32, bias=bias, residual=residual, activation="silu").sum().backward()
    assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, dtype]


# ------------------------------------------------------------------------------------------- PyTorch


@COMPUTE
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_compile_in_full(fresh_compiler, requires_grad, compute):
    w = ops.pack_int4(*weight(33, 70, 32), 70, 32)

    def f(x):
        return ops.int4_linear(x * 2, *w, activation="silu", group_size=32, out_features=33, compute=compute) + 1

    cases.assert_compiles_in_full(f, 70, requires_grad)


def test_fake_tensors_of_cuda():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 70, dtype=torch.bfloat16, device="cuda")
        q = torch.empty(33, 35, dtype=torch.uint8, device="cuda")
        scale = torch.empty(33, 3, dtype=torch.bfloat16, device="cuda")
        y = ops.int4_linear(x, q, scale, group_size=32)
        assert (tuple(y.shape), y.device.type, y.dtype) == ((2, 3, 33), "cuda", torch.bfloat16)


def test_auto_is_int8_on_the_cpu():
    w, x = weight(33, 70, 32), randn(5, 70)
    assert torch.equal(call(x, w, 32), call(x, w, 32, compute="int8"))
    assert not torch.equal(call(x, w, 32), call(x, w, 32, compute="float"))
    assert wants_packed(torch.device("cpu")) == (backend.native is not None)
    assert not wants_packed(torch.device("cuda"))
