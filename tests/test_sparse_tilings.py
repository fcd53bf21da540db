"""The CPU kernels of sparse convolution under tilings that are forced: those that a machine would not choose, too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import randn, sparse_weight

from pyops import backend

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(
        backend.native is None or "avx512" not in backend.native.available_cpu_isas(), reason="wants AVX-512"
    ),
]
LARGEST_TILE = 28
"""Pixels of a tile with channels as lanes: what the registers hold."""
CHANNEL_TILES = [(nr, nc) for nr in range(1, 5) for nc in range(1, LARGEST_TILE // nr + 1)]
PAIR_TILES = [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 4), (1, 7), (2, 7), (1, 13), (1, 14)]
BLOCK_TILES = [(4, 1, 1), (4, 1, 2), (4, 2, 2), (4, 1, 4), (4, 1, 7), (8, 1, 1), (8, 1, 2), (8, 1, 3)]


def check(x, weight, tiling, stride=1, padding=1, dilation=1, activation="none", residual=False, bias=True):
    """The op with a weight packed for `tiling`, against F.conv2d in float64."""
    w = (weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block)
    window = ((stride,) * 2, (padding,) * 4, (dilation,) * 2, weight.groups)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    packed = torch.ops.pyops.sparse_conv2d_pack(*w, *window, x.shape, last, True, tiling)
    b = randn(weight.shape[0]) if bias else None
    dense = weight.to_dense().double()
    exact = F.conv2d(x.double(), dense, None if b is None else b.double(), stride, padding, dilation, weight.groups)
    r = randn(*exact.shape, dtype=x.dtype) if residual else None
    y = torch.ops.pyops.sparse_conv2d(x, *w, b, r, *window, activation, packed)
    exact = exact if r is None else exact + r.double()
    exact = exact.relu() if activation == "relu" else exact
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[x.dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize(("nr", "nc"), CHANNEL_TILES)
def test_channels_as_lanes(nr, nc):
    """Each tile, whole and cut at both edges, in patches of one and of several."""
    weight = sparse_weight(40, 7, 3, 3, keep=0.3, pattern="oc_block16")
    for down, across, channels_in_block, rows in ((1, 1, 2, 16), (2, 2, 7, 64)):
        x = randn(2, 7, 2 * nr + 1, 2 * nc + 3)
        tiling = (nr * down, nc * across, nr, nc, 0, 16, channels_in_block, rows)
        check(x, weight, tiling)
        check(x.contiguous(memory_format=torch.channels_last), weight, tiling, residual=True, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_channels_as_lanes_windows(dtype, channels_last, stride, dilation, threads):
    """Strides and dilations whose phases are sorted, groups, dead channels, a last block of fewer channels."""
    weight = sparse_weight(2 * 24, 70, 3, 3, keep=0.3, pattern="oc_block16", groups=2, dtype=dtype)
    x = randn(3, 140, 13, 19, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for n in (1, 2):
        threads(n)
        for tiling in ((4, 12, 2, 6, 0, 16, 20, 32), (2, 7, 1, 7, 0, 16, 200, 16)):
            check(x, weight, tiling, stride, 2, dilation, residual=n == 1, activation="relu", bias=n == 1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flat", [0, 1])
def test_channels_as_lanes_pointwise(channels_last, flat):
    """1 × 1: images are rows of pixels, or are not."""
    weight = sparse_weight(33, 19, 1, 1, keep=0.2, pattern="oc_block16")
    for image in ((9, 11), (1, 1), (3, 40)):
        x = randn(2, 19, *image)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        for nr, nc in ((1, 28), (1, 5)) if flat else ((1, 28), (3, 9)):
            check(x, weight, (nr, nc, nr, nc, flat, 16, 8, 512), padding=0)


@pytest.mark.parametrize(("nr", "nc"), PAIR_TILES)
def test_pairs_of_rows(nr, nc):
    weight = sparse_weight(21, 9, 3, 3, keep=0.4)
    x = randn(2, 9, 2 * nr + 1, 2 * nc + 3)
    for tiling in ((nr, nc, nr, nc, 0, 2, 4, 16), (2 * nr, 2 * nc, nr, nc, 0, 2, 9, 512)):
        check(x, weight, tiling)
        check(x.contiguous(memory_format=torch.channels_last), weight, tiling, residual=True)


@pytest.mark.parametrize(("rows", "nr", "nc"), BLOCK_TILES)
def test_blocks_of_rows(rows, nr, nc):
    weight = sparse_weight(21, 9, 3, 3, keep=0.4, pattern="oc_block8")
    x = randn(2, 9, 2 * nr + 1, 2 * nc + 3)
    for tiling in ((nr, nc, nr, nc, 0, rows, 4, 16), (2 * nr, 2 * nc, nr, nc, 0, rows, 9, 512)):
        check(x, weight, tiling)
        check(x.contiguous(memory_format=torch.channels_last), weight, tiling, activation="relu")
