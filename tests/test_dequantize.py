"""The ops that make dense matrices of packed weights."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import randint, randn

from pyops import ops
from pyops.ops.dequantize import int4_dequantize, int8_dequantize
from pyops.ops.int4_weight import SCALE_DTYPES, dequantize_int4

pytestmark = pytest.mark.usefixtures("poison")
SIZES = [*((N, K) for _, N, K in (*cases.SHAPES, *cases.EMPTY_SHAPES)), (70, 1500)]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("G", [32, 128, -1])
def test_int4(isa, G, dtype):
    for i, (N, K) in enumerate(SIZES):
        how = {"symmetric": i % 2 == 0, "scale_dtype": SCALE_DTYPES[i % 3]}
        w = ops.quantize_int4(randn(N, K, seed=i), G, **how)
        dense = int4_dequantize(*ops.pack_int4(*w, K, G), G, N, K, dtype)
        assert torch.equal(dense, dequantize_int4(*w, K, G, dtype)), (N, K)
        assert dense.dtype == dtype


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_int8(isa, dtype):
    for N, K in SIZES:
        q = randint(-128, 127, N, K)
        s = randn(N)
        dense = int8_dequantize(ops.pack_int8(q), s, K, dtype)
        assert torch.equal(dense, (q * s[:, None]).to(dtype)), (N, K)
        assert dense.dtype == dtype


@pytest.mark.parametrize("call", [
    lambda w: int4_dequantize(*w, 32, 65, 70, torch.float32),
    lambda w: int4_dequantize(*w, 32, 33, 130, torch.float32),
    lambda w: int4_dequantize(*w, 64, 33, 70, torch.float32),
    lambda w: int4_dequantize(w[0], w[1][:1], w[2], 32, 33, 70, torch.float32),
    lambda w: int8_dequantize(ops.pack_int8(torch.ones(33, 70, dtype=torch.int8)), torch.ones(65), 70, torch.float32),
    lambda w: int8_dequantize(ops.pack_int8(torch.ones(33, 70, dtype=torch.int8)), torch.ones(33), 130, torch.float32),
])  # fmt: skip
def test_refused(call):
    """Called with sizes that the packed tensors are not for."""
    with pytest.raises((RuntimeError, ValueError), match=r"N=|pack"):
        call(ops.pack_int4(*ops.quantize_int4(randn(33, 70), 32), 70, 32))
