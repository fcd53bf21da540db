"""A model's forward as a graph of torch.fx, in which layers are single nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise code that reads a running_mean leaves no node

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("pyops.nn")
        return ours or isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model's forward; raises whatever the model's code raises on fx's proxies."""
    if "forward" in model.__dict__:
        raise TypeError("its forward is patched, and fx traces that of the class")
    with _attributes_kept(model), torch.random.fork_rng(devices=[]):
        return _Tracer().trace(model)


def owners(model: nn.Module) -> dict[int, nn.Module]:
    """The layer or normalization of each of their tensors, by its identity."""
    found = {}
    for module in model.modules():
        if isinstance(module, (*LAYERS, _BatchNorm)):
            held = [*module._parameters.values(), *module._buffers.values(), module.__dict__.get("weight")]
            found.update((id(t), module) for t in held if t is not None)
    return found


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Attributes that the model's forward sets would hold fx's proxies after the trace."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
