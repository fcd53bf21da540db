"""`pyops.ops.SparseWeight`: from dense and back in every pattern, and what is no structure is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import pytest
import torch
from cases import randn, sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from pyops.ops import SparseWeight
from pyops.ops.sparse_packed import PackedCache
from pyops.ops.sparse_weight import (
    BLOCKS,
    PATTERNS,
    block_columns,
    block_rows,
    check_structure,
    full_structure,
    gather_blocks,
    is_2_4,
)

SHAPES = ((10, 6, 3, 2, 1), (10, 3, 3, 3, 2), (17, 5, 1, 1, 1), (6, 1, 3, 3, 6), (32, 64, 1, 1, 2), (1, 1, 1, 1, 1))
"""O, C/groups, R, S, groups."""


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# ------------------------------------------------------------------------------------------- dense and back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_dense_and_back(pattern, shape):
    *shape, groups = shape
    w, mask = randn(*shape), randn(*shape, seed=1) > 0.3
    w[mask.nonzero()[:1].unbind(1)] = 0.0  # kept, and 0
    if pattern == "2:4":
        mask &= torch.arange(shape[1])[:, None, None] % 4 < 2
    weight = SparseWeight.from_dense(w, mask, pattern=pattern, groups=groups)
    assert (weight.block, weight.shape, weight.groups) == (PATTERNS[pattern], tuple(shape), groups)
    assert torch.equal(weight.mask(), mask)
    assert torch.equal(weight.to_dense(), torch.where(mask, w, 0))
    assert weight.nnz == mask.sum()
    assert weight.sparsity == pytest.approx(1 - mask.float().mean().item())
    assert weight.waste == pytest.approx(1 - mask.sum().item() / max(weight.values.numel(), 1), abs=1e-6)
    if weight.block == (1, 1):
        assert weight.block_mask is None
    if weight.block_mask is not None:
        assert not weight.values[~weight.block_mask].any()
    structure = (weight.crow_indices, weight.col_indices)
    assert torch.equal(gather_blocks(weight.to_dense(), *structure, weight.block, groups), weight.values)


def test_layout_is_the_documented_one():
    """Two groups of 3 output channels, blocks of 4: a block row a group, its last position padding."""
    w = torch.zeros(6, 2, 1, 3)
    w[0, 1, 0, 2] = 1.0
    w[2, 0, 0, 1] = 2.0
    w[4, 0, 0, 0] = 3.0
    weight = SparseWeight.from_dense(w, pattern="oc_block4", groups=2)
    assert weight.crow_indices.tolist() == [0, 2, 3]
    assert weight.col_indices.tolist() == [1, 5, 0]  # (cb · R + r) · S + s
    assert weight.values[:, :, 0].tolist() == [[0, 0, 2, 0], [1, 0, 0, 0], [0, 3, 0, 0]]
    assert weight.block_mask.sum() == 3
    assert weight.sparsity == 1 - 3 / 36
    assert weight.waste == 0.75


def test_the_mask_counts_and_not_the_zeros():
    w, mask = torch.zeros(4, 3, 1, 1), torch.ones(4, 3, 1, 1)
    assert SparseWeight.from_dense(w).nnz == 0
    assert SparseWeight.from_dense(w, mask).nnz == 12
    w[0] = torch.nan
    mask[0, 0] = 0
    weight = SparseWeight.from_dense(w, mask)
    assert weight.to_dense()[0, 0] == 0, "what is not kept does not count, whatever it is"
    assert weight.to_dense().isnan().sum() == 2, "a kept NaN is kept"
    assert SparseWeight.from_dense(w).nnz == 3


def test_matrix_is_a_1x1_convolution():
    w = randn(5, 7)
    assert SparseWeight.from_dense(w, w > 0).shape == (5, 7, 1, 1)


def test_blocks_without_fill_in_need_no_mask():
    w = randn(10, 6, 3, 3).repeat_interleave(1, 0)
    w[4:8] = 0
    assert SparseWeight.from_dense(w, pattern="oc_block4").block_mask is None  # 10 = 4 + 4 + 2: padding is no fill-in


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_structure(shape, pattern):
    *shape, groups = shape
    mask = torch.ones(shape, dtype=torch.bool)
    if pattern == "2:4":
        mask &= torch.arange(shape[1])[:, None, None] % 4 < 2
    weight = SparseWeight.from_dense(randn(*shape), mask, pattern=pattern, groups=groups)
    crow, col = full_structure(shape, groups, pattern, "cpu")
    assert torch.equal(crow, weight.crow_indices)
    assert torch.equal(col, weight.col_indices)
    assert (crow.dtype, col.dtype) == (torch.int32, torch.int32)


def test_2_4():
    mask = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert is_2_4(mask.view(1, 10, 1, 1))
    mask[4] = True
    assert not is_2_4(mask.view(1, 10, 1, 1))
    with pytest.raises(ValueError, match='pattern="2:4" allows 2 of 4'):
        SparseWeight.from_dense(torch.ones(1, 10, 1, 1), mask.view(1, 10, 1, 1), pattern="2:4")


def test_to_and_copies():
    weight = sparse_weight(10, 6, 3, 2, pattern="oc_block4")
    weight.packed.forward.by_shape[()] = weight.values
    half = weight.to(torch.bfloat16)
    assert (half.values.dtype, half.crow_indices.dtype, half.block_mask.dtype) == (
        torch.bfloat16,
        torch.int32,
        torch.bool,
    )
    assert torch.equal(half.mask(), weight.mask())
    for other in (half, copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(other.packed, PackedCache)
        assert not other.packed.forward.by_shape, "a copy packs for itself"
        assert other.shape == weight.shape
    assert weight.to("meta").values.is_meta


def test_gradient_reaches_kept_positions_only():
    weight = sparse_weight(10, 6, 3, 2, pattern="block16")
    weight.values.requires_grad_()
    weight.to_dense().sum().backward()
    assert torch.equal(weight.values.grad, weight.block_mask.float())


# ------------------------------------------------------------------------------------------- what is refused

BAD_DENSE = {
    "list": (TypeError, "w must be a floating-point tensor, got list", {"w": [1.0]}),
    "int": (TypeError, r"w must be a floating-point tensor, got torch\.int64", {"w": torch.ones(4, 4).long()}),
    "3-D": (
        ValueError,
        r"w must be \[O, C/groups, R, S\] or \[O, K\], got shape \(4, 4, 3\)",
        {"w": torch.ones(4, 4, 3)},
    ),
    "mask": (ValueError, r"mask is \(4, 1\); w needs \(4, 8\)", {"mask": torch.ones(4, 1)}),
    "mask list": (TypeError, "mask must be a tensor, got list", {"mask": [1]}),
    "pattern": (ValueError, "pattern='4:8' is not one of unstructured, 2:4", {"pattern": "4:8"}),
    "groups": (ValueError, "groups is 3; it must be positive and divide the 4 output channels", {"groups": 3}),
    "no groups": (ValueError, "groups is 0", {"groups": 0}),
}


@pytest.mark.parametrize("name", BAD_DENSE)
def test_bad_from_dense(name):
    error, message, changes = BAD_DENSE[name]
    with pytest.raises(error, match=message):
        SparseWeight.from_dense(**{"w": torch.ones(4, 8), **changes})


FIELDS = {
    "values": torch.ones(3, 4, 1),
    "crow_indices": int32(0, 2, 2, 3),
    "col_indices": int32(1, 5, 0),
    "shape": (10, 2, 1, 3),
    "block": (4, 1),
}
"""Three block rows of six columns; the last row has two output channels."""
FIELDS["values"][2, 2:] = 0
INT_MAX = 2**31 - 1

BAD_FIELDS = {
    "crow int64": (r"crow_indices has dtype torch\.int64", {"crow_indices": torch.tensor([0, 2, 2, 3])}),
    "crow 2-D": (r"crow_indices has shape \(1, 4\)", {"crow_indices": int32(0, 2, 2, 3)[None]}),
    "crow list": ("crow_indices must be a tensor, got list", {"crow_indices": [0, 2, 2, 3]}),
    "crow short": ("crow_indices has 3 elements; 3 block rows need 4", {"crow_indices": int32(0, 2, 3)}),
    "crow starts late": ("crow_indices starts with 1", {"crow_indices": int32(1, 2, 2, 3)}),
    "crow ends early": ("crow_indices ends with 2, expected 3", {"crow_indices": int32(0, 2, 2, 2)}),
    "crow falls": ("crow_indices decreases", {"crow_indices": int32(0, 3, 2, 3)}),
    "crow negative": ("crow_indices decreases", {"crow_indices": int32(0, -1, 2, 3)}),
    "crow overflows": ("crow_indices decreases", {"crow_indices": int32(0, INT_MAX, -INT_MAX, 3)}),
    "col float": (r"col_indices has dtype torch\.float32", {"col_indices": torch.ones(3)}),
    "col short": ("col_indices has 2 elements, values 3 blocks", {"col_indices": int32(1, 5)}),
    "col negative": ("col_indices holds -1; allowed: 0 to 5", {"col_indices": int32(-1, 5, 0)}),
    "col beyond": ("col_indices holds 6; allowed: 0 to 5", {"col_indices": int32(1, 6, 0)}),
    "col huge": (f"col_indices holds {INT_MAX}", {"col_indices": int32(1, 5, INT_MAX)}),
    "col unsorted": ("col_indices is not strictly increasing", {"col_indices": int32(5, 1, 0)}),
    "col twice": ("col_indices is not strictly increasing", {"col_indices": int32(5, 5, 0)}),
    "col elsewhere": ("crow_indices is on cpu, col_indices on meta", {"col_indices": int32(1, 5, 0).to("meta")}),
    "values 2-D": (r"values has shape \(3, 4\), expected \[B, 4, 1\]", {"values": torch.ones(3, 4)}),
    "values transposed": (r"values has shape \(3, 1, 4\)", {"values": torch.ones(3, 1, 4)}),
    "values int": ("values must be a floating-point tensor", {"values": torch.ones(3, 4, 1).int()}),
    "padding": ("values is not 0 at positions", {"values": torch.ones(3, 4, 1)}),
    "block": (r"block is \(3, 1\); allowed: \(1, 1\), \(4, 1\)", {"block": (3, 1)}),
    "pattern": (r"pattern='block16' has blocks of \(16, 16\), block is \(4, 1\)", {"pattern": "block16"}),
    "shape": (r"shape is \(10, 2, 3\); expected four sizes", {"shape": (10, 2, 3)}),
    "shape overflows": ("int32 cannot count them", {"shape": (10, 2**20, 64, 64)}),
    "groups": ("groups is 4; it must be positive and divide the 10", {"groups": 4}),
    "mask int": ("block_mask must be a bool tensor", {"block_mask": torch.ones(3, 4, 1).int()}),
    "mask short": (r"block_mask is \(3, 4\); values needs \(3, 4, 1\)", {"block_mask": torch.ones(3, 4) > 0}),
    "mask keeps padding": ("keeps positions beyond the last channel", {"block_mask": torch.ones(3, 4, 1) > 0}),
    "mask drops a value": ("values is not 0 at positions", {"block_mask": torch.zeros(3, 4, 1) > 0}),
}


def test_fields_are_right():
    weight = SparseWeight(**FIELDS)
    assert weight.pattern == "oc_block4"
    weight.validate()
    assert weight.values[0, 0, 0] == 1
    FIELDS["values"][0, 0] = torch.nan
    SparseWeight(**FIELDS)  # a weight may be NaN
    FIELDS["values"][0, 0] = 1


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields(name):
    message, changes = BAD_FIELDS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        SparseWeight(**{**FIELDS, **changes})


def test_2_4_is_checked():
    crow, col = full_structure((1, 8, 1, 1), 1, "unstructured", "cpu")
    arguments = (torch.ones(8, 1, 1), crow, col, (1, 8, 1, 1))
    assert SparseWeight(*arguments).pattern == "unstructured"
    with pytest.raises(ValueError, match="more than 2 of 4"):
        SparseWeight(*arguments, pattern="2:4")


# ------------------------------------------------------------------------------------------- fuzzed structures


def is_structure(B: int, crow: list[int], col: list[int], shape, block, groups) -> bool:
    """The definition, word by word."""
    rows, columns = block_rows(shape, block, groups), block_columns(shape, block)
    if len(crow) != rows + 1 or len(col) != B or crow[0] != 0 or crow[-1] != B:
        return False
    if any(a > b for a, b in itertools.pairwise(crow)) or any(not 0 <= c < columns for c in col):
        return False
    runs = [col[a:b] for a, b in itertools.pairwise(crow)]
    return all(a < b for run in runs for a, b in itertools.pairwise(run))


def mutate(rng: random.Random, numbers: list[int]) -> None:
    """One change of a kind that damaged or crafted files have."""
    special = (-1, 0, 1, -(2**31), 2**31 - 1, 2**30, len(numbers))
    kind = rng.randrange(6)
    at = rng.randrange(len(numbers)) if numbers else 0
    if kind == 0 or not numbers:
        numbers.insert(at, rng.choice(special))
    elif kind == 1:
        numbers[at] = rng.choice(special)
    elif kind == 2:
        numbers[at] += rng.choice((-1, 1)) if abs(numbers[at]) < 2**31 - 1 else 0
    elif kind == 3:
        other = rng.randrange(len(numbers))
        numbers[at], numbers[other] = numbers[other], numbers[at]
    elif kind == 4:
        numbers.pop(at)
    else:
        numbers[at] = numbers[rng.randrange(len(numbers))]


def test_ten_thousand_mutated_structures():
    rng = random.Random(0)
    accepted = 0
    for i in range(10000):
        if i % 100 == 0:
            groups = rng.choice((1, 1, 2, 3))
            shape = (groups * rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 3))
            block = rng.choice(BLOCKS)
            name = next(name for name in PATTERNS if PATTERNS[name] == block)
            weight = sparse_weight(*shape, keep=rng.random(), seed=i, pattern=name, groups=groups)
            good = (weight.crow_indices.tolist(), weight.col_indices.tolist())
        crow, col, B = list(good[0]), list(good[1]), len(good[1])
        for _ in range(rng.randint(1, 3)):
            mutate(rng, rng.choice((crow, col)))
        B = rng.choice((B, len(col)))
        expected = is_structure(B, crow, col, shape, block, groups)
        try:
            check_structure((B, *block), int32(*crow), int32(*col), shape, block, groups)
        except ValueError:
            assert not expected, (shape, block, groups, B, crow, col)
        else:
            assert expected, (shape, block, groups, B, crow, col)
            accepted += 1
    assert 100 < accepted < 9000


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_mask(data):
    groups = data.draw(st.sampled_from([1, 2, 3]))
    O, Cg, R, S = groups * data.draw(st.integers(0, 9)), *(data.draw(st.integers(n, 5)) for n in (0, 1, 1))
    pattern = data.draw(st.sampled_from([name for name in PATTERNS if name != "2:4"]))
    mask = randn(O, Cg, R, S, seed=data.draw(st.integers(0, 99))) > data.draw(st.sampled_from([-9, -1, 0, 1, 9]))
    w = randn(O, Cg, R, S, seed=7)
    weight = SparseWeight.from_dense(w, mask, pattern=pattern, groups=groups)
    assert torch.equal(weight.mask(), mask)
    assert torch.equal(weight.to_dense(), torch.where(mask, w, 0))
    crow, col = weight.crow_indices.tolist(), weight.col_indices.tolist()
    assert is_structure(weight.values.shape[0], crow, col, weight.shape, weight.block, groups)
