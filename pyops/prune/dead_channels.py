"""Remove channels that a pruned model does not need, from the layer that makes them and from those that read them.

What is removed are output channels that their layer does not compute any more (all of their weights are pruned), and
channels that nothing reads. The model's results stay what they are: a removed channel is 0 for every layer that read
it, or another constant that goes into that layer's bias, where the padding of a convolution does not come in between.
The layers stay dense; they, their normalizations and the masks of pruning get smaller.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyops.edit import undoing
from pyops.measure import check_inputs, evaluating
from pyops.memory import has_values
from pyops.nn.effective import baked_hooks, effective, origin
from pyops.prune.channel_flow import BATCH_NORMS, ChannelFlow, Space, takes_constants
from pyops.prune.shrink import shrink
from pyops.refusal import is_lazy, layer_refusal
from pyops.structure import kept_weights
from pyops.trace import LAYERS, owners, trace

FilterFn = Callable[[nn.Module, str], bool]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass
class Removed:
    """One layer: how many of its channels are left, and why others that are dead could not go."""

    name: str
    outputs_before: int
    inputs_before: int
    outputs: int
    inputs: int
    reason: str = ""

    @property
    def changed(self) -> bool:
        """True if the layer is smaller than before."""
        return (self.outputs, self.inputs) != (self.outputs_before, self.inputs_before)

    def __str__(self) -> str:
        words = []
        if self.outputs != self.outputs_before:
            words.append(f"output channels {self.outputs_before} -> {self.outputs}")
        if self.inputs != self.inputs_before:
            words.append(f"input channels {self.inputs_before} -> {self.inputs}")
        return "; ".join([*([", ".join(words)] if words else []), *([self.reason] if self.reason else [])])


def remove_dead_channels_(model: nn.Module, example_inputs: Any, filter_fn: FilterFn | None = None) -> list[Removed]:
    """Remove dead channels from the Conv1d, Conv2d, Linear and BatchNorm of a model; a row for each of these layers.

    In place. The model gives the same results as before, up to the order of its sums. Layers that shrink have new
    Parameters, so make the optimizer afterwards; layers pruned by `torch.nn.utils.prune` stay pruned, by smaller masks.

    Channels are followed by `torch.fx` through batch normalization in eval mode, depthwise convolutions, activations,
    pooling, dropout, flattening and additions, where all that is added up must do without them. What is not known to
    treat channels one by one (the model's output, a concatenation, groups, other code) keeps all channels of its
    inputs, and the rows say so. Without a trace nothing is removed.

    Args:
        model: any module; call `model.eval()` before, a normalization in training mode keeps its channels.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`, which is run once on
            them, without gradients, for the shapes of its tensors.
        filter_fn: called as filter_fn(module, qualified_name); a layer for which it is False stays as it is.

    Raises:
        TypeError for arguments of a wrong type. After any exception the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_inputs(example_inputs)
    if example_inputs is None:
        raise TypeError("example_inputs is None: the shapes of the model's tensors are needed")
    with removing(model, example_inputs, filter_fn) as rows:
        return list(rows.values())


@contextlib.contextmanager
def removing(
    model: nn.Module, example_inputs: Any, filter_fn: FilterFn | None = None
) -> Iterator[dict[nn.Module, Removed]]:
    """`remove_dead_channels_` on entry, undone if the body raises."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*LAYERS, *BATCH_NORMS)):
            names[module].append(name)
    refusals = _refusals(model, names, filter_fn)
    rows = {}
    for module, found in names.items():
        if isinstance(module, LAYERS) and not is_lazy(module) and effective(module, "weight") is not None:
            sizes = _sizes(module)
            rows[module] = Removed(found[0], *sizes, *sizes)
    with undoing(names):
        try:
            if any(is_lazy(module) for module in model.modules()):
                raise TypeError("it has layers that are not initialized yet: run it once")
            if not all(has_values(effective(layer, "weight").detach()) for layer in rows):
                raise TypeError("it has no values")
            graph = trace(model)
            shapes = _shapes(model, graph, example_inputs)
        except Exception as error:  # whatever a model's own code raises on fx's proxies
            failure = f"{type(error).__name__}: {error}".strip().split("\n")[0][:100]
            for layer, row in rows.items():
                row.reason = f"dead channels stay: the model cannot be traced ({failure})" * _has_dead(layer)
        else:
            _remove(model, graph, shapes, refusals, rows)
        yield rows


def _remove(model: nn.Module, graph: fx.Graph, shapes: dict, refusals: dict, rows: dict[nn.Module, Removed]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    calls, owned = defaultdict(int), owners(model)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[node.target]] += 1
        elif node.op == "get_attr":
            parent, _, name = node.target.rpartition(".")
            owner = owned.get(id(getattr(modules.get(parent), name, None)))
            if owner is not None:
                refusals.setdefault(owner, f"code reads {node.target}")
    for module, count in calls.items():
        if count > 1:
            refusals.setdefault(module, "the layer is called several times")
    removed = True
    while removed:  # a layer that lost its outputs reads less, so that more may be unused before it
        removed = False
        with torch.inference_mode(False), torch.no_grad():
            flow = ChannelFlow(graph, modules, shapes, refusals)
            for space in flow.spaces:
                gone = _removable(space)
                if gone is not None and gone.any():
                    _cut(space, gone)
                    removed = True
    for space in flow.spaces:
        for layer in space.producers:
            if not kept_weights(layer)[0].flatten(1).any(1).all():
                why = space.pinned or "as constants they go into a convolution that pads, or one channel has to stay"
                rows[layer].reason = f"dead output channels stay: {why}"
    for layer, row in rows.items():
        row.outputs, row.inputs = _sizes(layer)


def _removable(space: Space) -> Tensor | None:
    """The channels that no reader would miss, bool [C]; None if there is none to ask."""
    if space.pinned or not space.reads:
        return None
    gone = torch.ones(space.size, dtype=torch.bool)
    for read in space.reads:
        unread, channels = ~_columns(read.layer, read.channels.span), read.channels
        # A pruned bias cannot take a constant: its own mask would say no.
        foldable = takes_constants(read.layer) and origin(read.layer, "bias") is None
        known = channels.constant & ((channels.value == 0) | (channels.value.isfinite() & foldable))
        gone &= (unread | known).cpu()
    if gone.all():
        gone[0] = False  # torch's layers want a channel
    return gone


def _columns(layer: nn.Module, span: int) -> Tensor:
    """The input channels that the layer reads, bool [C]."""
    kept = kept_weights(layer)[0].transpose(0, 1).flatten(1).any(1)
    return kept.view(-1, span).any(1)


def _cut(space: Space, gone: Tensor) -> None:
    left = (~gone).nonzero().view(-1)
    for read in space.reads:
        channels, layer = read.channels, read.layer
        weight = effective(layer, "weight").detach()
        value = torch.where(gone.to(weight.device) & channels.constant, channels.value, 0).to(weight.dtype)
        summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        extra = summed.double() @ value.double().repeat_interleave(channels.span)
        features = torch.arange(space.size * channels.span).view(-1, channels.span)[left].flatten()
        shrink(layer, 1, features, extra if bool((value != 0).any()) else None)
    for module in dict.fromkeys([*space.producers, *space.norms]):
        shrink(module, 0, left)


# ------------------------------------------------------------------------------------------------- what may be changed


def _refusals(model: nn.Module, names: dict[nn.Module, list[str]], filter_fn: FilterFn | None) -> dict[nn.Module, str]:
    """Why a layer or normalization must keep its channels, for those that must."""
    held: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module._parameters.values():
            held[id(parameter)] += parameter is not None
    refusals = {}
    for module, found in names.items():
        reason = _norm_refusal(module) if isinstance(module, _BatchNorm) else _layer_refusal(module)
        if not reason and any(held[id(p)] > 1 for p in module._parameters.values()):
            reason = "its parameters are shared"
        if (
            not reason
            and filter_fn is not None
            and isinstance(module, LAYERS)
            and not all(filter_fn(module, name) for name in found)
        ):
            reason = "filter_fn"
        if reason:
            refusals[module] = f"{found[0]} must stay as it is ({reason})"
    return refusals


def _layer_refusal(layer: nn.Module) -> str | None:
    reason = layer_refusal(layer, next(base for base in LAYERS if isinstance(layer, base)), FLOATS)
    if reason:
        return reason
    for name in ("weight", "bias"):
        if origin(layer, name) not in (None, "pruned"):
            return f"its {name} is {origin(layer, name)}"
    if not has_values(effective(layer, "weight").detach()):
        return "it has no values"
    if not kept_weights(layer)[1]:
        return "its mask is not applied"
    return "has hooks" if _hooked(layer) else None


def _norm_refusal(norm: _BatchNorm) -> str | None:
    if type(norm) not in BATCH_NORMS or "forward" in norm.__dict__:
        return "not a plain normalization"
    if norm.training:
        return "in training mode: call eval() first"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    return "has hooks" if _hooked(norm) else None


def _hooked(module: nn.Module) -> bool:
    own = [hook for hook in module._forward_pre_hooks.values() if hook not in baked_hooks(module, "weight", "bias")]
    return bool(own or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _has_dead(layer: nn.Module) -> bool:
    if not has_values(effective(layer, "weight").detach()):
        return False
    kept = kept_weights(layer)[0]
    return not (kept.flatten(1).any(1).all() and kept.transpose(0, 1).flatten(1).any(1).all())


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _shapes(model: nn.Module, graph: fx.Graph, example_inputs: Any) -> dict[fx.Node, tuple[int, ...]]:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple):
        named = {node.target: node.args for node in inputs}
        example_inputs = tuple(example_inputs.get(name, *default) for name, default in named.items())
    interpreter = _Shapes(model, graph=graph)
    with evaluating(model):
        interpreter.run(*example_inputs)
    return interpreter.shapes
