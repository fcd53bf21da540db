"""int4 weights: quantization and its error, the two forms in memory, what is refused."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, randint, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops import ops
from pyops.nn import Int4Linear
from pyops.ops.int4_quantize import METHODS
from pyops.ops.int4_weight import (
    LEVELS,
    SCALE_DTYPES,
    group_count,
    pack_nibbles,
    packed_shapes,
    unpack_nibbles,
)

GROUPS = (32, 64, 128, 192, -1)
SHAPES = ((1, 1), (3, 2), (5, 31), (31, 64), (32, 65), (33, 70), (64, 128), (65, 129), (7, 400), (100, 33))
EMPTY = ((0, 7), (7, 0), (0, 0))


def weight_of(N, K, G, seed=0, zeros=True, scale_dtype=torch.bfloat16):
    """Any canonical weight: every nibble, zero points of 0 to 16, scales of any sign."""
    count = group_count(K, G)
    w_q = pack_nibbles(randint(0, 15, N, K, dtype=torch.uint8, seed=seed))
    scale = randn(N, count, dtype=scale_dtype, seed=seed)
    return w_q, scale, randint(0, 16, N, count, dtype=torch.uint8, seed=seed + 1) if zeros else None


def equal(a, b):
    return all(
        (s is None and t is None) or (torch.equal(s, t) and s.dtype == t.dtype) for s, t in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------- nibbles and panels


def test_every_byte_is_two_nibbles_and_back():
    w_q = torch.arange(256, dtype=torch.uint8).view(8, 32)
    q = unpack_nibbles(w_q, 64)
    assert q.flatten().tolist() == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert torch.equal(pack_nibbles(q), w_q)


def test_the_last_nibble_of_an_odd_row_is_zero():
    w_q = pack_nibbles(torch.full((2, 5), 15, dtype=torch.uint8))
    assert w_q.tolist() == [[255, 255, 15]] * 2
    assert unpack_nibbles(w_q, 5).tolist() == [[15] * 5] * 2


@pytest.mark.parametrize("position", range(4))
def test_every_byte_goes_through_the_packed_form(position):
    """Each of the 2⁸ bytes at each place of a row of a panel, which holds four bytes of a channel."""
    w_q = torch.zeros(256, 32, dtype=torch.uint8)
    w_q[:, position::4] = torch.arange(256, dtype=torch.uint8)[:, None]
    scale, zero = torch.ones(256, 1), torch.arange(256)[:, None].remainder(17).to(torch.uint8)
    packed = ops.pack_int4(w_q, scale, zero, 64, 64)
    assert equal(ops.unpack_int4(*packed, 256, 64, 64), (w_q, scale, zero))


@pytest.mark.parametrize(("N", "K", "G"), [(33, 70, 32), (32, 64, -1), (5, 200, 128)])
def test_the_packed_form_is_the_documented_one(N, K, G):
    weight = weight_of(N, K, G)
    q = unpack_nibbles(weight[0], K)
    packed, scale, zero = ops.pack_int4(*weight, K, G)
    assert ((packed.shape, scale.shape), zero.shape) == (packed_shapes(N, K, G), scale.shape)
    panels, rows, _ = packed.shape
    assert (panels, rows) == (-(-N // 32), 1 + -(-K // 64) * 8)
    expected = torch.zeros_like(packed)
    expected[:, 0] = packed[:, 0]  # steps: test_int4_steps.py
    for n in range(N):
        for k in range(K):
            nibble = int(q[n, k]) << (4 if k % 8 >= 4 else 0)
            expected[n // 32, 1 + k // 8, 4 * (n % 32) + k % 4] |= nibble
    assert torch.equal(packed, expected)
    for t, groups in ((scale, weight[1]), (zero, weight[2])):
        whole = t.transpose(1, 2).reshape(panels * 32, -1)
        assert torch.equal(whole[:N, : groups.shape[1]], groups)
        assert not whole[N:].any()
        assert not whole[:, groups.shape[1] :].any()


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 70),
    K=st.integers(0, 300),
    G=st.sampled_from(GROUPS),
    zeros=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    seed=st.integers(0, 1000),
)
def test_packing_is_exactly_invertible(N, K, G, zeros, scale_dtype, seed):
    weight = weight_of(N, K, G, seed, zeros, scale_dtype)
    packed = ops.pack_int4(*weight, K, G)
    assert all(t is None or t.is_contiguous() for t in packed)
    back = ops.unpack_int4(*packed, N, K, G)
    assert equal(back, weight)
    assert torch.equal(ops.dequantize_int4(*back, K, G), ops.dequantize_int4(*weight, K, G))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_reads_any_strides(layout):
    weight = [t.contiguous() for t in weight_of(33, 70, 32)]
    strided = [LAYOUTS[layout](t) for t in weight]
    assert equal(ops.pack_int4(*strided, 70, 32), ops.pack_int4(*weight, 70, 32))


def test_pieces_are_the_whole(monkeypatch):
    w = randn(200, 300)
    whole = ops.quantize_int4(w, 64)
    packed = ops.pack_int4(*whole, 300, 64)
    monkeypatch.setattr("pyops.memory.CHUNK", 5000)
    assert equal(ops.quantize_int4(w, 64), whole)
    assert equal(ops.pack_int4(*whole, 300, 64), packed)
    assert equal(ops.unpack_int4(*packed, 200, 300, 64), whole)


# ------------------------------------------------------------------------------------------- quantization


def error_bound(scale_dtype):
    """In steps: half of one, and what rounding the scale, of 15 steps, moves the end of the range by."""
    return 0.5 + LEVELS * {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}[scale_dtype]


@settings(max_examples=80, deadline=None)
@given(
    N=st.integers(1, 40),
    K=st.integers(1, 260),
    G=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    offset=st.sampled_from((0.0, 3.0, -3.0)),
    seed=st.integers(0, 1000),
)
def test_rtn_is_within_half_a_step(N, K, G, symmetric, dtype, scale_dtype, offset, seed):
    w = (randn(N, K, seed=seed) + offset).to(dtype)
    w_q, scale, zero = ops.quantize_int4(w, G, symmetric=symmetric, scale_dtype=scale_dtype, steps=False)
    count = group_count(K, G)
    assert (w_q.dtype, tuple(w_q.shape)) == (torch.uint8, (N, (K + 1) // 2))
    assert (scale.dtype, tuple(scale.shape)) == (scale_dtype, (N, count))
    assert (zero is None) == symmetric
    if zero is not None:
        assert (zero.dtype, tuple(zero.shape), int(zero.max()) <= LEVELS) == (torch.uint8, (N, count), True)
    back = ops.dequantize_int4(w_q, scale, zero, K, G)
    step = scale.float().repeat_interleave(G if G > 0 else K, dim=1)[:, :K]
    assert bool(((back - w.float()).abs() <= error_bound(scale_dtype) * step).all())


def squared_errors(w, weight, K, G):
    """Of each group, in fp64."""
    error = (ops.dequantize_int4(*weight, K, G).double() - w.double()).square()
    size = G if G > 0 else K
    padded = torch.nn.functional.pad(error, (0, group_count(K, G) * size - K))
    return padded.view(w.shape[0], -1, size).sum(2)


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 260),
    G=st.sampled_from(GROUPS),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    tail=st.sampled_from((1, 5)),
    seed=st.integers(0, 1000),
)
def test_mse_is_never_worse(K, G, symmetric, scale_dtype, tail, seed):
    w = randn(9, K, seed=seed) ** tail  # odd powers: long tails, where it pays to clip
    how = {"symmetric": symmetric, "scale_dtype": scale_dtype, "steps": False}
    errors = {method: squared_errors(w, ops.quantize_int4(w, G, method=method, **how), K, G) for method in METHODS}
    assert bool((errors["mse"] <= errors["rtn"] * (1 + 1e-5)).all())


@pytest.mark.parametrize("exponent", [-90, 90])
def test_mse_is_the_same_for_any_magnitude(exponent):
    w = randn(40, 300) ** 3
    (q, scale, zero), far = (
        ops.quantize_int4(t, 128, method="mse", scale_dtype=torch.float32) for t in (w, w * 2.0**exponent)
    )
    assert equal(far, (q, scale * 2.0**exponent, zero))


def test_mse_is_better_for_long_groups():
    w = randn(32, 4096)
    errors = [squared_errors(w, ops.quantize_int4(w, -1, method=m), 4096, -1).sum() for m in ("mse", "rtn")]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_groups_are_quantized_alone(method, symmetric):
    w = randn(5, 150)
    w_q, scale, zero = ops.quantize_int4(w, 64, symmetric=symmetric, method=method, steps=False)
    q = unpack_nibbles(w_q, 150)
    for g, (a, b) in enumerate(((0, 64), (64, 128), (128, 150))):
        one = ops.quantize_int4(w[:, a:b], -1, symmetric=symmetric, method=method, steps=False)
        assert torch.equal(unpack_nibbles(one[0], b - a), q[:, a:b])
        assert torch.equal(one[1][:, 0], scale[:, g])
        assert zero is None or torch.equal(one[2][:, 0], zero[:, g])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5, 1e-30, 65504.0])
def test_a_constant_weight_is_exact_or_nearly(value, symmetric):
    w = torch.full((3, 64), value)
    weight = ops.quantize_int4(w, 32, symmetric=symmetric, scale_dtype=torch.float32)
    assert (ops.dequantize_int4(*weight, 64, 32) - w).abs().max() <= 0.07 * abs(value) * symmetric + 1e-6 * abs(value)


def test_zeros_stay_zero():
    """Those of a pruned weight: zero is a level of every group."""
    w = randn(16, 128) + 2
    w[:, ::3] = 0
    for symmetric in (False, True):
        weight = ops.quantize_int4(w, 32, symmetric=symmetric)
        assert not ops.dequantize_int4(*weight, 128, 32)[:, ::3].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantization_reads_any_strides(layout):
    w = randn(9, 70)
    assert equal(ops.quantize_int4(LAYOUTS[layout](w), 32), ops.quantize_int4(w, 32))


@pytest.mark.parametrize("G", GROUPS)
@pytest.mark.parametrize(("N", "K"), EMPTY)
def test_empty(N, K, G):
    for symmetric in (False, True):
        weight = ops.quantize_int4(torch.empty(N, K), G, symmetric=symmetric)
        assert tuple(weight[0].shape) == (N, (K + 1) // 2)
        assert tuple(weight[1].shape) == (N, group_count(K, G))
        assert equal(ops.unpack_int4(*ops.pack_int4(*weight, K, G), N, K, G), weight)
        assert tuple(ops.dequantize_int4(*weight, K, G).shape) == (N, K)


def test_a_parameter_and_a_meta_tensor():
    w = randn(5, 64).requires_grad_()
    assert not any(t.requires_grad for t in ops.quantize_int4(w))
    on_meta = ops.quantize_int4(torch.empty(5, 64, device="meta"))
    assert all(t.is_meta for t in on_meta)
    packed = ops.pack_int4(*on_meta, 64, 128)
    assert [tuple(t.shape) for t in packed] == [tuple(t.shape) for t in ops.pack_int4(*ops.quantize_int4(w), 64, 128)]


@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_dequantization_is_exact_and_rounded_once(dtype, scale_dtype):
    w_q, scale, zero = weight_of(7, 71, 32, scale_dtype=scale_dtype)
    q = unpack_nibbles(w_q, 71).double()
    s, z = (t.double().repeat_interleave(32, dim=1)[:, :71] for t in (scale, zero))
    y = ops.dequantize_int4(w_q, scale, zero, 71, 32, dtype)
    assert y.dtype is dtype
    assert torch.equal(y, (s * (q - z)).float().to(dtype))  # a float: 5 bits times 24 round once
    symmetric = ops.dequantize_int4(w_q, scale, None, 71, 32, dtype)
    assert torch.equal(symmetric, (s * (q - 8)).float().to(dtype))


# ------------------------------------------------------------------------------------------- what is refused


W = torch.ones(3, 64)
BAD_QUANTIZE = {
    "list": ({"w": [[1.0]]}, TypeError, "w must be a floating-point tensor, got list"),
    "int": ({"w": W.int()}, TypeError, r"w must be a floating-point tensor, got torch\.int32"),
    "vector": ({"w": W[0]}, ValueError, r"w must be \[N, K\], got shape \(64,\)"),
    "group": ({"group_size": 96}, ValueError, "group_size is 96; allowed: 32, a multiple of 64, or -1 for all of K"),
    "no group": ({"group_size": 0}, ValueError, "group_size is 0"),
    "negative group": ({"group_size": -64}, ValueError, "group_size is -64"),
    "float group": ({"group_size": 64.0}, TypeError, "group_size must be an int, got float"),
    "bool group": ({"group_size": True}, TypeError, "group_size must be an int, got bool"),
    "method": ({"method": "awq"}, ValueError, "method='awq' is not one of rtn, mse"),
    "scale dtype": (
        {"scale_dtype": torch.float64},
        TypeError,
        r"scale_dtype is torch\.float64; allowed: torch\.float32",
    ),
    "nan": ({"w": W * torch.nan}, ValueError, "w holds NaN or Inf and cannot be quantized"),
    "inf": ({"w": torch.cat([W, -torch.inf * W])}, ValueError, "w holds NaN or Inf"),
    "fp16 scale": ({"w": W * 1e7, "scale_dtype": torch.float16}, ValueError, r"scale overflows torch\.float16"),
    "fp64": ({"w": W.double() * 1e300}, ValueError, "scale overflows"),
}


@pytest.mark.parametrize("name", BAD_QUANTIZE)
def test_bad_quantize(name):
    changes, error, message = BAD_QUANTIZE[name]
    with pytest.raises(error, match=message):
        ops.quantize_int4(**{"w": W, **changes})


BAD_PACK = {
    "int8": ({0: lambda t: t.to(torch.int8)}, TypeError, r"w_q has dtype torch\.int8; allowed: torch\.uint8"),
    "list": ({0: lambda t: t.tolist()}, TypeError, "w_q must be a tensor, got list"),
    "scale dtype": ({1: torch.Tensor.double}, TypeError, r"w_scale has dtype torch\.float64"),
    "scale missing": ({1: lambda t: None}, TypeError, "w_scale must be a tensor, got NoneType"),
    "zero dtype": ({2: torch.Tensor.int}, TypeError, r"w_zero has dtype torch\.int32"),
    "device": ({2: lambda t: t.to("meta")}, ValueError, "w_zero is on meta, w_q on cpu"),
    "shape": ({0: lambda t: t[:, 1:]}, ValueError, r"w_q is \(.*K=70 needs|packed w_q is"),
    "scale shape": ({1: lambda t: t[:, 1:]}, ValueError, "w_scale is .* need"),
    "zero shape": ({2: lambda t: t[1:]}, ValueError, "w_zero is .* need"),
}


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("name", BAD_PACK)
def test_bad_pack_and_unpack(name, unpack):
    changes, error, message = BAD_PACK[name]
    weight = list(weight_of(65, 70, 32))
    if unpack:
        weight = list(ops.pack_int4(*weight, 70, 32))
    for i, change in changes.items():
        weight[i] = change(weight[i])
    with pytest.raises(error, match=message):
        ops.unpack_int4(*weight, 65, 70, 32) if unpack else ops.pack_int4(*weight, 70, 32)


@pytest.mark.parametrize("kind", [torch.as_tensor, lambda t: torch.nn.Parameter(t, False)], ids=["tensor", "parameter"])
def test_zero_points_that_no_weight_has(kind):
    w_q, scale, zero = weight_of(65, 70, 32)
    zero = kind(zero.clone().fill_(17))
    message = "w_zero holds 17; zero points are 0 to 16"
    with pytest.raises(ValueError, match=message):
        ops.pack_int4(w_q, scale, zero, 70, 32)
    with pytest.raises(ValueError, match=message):
        ops.int4_linear(randn(2, 70), w_q, scale, zero, group_size=32)
    with pytest.raises(ValueError, match=r"weight_zero holds 17"):
        Int4Linear.from_quantized(w_q, scale, zero, in_features=70, group_size=32)


@pytest.mark.parametrize(("N", "K", "G"), [(97, 70, 32), (65, 129, 32), (65, 70, 64)])
def test_unpacking_as_something_else(N, K, G):
    packed = ops.pack_int4(*weight_of(65, 70, 32), 70, 32)
    with pytest.raises(ValueError, match=rf"packed w_\w+ is .*; N={N}, K={K} and group_size={G} need"):
        ops.unpack_int4(*packed, N, K, G)
