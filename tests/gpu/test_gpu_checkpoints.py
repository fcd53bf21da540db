"""Checkpoints of other libraries, loaded onto a CUDA device."""

import contextlib

import pytest
import torch
from gpu_cases import needs_cuda

import pyops

pytestmark = needs_cuda


@pytest.mark.parametrize("made", ["meta", "cuda"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "pack-quantized", "int-quantized", "float-quantized"])
def test_checkpoints(kind, made):
    """The same checkpoint on both devices: the same state, and the layers of the GPU compute with it."""
    from checkpoint_cases import CHECKPOINTS, IDS, Net

    state, config = CHECKPOINTS[kind][0](), CHECKPOINTS[kind][1]
    pyops.load_quantized_(cpu := Net(), state, config=config, compute="float")
    with pyops.empty_weights() if made == "meta" else contextlib.nullcontext():
        model = Net()
    model = model if made == "meta" else model.cuda()
    pyops.load_quantized_(model, state, config=config, compute="float", device="cuda")
    model.cuda()  # buffers, which were made where they are
    assert all(t.is_cuda for t in model.state_dict().values())
    found, wanted = model.state_dict(), cpu.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(t.cpu(), wanted[key]) and t.dtype == wanted[key].dtype for key, t in found.items())
    y, expected = model(IDS.cuda()).cpu(), cpu(IDS)
    assert (y - expected).norm() < 1e-2 * expected.norm()
