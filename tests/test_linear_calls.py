"""The quantized linear layers call their ops past the dispatcher's autograd layer: what that must not lose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Recorder, randn
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyops.nn import Fp8Linear, Int4Linear, Int8Linear

KINDS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "int4": ("int4_linear", Int4Linear.from_float),
    "int8": ("int8_linear", Int8Linear.from_float),
    "int8 weight-only": ("int8_weight_linear", lambda linear: Int8Linear.from_float(linear, mode="weight_only")),
    "fp8": ("fp8_linear", Fp8Linear.from_float),
}
WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode]


@pytest.fixture(params=KINDS)
def kind(request):
    name, make = KINDS[request.param]
    return name, make(nn.Linear(70, 45)).requires_grad_(False)


@pytest.mark.parametrize("without", WITHOUT_GRADIENTS)
def test_the_same_result_without_gradients(kind, without):
    x, layer = randn(3, 70), kind[1]
    expected = layer(x.clone().requires_grad_()).detach()
    with without():
        y = layer(x)
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert y.is_inference() == (without is torch.inference_mode)


@pytest.mark.parametrize("without", WITHOUT_GRADIENTS)
def test_modes_and_the_profiler_see_the_op(kind, without):
    name, layer = kind
    x = randn(3, 70)
    with without():
        with Recorder() as recorder:
            layer(x)
        with torch.profiler.profile() as profile:
            layer(x)
    assert f"pyops.{name}.default" in recorder.seen
    assert f"pyops::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("without", WITHOUT_GRADIENTS)
def test_transforms_see_the_op(kind, without):
    name, layer = kind
    x = randn(4, 3, 70)
    with without():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    with torch.no_grad():
        graph = make_fx(layer)(x)
    assert f"pyops.{name}.default" in {str(node.target) for node in graph.graph.nodes}


def test_tangents_are_not_lost(kind):
    x = randn(3, 70)
    name, layer = kind
    with forward_ad.dual_level():
        layer(x)
        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
            layer(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))
