"""What holds for every op that is registered."""

from __future__ import annotations

import cases
import pytest
import torch
from torch.utils._pytree import tree_leaves

from pyops.ops import registry

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")),
]


def _mutates(name: str) -> bool:
    return getattr(torch.ops.pyops, name).default._schema.is_mutable


NEW_RESULT = [name for name in registry.names if not _mutates(name)]
NO_GRADIENT = ("fake_int4", "int4_dequantize", "int8_dequantize", "optim_sum_squares")
DIFFERENTIABLE = [name for name in NEW_RESULT if name not in NO_GRADIENT]


def test_every_op_has_samples():
    assert set(registry.names) == set(cases.OP_SAMPLES)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", registry.names)
def test_opcheck(name, device, requires_grad):
    for sample in cases.OP_SAMPLES[name](requires_grad):
        moved = [_to(argument, device) for argument in sample]
        torch.library.opcheck(getattr(torch.ops.pyops, name).default, moved)


@pytest.mark.parametrize("name", NEW_RESULT)
def test_result_is_new_and_contiguous(name):
    for sample in cases.OP_SAMPLES[name](False):
        y = getattr(torch.ops.pyops, name)(*sample)
        assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
        assert not y._is_view()
        inputs = [t.untyped_storage().data_ptr() for t in tree_leaves(sample) if isinstance(t, torch.Tensor)]
        assert y.untyped_storage().data_ptr() not in inputs


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_result_may_be_changed_in_place(name):
    """Such as by ReLU(inplace=True) in training: autograd allows it only where the result is no view."""
    for sample in cases.OP_SAMPLES[name](True):
        getattr(torch.ops.pyops, name)(*sample).relu_().sum().backward()


def _to(argument, device):
    if isinstance(argument, list):
        return [_to(item, device) for item in argument]
    if not isinstance(argument, torch.Tensor) or device == "cpu":
        return argument
    return argument.detach().to(device).requires_grad_(argument.requires_grad)
