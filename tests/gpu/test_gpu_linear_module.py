"""Quantized linear layers that move between CPU and CUDA device."""

import copy

import pytest
import torch
from gpu_cases import needs_cuda
from linear_cases import KINDS, held_form_is_right, same

pytestmark = needs_cuda


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantized_linear_layers_move(kind):
    layer = kind.make()
    state = layer.state_dict()
    there = copy.deepcopy(layer).cuda()
    held_form_is_right(there)
    assert same({name: t.cpu() for name, t in there.state_dict().items()}, state)
    x, residual = torch.randn(5, 70), torch.randn(5, 33)
    torch.testing.assert_close(there(x.cuda(), residual.cuda()), kind.call(there, x.cuda(), residual.cuda()))
    loaded = kind.new(device="cuda")
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x.cuda()), there(x.cuda()))
    back = there.cpu()
    held_form_is_right(back)
    assert torch.equal(back(x), layer(x))
