"""The CPU kernels of quantized linear layers read nothing beyond the tensors that they are given."""

from __future__ import annotations

import ctypes
import itertools
import mmap

import pytest
import torch
from cases import needs_native, randint, randn

from pyops import ops

pytestmark = needs_native
ROWS, CHANNELS, DEPTHS = (1, 2, 3, 8, 9, 16, 17, 40), (1, 33, 97), (0, 1, 31, 65, 130)


def before_a_wall(t: torch.Tensor | None) -> torch.Tensor | None:
    """The same, ending where a page begins that nobody may read: who does crashes."""
    if t is None or not t.nbytes:
        return t
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    no_access = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, no_access) == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape)
    return copy.copy_(t)


def int8_weight(N: int, K: int, packed: bool) -> list[torch.Tensor | None]:
    w_q, scale = randint(-127, 127, N, K), randn(N).abs() * 0.01
    return [ops.pack_int8(w_q) if packed else w_q, scale]


def int4_weight(N: int, K: int, packed: bool, steps: bool) -> list[torch.Tensor | None]:
    weight = ops.quantize_int4(randn(N, K), 64, steps=steps)
    return list(ops.pack_int4(*weight, K, 64) if packed else weight)


KINDS = {
    "int8": (ops.int8_linear, int8_weight, {}),
    "int8 weight-only": (ops.int8_weight_linear, int8_weight, {}),
    "int4, steps": (ops.int4_linear, lambda *size: int4_weight(*size, True), {"compute": "int8"}),
    "int4, free scales": (ops.int4_linear, lambda *size: int4_weight(*size, False), {"compute": "int8"}),
    "int4 float": (ops.int4_linear, lambda *size: int4_weight(*size, True), {"compute": "float"}),
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beyond_a_tensor_is_read(isa, kind, dtype, packed):
    op, make, options = KINDS[kind]
    for N, K in itertools.product(CHANNELS, DEPTHS):
        weight, bias = make(N, K, packed), randn(N)
        if op is ops.int4_linear:
            options = {**options, "group_size": 64, "out_features": N}
        for M in ROWS:
            x, residual = randn(M, K, dtype=dtype), randn(M, N, dtype=dtype)
            expected = op(x, *weight, bias, residual=residual, **options)
            walled = [before_a_wall(t) for t in (x, *weight, bias, residual)]
            y = op(*walled[:-1], residual=walled[-1], **options)
            assert torch.equal(y, expected), (M, N, K)
