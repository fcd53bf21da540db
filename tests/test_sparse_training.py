"""Training keeps the mask: zeros stay zeros, and a kept weight that is exactly 0 on its way is still kept after it."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from test_sparse_module import pruned
from torch import nn

import pyops
from pyops.nn import SparseConv1d, SparseConv2d, SparseLinear

SGD = {"torch": torch.optim.SGD, "pyops": pyops.optim.SGD}
OPTIMIZERS = {
    "torch.AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "torch.RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
    "torch.SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "pyops.Adam": lambda p: pyops.optim.Adam(p, lr=0.02),
    "pyops.AdamW": lambda p: pyops.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "pyops.SGD": lambda p: pyops.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}
LAYERS = {
    "conv2d": (nn.Conv2d, (12, 10, 3), SparseConv2d, (2, 12, 6, 6)),
    "conv1d": (nn.Conv1d, (12, 10, 3), SparseConv1d, (4, 12, 9)),
    "linear": (nn.Linear, (12, 10), SparseLinear, (8, 12)),
}


@pytest.mark.parametrize("optimizer", SGD)
@pytest.mark.parametrize("pattern", ["unstructured", "oc_block4", "ic_block4", "block16"])
def test_a_step_lands_on_zero_and_the_next_leaves_it(pattern, optimizer):
    """The gradient of each kept weight is 1, and 0.5 - 2 · 0.25 is exactly 0."""
    dense = pruned(nn.Linear, 12, 10, bias=False)
    with torch.no_grad():
        dense.weight_orig.fill_(0.5)
    layer = SparseLinear.from_dense(dense, pattern=pattern)
    mask, step = layer.sparse_weight.mask()[:, :, 0, 0], SGD[optimizer](layer.parameters(), lr=0.25)
    for expected in (0.25, 0.0, -0.25, -0.5):
        step.zero_grad()
        layer(torch.ones(1, 12)).sum().backward()
        step.step()
        assert torch.equal(layer.weight, torch.where(mask, expected, 0.0))
        with torch.no_grad():  # through the packed form too, which must not drop what is 0 now
            assert torch.equal(layer(torch.eye(12)).T, torch.where(mask, expected, 0.0))
    assert torch.equal(layer.sparse_weight.mask()[:, :, 0, 0], mask)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_hundred_steps_through_zero(kind, optimizer, threads):
    """Half of the kept weights are set to 0 in the middle, with the state that the optimizer has by then."""
    threads(1)
    dense_type, sizes, sparse_type, shape = LAYERS[kind]
    layer = sparse_type.from_dense(pruned(dense_type, *sizes), pattern="oc_block4")
    mask, x = layer.weight != 0, randn(*shape)
    target = randn(*layer(x).shape, seed=1)
    step = OPTIMIZERS[optimizer](layer.parameters())
    for i in range(100):
        if i == 50:
            with torch.no_grad():
                layer.values[::2] = 0.0
        step.zero_grad()
        (layer(x) - target).square().mean().backward()
        step.step()
        assert not layer.weight[~mask].any()
    assert torch.equal(layer.weight != 0, mask)
    layer.sparse_weight.validate()
