"""Let pyops layers apply the activation that follows them, in the epilogue of their kernels.

    y = act(z),   z = op(x) + bias (+ residual)

`act` as a module of its own reads and writes all of z once more. The layer computes the same in the pass in which it
writes z, before rounding to the dtype of y.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from pyops.flow import Flow, find_flow, hooked, said
from pyops.measure import check_inputs
from pyops.nn.conv import SparseConv1d, SparseConv2d
from pyops.nn.linear import QuantLinear
from pyops.nn.sparse import SparseLayer
from pyops.nn.sparse_linear import SparseLinear

PLAIN = (SparseConv2d, SparseConv1d, SparseLinear, QuantLinear)
MODULES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardswish: "hardswish",
}
GELU = {"none": "gelu", "tanh": "gelu_tanh"}
HUGGING_FACE = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
"""Modules of `transformers.activations`, by name: it is not imported for that."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """One pyops layer of a model: what became of the activation after it."""

    layer: str
    """Its qualified name; under several names the first."""
    activation: str | None
    """The activation that it applies or that follows it, as `layer.activation` calls it; None if there is none."""
    fused: bool
    reason: str
    """Why it was left alone, or what the layer does now that was done elsewhere."""


def fuse_activations_(model: nn.Module, example_inputs: Any = None) -> list[Fused]:
    """Set `activation` of each SparseConv2d/1d, SparseLinear and quantized linear layer that an activation follows.

    Returns a row for each of them. In place: `nn.Identity` takes the place of the activation module, which may be ReLU,
    ReLU6, GELU, SiLU, Sigmoid, Tanh, Hardswish or one of transformers' modules for these. Gradients are the same. The
    `state_dict` does not hold it: a model that is to load one needs the same call.

    A layer is fused where all that it gives goes into one activation, and an activation module that is called in
    several places only if each of them is such a layer. What goes where is read from a trace by `torch.fx`, in the mode
    (training or eval) that the model is in, and watched while the model runs once on `example_inputs`, in eval mode and
    without gradients. Without example inputs fx is believed; it goes astray where a forward asks if something is a
    tensor. Of a model that fx cannot trace, then only neighbours in an `nn.Sequential` are seen. What the model does
    with other inputs, or when its methods other than forward are called, none of them can see.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`.

    Raises:
        TypeError for arguments of a wrong type. After any exception, also one of the model's own forward, nothing is
        changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_inputs(example_inputs)
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if is_pyops_layer(module)]
    if not layers:
        return []
    flow = find_flow(model, example_inputs, is_pyops_layer, lambda module: name_of(module) is not None, confirm=True)
    pairs = {layer: _pair(layer, flow, names) for layer in layers}
    ready = {layer for layer, (_, reason) in pairs.items() if not reason}
    rows, changes, replaced = [], {}, {}
    for layer, (act, reason) in pairs.items():
        others = [source for source in dict.fromkeys(flow.sources.get(act, ())) if source not in ready]
        if not reason and others:
            reason = f"{said(act, names)} also follows {', '.join(said(source, names) for source in others)}"
        name = layer.activation if layer.activation != "none" else act and name_of(act)
        rows.append(Fused(names[layer], name, not reason, reason or f"in place of {said(act, names)}"))
        if not reason:
            changes[layer] = name
            replaced[act] = nn.Identity().train(act.training)
    _commit(names, changes, replaced)
    return rows


def is_pyops_layer(module: nn.Module) -> bool:
    """True for a layer that can apply an activation."""
    return isinstance(module, (SparseLayer, QuantLinear))


def name_of(module: nn.Module) -> str | None:
    """The name that `layer.activation` has for what this module computes; None if it has none."""
    kind = type(module)
    if "forward" in module.__dict__:
        return None
    if kind is nn.GELU:
        return GELU.get(module.approximate)
    if kind.__module__ == "transformers.activations":
        return HUGGING_FACE.get(kind.__name__)
    return MODULES.get(kind)


def layer_refusal(layer: nn.Module) -> str:
    """Why this pyops layer cannot apply an activation in place of what follows; "" if it can."""
    if layer.activation != "none":
        return f"it already applies {layer.activation}"
    if "forward" in layer.__dict__ or type(layer).forward not in {kind.forward for kind in PLAIN}:
        return f"{type(layer).__name__} has a forward of its own"
    return "the layer has hooks that see its output" if hooked(layer) else ""


def _pair(layer: nn.Module, flow: Flow, names: dict[nn.Module, str]) -> tuple[nn.Module | None, str]:
    """(the activation that follows the layer if there is one, why they cannot be made one or "")."""
    uses = list(dict.fromkeys(flow.uses.get(layer, [])))
    acts = [use for use in uses if isinstance(use, nn.Module) and name_of(use) is not None]
    act = acts[0] if acts else None
    refusal = layer_refusal(layer)
    if refusal:
        return act, refusal
    if not uses:
        return None, flow.unseen
    if act is None:
        return None, f"its output goes to {', '.join(said(use, names) for use in uses)}"
    others = [use for use in uses if use is not act]
    if others:
        return act, f"its output also goes to {', '.join(said(use, names) for use in others)}"
    if hooked(act, inputs=True):
        return act, f"{said(act, names)} has hooks, which nn.Identity would not call in the same way"
    for module in (layer, act):
        if flow.read_by(module):
            return act, f"{said(module, names)} is also used by {flow.read_by(module)}"
    return act, ""


def _commit(parents: Iterable[nn.Module], changes: dict[nn.Module, str], replaced: dict[nn.Module, nn.Module]) -> None:
    """Assignments only, nothing here can fail."""
    for layer, name in changes.items():
        layer.activation = name
    for parent in parents:
        for key, child in parent._modules.items():
            if child in replaced:
                parent._modules[key] = replaced[child]
