"""int4 weights whose scales are whole multiples of a step of their channel: found, chosen, multiplied as integers."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import randint, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_int4_linear import GROUPS, assert_close_to_oracle, call, oracle

from pyops import ops
from pyops.ops.int4_quantize import MOST_STEP_LOSS
from pyops.ops.int4_weight import (
    LEAST_STEP,
    MOST_STEP,
    MOST_STEPPED_K,
    SCALE_DTYPES,
    find_steps,
    group_count,
    pack_nibbles,
)

ZERO = pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])


def stepped(N, K, G, zero=True, seed=1, scale_dtype=torch.bfloat16, most=15):
    """A weight with steps of four bits: (q, scale, zero point or None)."""
    count = group_count(K, G)
    z = randint(3, 12, N, count, seed=seed) if zero else torch.full((N, count), 8)
    limit = (127 // torch.maximum(15 - z, z)).clamp(max=most)
    multiples = (1 + randint(0, 10_000, N, count, seed=seed + 1) % limit.clamp(min=1)).float()
    step = torch.ldexp(randint(8, 15, N, 1, seed=seed + 2).float(), torch.full((N, 1), -14))
    w_q = pack_nibbles(randint(0, 15, N, K, seed=seed + 3))
    return w_q, (multiples * step).to(scale_dtype), z.to(torch.uint8) if zero else None


def free(N, K, G, zero=True, seed=1):
    """A weight without: its scales have eight bits."""
    w_q, scale, z = stepped(N, K, G, zero, seed)
    return w_q, torch.rand(scale.shape, generator=torch.Generator().manual_seed(seed)).add(0.5).bfloat16(), z


def headers(packed):
    """The steps of a packed weight, [panels, 32]."""
    return packed[0][:, 0].contiguous().view(torch.float32)


# ------------------------------------------------------------------------------------------- which weights have them


@ZERO
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
def test_steps_are_found(scale_dtype, zero):
    _, scale, z = stepped(70, 2048, 64, zero, scale_dtype=scale_dtype)
    step = find_steps(scale, z, 2048).double()
    assert (step > 0).all()
    multiples = scale.double() / step[:, None]
    assert torch.equal(multiples, multiples.round())
    reach = torch.full_like(multiples, 8) if z is None else torch.maximum(15 - z.double(), z.double())
    assert (multiples * reach <= 127).all()
    assert (multiples.amax(1) < 2 * multiples.amin(1)).sum() < 70  # not all of them are trivial


def test_the_largest_step_is_found():
    scale = torch.tensor([[6.0, 9.0, 3.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert find_steps(scale, None, 256).tolist() == [3.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        ([1.0, 16.0], None),  # 16 · 8 > 127
        ([1.0, 8.0], 16),  # 8 · 16
        ([1.0, 9.0], 0),  # 9 · 15
        ([1.0, 1.0 + 2**-20], None),
        ([1.0, -1.0], None),
        ([1.0, float("inf")], None),
        ([1.0, float("nan")], None),
    ],
    ids=str,
)
def test_scales_without_a_step(scale, zero):
    z = None if zero is None else torch.full((1, 2), zero).to(torch.uint8)
    assert find_steps(torch.tensor([scale]), z, 64).item() == 0


@pytest.mark.parametrize(("step", "found"), [(LEAST_STEP, 1), (LEAST_STEP / 2, 0), (MOST_STEP, 1), (2 * MOST_STEP, 0)])
def test_steps_have_an_inverse(isa, step, found):
    """Beyond, scales are free; on the bounds multiples are exact."""
    scale = (randint(1, 15, 40, 5) * step).float()
    scale[:, 0], scale[:, 1] = step, 15 * step  # of which there is no larger step, but smaller ones
    w = pack_nibbles(randint(0, 15, 40, 640)), scale, None
    assert (find_steps(scale, None, 640) == step * found).all()
    for M in (1, 6, 40):
        bits = [call(randn(M, 640), w, 128, packed, compute="int8") for packed in (False, True)]
        assert torch.equal(*bits)
        assert_close_to_oracle(bits[0], randn(M, 640), w, 128)


def test_where_the_sum_could_overflow_there_are_no_steps():
    one = torch.ones(1, 1)
    assert find_steps(one, None, MOST_STEPPED_K).item() == 1
    assert find_steps(one, None, MOST_STEPPED_K + 64).item() == 0


def test_a_packed_panel_has_its_steps_in_row_0_or_zeros():
    with_steps, without = stepped(40, 128, 32), free(40, 128, 32)
    w = [torch.cat([a[:32], b[:8]]) for a, b in zip(with_steps, without, strict=True)]
    panels = headers(ops.pack_int4(*w, 128, 32))
    assert torch.equal(panels[0], find_steps(w[1], w[2], 128)[:32])
    assert not panels[1].any()
    last = headers(ops.pack_int4(*stepped(40, 128, 32), 128, 32))[1]
    assert torch.equal(last[8:], torch.ones(24))  # the panel's padding


# ------------------------------------------------------------------------------------------- when they are chosen


def squared_errors(w, quantized, G):
    """Of each panel."""
    error = (ops.dequantize_int4(*quantized, w.shape[1], G) - w).square().sum(1)
    return torch.nn.functional.pad(error, (0, -len(error) % 32)).view(-1, 32).sum(1)


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("G", GROUPS)
def test_they_cost_little_or_are_not_taken(G, symmetric, method):
    """Normal weights and, in the last panels, weights with outliers."""
    w = randn(136, 512)
    w[64:] = w[64:].pow(5)
    how = {"symmetric": symmetric, "method": method}
    chosen = ops.quantize_int4(w, G, **how)
    plain = ops.quantize_int4(w, G, **how, steps=False)
    before, after = squared_errors(w, plain, G), squared_errors(w, chosen, G)
    assert (after <= 1.0001 * MOST_STEP_LOSS * before).all()
    taken = (find_steps(*chosen[1:], 512) > 0)[:128].view(-1, 32).all(1)
    changed = (chosen[1] != plain[1]).any(1)[:128].view(-1, 32).any(1)
    assert (taken | ~changed).all()
    if G == 128:
        assert taken[:2].all()  # normal weights have steps
    if G == 32 and not symmetric:
        assert not taken[2:].any()  # where magnitudes differ much, small groups would lose


def test_pieces_of_a_weight_are_cut_at_panels(monkeypatch):
    w = randn(100, 256)
    whole = ops.quantize_int4(w, 64)
    monkeypatch.setattr("pyops.memory.CHUNK", 1)
    assert all(torch.equal(a, b) for a, b in zip(ops.quantize_int4(w, 64), whole, strict=True))


# ------------------------------------------------------------------------------------------- the product


@ZERO
@pytest.mark.parametrize("G", GROUPS)
def test_sums_over_all_groups_are_exact(isa, G, zero):
    """Steps that are powers of two: the sum, of less than 24 bits, is an integer, whatever the multiples."""
    for M, N, K in cases.SHAPES:
        x = randint(-127, 127, M, K).sign()  # -1, 0, 1
        x[:, 0] = 127
        x = x.float()
        q, scale, z = stepped(N, K, G, zero)
        step = find_steps(scale, z, K)[:, None]
        scale = (scale.float() / step).round()  # steps of 1
        exact, _ = oracle(x, (q, scale, z), G)
        for packed in (False, True):
            y = call(x, (q, scale, z), G, packed, compute="int8")
            assert torch.equal(y, exact.float()), (M, N, K, packed)


@pytest.mark.parametrize("kind", [stepped, free])
@pytest.mark.parametrize("G", GROUPS)
def test_both_forms_give_the_same_bits(isa, G, kind):
    """The steps of a canonical weight are found at every call."""
    for M, N, K in ((1, 33, 130), (3, 70, 515), (9, 40, 300), (40, 65, 1030), (70, 96, 2112)):
        w, x = kind(N, K, G), randn(M, K)
        bits = [call(x, w, G, packed, compute="int8", activation="silu") for packed in (False, True)]
        assert torch.equal(*bits), (M, N, K)
        assert_close_to_oracle(bits[1], x, w, G, activation="silu")


@pytest.mark.parametrize("G", [32, 64, 128])
def test_panels_with_and_without_steps_side_by_side(isa, G):
    """Each panel's columns are those that it has alone, whatever ran before it."""
    K = 1100
    kinds = (free, stepped, stepped, stepped, free, free, free, stepped)
    parts = [kind(32, K, G, seed=i) for i, kind in enumerate(kinds)]
    w = [torch.cat(t) for t in zip(*parts, strict=True)]
    for M in (1, 2, 3, 6, 17, 33, 100, 300):
        x, bias = randn(M, K), randn(256)
        together = call(x, w, G, bias=bias, activation="relu", compute="int8")
        alone = [
            call(x, part, G, bias=b, activation="relu", compute="int8")
            for part, b in zip(parts, bias.split(32), strict=True)
        ]
        assert torch.equal(together, torch.cat(alone, 1)), M


@pytest.mark.parametrize("kind", [stepped, free])
@pytest.mark.parametrize("G", GROUPS)
def test_a_row_is_the_same_in_every_batch(isa, G, kind):
    """Kernels for one row, few and many, and tiles of every height."""
    x, w = randn(130, 700), kind(70, 700, G)
    alone = torch.cat([call(row[None], w, G, compute="int8") for row in x])
    for M in (2, 3, 4, 5, 14, 15, 16, 17, 31, 33, 64, 130):
        assert torch.equal(call(x[:M], w, G, compute="int8"), alone[:M]), M


@cases.needs_native
@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 70),
    N=st.integers(1, 100),
    K=st.integers(1, 1500),
    G=st.sampled_from(GROUPS),
    zero=st.booleans(),
    dtype=st.sampled_from(cases.FLOATS),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    seed=st.integers(0, 99),
)
def test_any_size(M, N, K, G, zero, dtype, scale_dtype, seed):
    w, x = stepped(N, K, G, zero, seed, scale_dtype), randn(M, K, dtype=dtype, seed=seed)
    y = call(x, w, G, compute="int8")
    assert_close_to_oracle(y, x, w, G)
    assert torch.equal(y, call(x, w, G, packed=False, compute="int8"))


def test_the_longest_sum_does_not_overflow(isa):
    K = MOST_STEPPED_K
    w = pack_nibbles(torch.zeros(2, K, dtype=torch.uint8)), torch.tensor([[15.0], [1.0]]), None
    assert torch.equal(headers(ops.pack_int4(*w, K, -1))[0, :2], torch.tensor([15.0, 1.0]))
    two = w[0], torch.tensor([[15.0, 1.0], [14.0, 15.0]]), None
    G = K // 2
    for M in (1, 6, 20):
        x = torch.full((M, K), 127.0)
        y = call(x, two, G, compute="int8")
        exact, _ = oracle(x, two, G)
        assert torch.equal(y, exact.float())
