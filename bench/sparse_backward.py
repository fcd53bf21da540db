"""Cases of sparse_backward: the gradients of a pruned convolution, of x, the kept weights and the bias, batch 8."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from pyops.bench.case import Inputs, Op
from pyops.bench.sparse_conv2d import OP as SPARSE_CONV2D
from pyops.bench.sparse_conv2d import Pruning, Shape, _case
from pyops.bench.sparse_conv2d import make_inputs as make_forward_inputs

SHAPES: tuple[Shape, ...] = (
    (64, 64, 3, 1, 56),
    (256, 64, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (512, 128, 1, 1, 28),
    (256, 256, 3, 1, 14),
    (1024, 256, 1, 1, 14),
    (512, 512, 3, 1, 7),
)
BATCH = 8


def make_inputs(case, device: torch.device) -> Inputs:
    """Those of `sparse_conv2d`, and the gradient of y, ~ N(0, 1)."""
    inputs, dims = make_forward_inputs(case, device), case.dims
    side = -(-dims["H"] // dims["stride"])
    grad = torch.randn(BATCH, dims["O"], side, side, generator=torch.Generator().manual_seed(3))
    return inputs | {"grad": grad.to(device, inputs["x"].dtype)}


def oracle(inputs: Inputs) -> torch.Tensor:
    """The gradient of x by the dense convolution, in float64."""
    dims = inputs["case"].dims
    x, w, grad = (inputs[name].double() for name in ("x", "w", "grad"))
    x.requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w, None, dims["stride"], dims["pad"]), x, grad)[0]


OP = Op(
    name="sparse_backward",
    title="gradients of a convolution with a pruned weight",
    cases=tuple(
        dataclasses.replace(
            case := _case("resnet50", shape, BATCH, Pruning(pattern, 80)),
            group=f"{pattern} 80 %",
            label=case.group.split("/")[1],
            ops=2 * case.ops,  # dx and dW
            target=1.0,
            family=None,
            shared=None,
            default=True,
        )
        for pattern in ("unstructured", "oc_block16")
        for shape in SHAPES
    ),
    make_inputs=make_inputs,
    oracle=oracle,
    min_sqnr_db=SPARSE_CONV2D.min_sqnr_db,
    baseline="torch-nchw",
    peak=SPARSE_CONV2D.peak,
    inference=False,
    ops_unit=SPARSE_CONV2D.ops_unit,
)
"""Of ResNet-50, a shape of each kind; 80 % is where the gradients should be no slower than dense."""
