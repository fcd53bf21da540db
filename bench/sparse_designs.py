"""Cases of sparse_designs: the CPU kernels against each other, on weights in blocks of 16 output channels.

Such a weight can be computed by each of them, so that nothing but the design differs: pixels as lanes, with pairs of
rows, 4 or 8 rows at once, or channels as lanes. Ours is what `sparse_conv2d` chooses.
"""

from __future__ import annotations

import dataclasses

from pyops.bench.case import Op
from pyops.bench.sparse_conv2d import OP as SPARSE_CONV2D
from pyops.bench.sparse_conv2d import Pruning, Shape, _case, make_inputs, oracle

SHAPES: tuple[Shape, ...] = (
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (128, 128, 3, 2, 56),
    (512, 128, 1, 1, 28),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7),
)

OP = Op(
    name="sparse_designs",
    title="designs of sparse convolution",
    cases=tuple(
        dataclasses.replace(
            _case("resnet50", shape, 1, Pruning("oc_block16", percent)),
            group=f"{percent} %",
            label="{}-{}\n{}×{}s{}@{}".format(*shape[:3], *shape[2:]),
            family=None,
            shared=None,
        )
        for percent in (50, 90)
        for shape in SHAPES
    ),
    make_inputs=make_inputs,
    oracle=oracle,
    min_sqnr_db=SPARSE_CONV2D.min_sqnr_db,
    baseline="torch-channels_last",
    peak=SPARSE_CONV2D.peak,
    ops_unit=SPARSE_CONV2D.ops_unit,
)
"""Of ResNet-50, a shape of each kind."""
