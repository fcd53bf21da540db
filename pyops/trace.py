"""A model's forward as a graph of torch.fx, in which layers are single nodes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # otherwise code that reads a running_mean leaves no node

    def __init__(self, leaf: Callable[[nn.Module], bool], seen_by_hooks: dict[fx.Node, list[str]]) -> None:
        super().__init__()
        self.leaf, self.seen_by_hooks = leaf, seen_by_hooks

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("pyops.nn")
        return ours or isinstance(m, (*LAYERS, _BatchNorm)) or self.leaf(m) or super().is_leaf_module(m, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        # Hooks of a leaf are seen in the module itself; those of what is traced through are not in the graph.
        if not self.is_leaf_module(m, "") and any(m.__dict__.get(hooks) for hooks in HOOKS):
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, fx.Proxy):
                    self.seen_by_hooks[value.node].append(f"hooks of a {type(m).__name__}")
        return result


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def trace(
    model: nn.Module,
    leaf: Callable[[nn.Module], bool] = lambda module: False,
    seen_by_hooks: dict[fx.Node, list[str]] | None = None,
    setting: str = "ignored",
) -> fx.Graph:
    """The graph of the model's forward; raises whatever the model's code raises on fx's proxies.

    Args:
        model: what is traced.
        leaf: says which other modules than torch's and ours are single nodes.
        seen_by_hooks: gets the nodes whose values hooks see, and whose hooks, for those of modules that are no nodes.
        setting: "refused" raises TypeError where the forward sets attributes, of which the graph has nothing.
    """
    if "forward" in model.__dict__:
        raise TypeError("its forward is patched, and fx traces that of the class")
    seen = defaultdict(list) if seen_by_hooks is None else seen_by_hooks
    with _attributes_kept(model, setting), torch.random.fork_rng(devices=[]):
        return _Tracer(leaf, seen).trace(model)


def owners(
    model: nn.Module, asked: Callable[[nn.Module], bool] = lambda module: isinstance(module, (*LAYERS, _BatchNorm))
) -> dict[int, nn.Module]:
    """The layer or normalization, or other module asked for, of each of their tensors, by its identity."""
    found = {}
    for module in model.modules():
        if asked(module):
            held = [*module._parameters.values(), *module._buffers.values(), module.__dict__.get("weight")]
            found.update((id(t), module) for t in held if t is not None)
    return found


@contextlib.contextmanager
def _attributes_kept(model: nn.Module, setting: str) -> Iterator[None]:
    """Attributes that the model's forward sets would hold fx's proxies after the trace."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    changed = False
    try:
        yield
        changed = any(
            module.__dict__.keys() != old.keys() or any(module.__dict__[key] is not old[key] for key in old)
            for module, old in before
        )
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
    if changed and setting == "refused":
        raise TypeError("its forward sets attributes")
