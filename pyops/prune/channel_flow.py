"""Follow the channels of every tensor through a traced model: who makes them, who reads them, which are constant.

Tensors whose channels only exist together share a `Space`: the outputs of all layers that are added up somewhere, and
what normalizations, activations and pooling make of them. A channel that its layer does not compute (nothing of its
weight is kept) is the bias everywhere, and stays a constant through all of these. Whatever is not known to treat each
channel alike and apart from the others pins the space: it keeps its channels.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyops.nn.effective import effective
from pyops.structure import kept_weights
from pyops.trace import LAYERS

ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
    *(nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Identity),
)
ELEMENTWISE_FUNCTIONS = (
    *(F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, F.gelu, F.silu, F.mish, torch.sigmoid, F.sigmoid, torch.tanh),
    *(F.tanh, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.selu, F.celu, F.softplus, F.softsign),
)
ELEMENTWISE_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone")
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d)
MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
MEAN_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
MAX_POOL_FUNCTIONS = (F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d)
MEAN_POOL_FUNCTIONS = (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
FLATTENS = (torch.flatten, "flatten", "view", "reshape")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclasses.dataclass(eq=False)
class Space:
    """Channels that can only be removed together, from all tensors that have them."""

    size: int
    producers: list[nn.Module] = dataclasses.field(default_factory=list)
    """Layers of which they are the output channels."""
    norms: list[nn.Module] = dataclasses.field(default_factory=list)
    """Normalizations and depthwise convolutions on the way, which have something of each channel."""
    reads: list[Read] = dataclasses.field(default_factory=list)
    pinned: str = ""
    """Why they must stay."""


@dataclasses.dataclass
class Channels:
    """The channels of one tensor."""

    space: Space
    last: bool
    """True if they are the last dimension, of Linear and after flattening; else dimension 1."""
    span: int
    """How many features one channel has, after flattening."""
    value: Tensor  # [C]
    constant: Tensor  # bool [C], True where the channel is `value` everywhere


@dataclasses.dataclass
class Read:
    """A layer that has the channels of a space as its input channels."""

    layer: nn.Module
    channels: Channels


def takes_constants(layer: nn.Module) -> bool:
    """True if a constant input channel does the same as some number added to the bias."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return True
    return not any(layer.padding) if isinstance(layer.padding, tuple) else False


class ChannelFlow:
    """The spaces of a model.

    Args:
        graph: of `pyops.trace.trace`.
        modules: by qualified name.
        shapes: of what each node gives, where that is a tensor.
        refusals: for layers and normalizations that must not be changed, why.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        shapes: dict[fx.Node, tuple[int, ...]],
        refusals: dict[nn.Module, str],
    ) -> None:
        self.modules, self.shapes, self.refusals = modules, shapes, refusals
        self.spaces: list[Space] = []
        self.at: dict[fx.Node, Channels] = {}
        for node in graph.nodes:
            self._visit(node)

    # ------------------------------------------------------------------------------------------- nodes

    def _visit(self, node: fx.Node) -> None:
        known = [n for n in node.all_input_nodes if n in self.at]
        if node.op == "call_module" and isinstance(self.modules[node.target], LAYERS):
            self._layer(node, self.modules[node.target], known)
            return
        if not known:
            return
        result = None
        if not self._only_looks(node, known[0]):
            if node.op == "call_module":
                result = self._module(node, self.modules[node.target], known)
            elif node.op in ("call_function", "call_method"):
                result = self._function(node, node.target, known)
            if isinstance(result, Channels):
                self.at[node] = result
            else:
                self._pin(known, result or f"the channels go into {self._said(node)}")

    def _layer(self, node: fx.Node, layer: nn.Module, known: list[fx.Node]) -> None:
        refusal = self.refusals.get(layer, "")
        dims = {nn.Conv1d: 3, nn.Conv2d: 4}
        ndim = next((d for kind, d in dims.items() if isinstance(layer, kind)), None)
        shape = self.shapes.get(node, ())
        if getattr(layer, "groups", 1) > 1:
            fits = ndim == len(shape) and layer.groups == layer.in_channels == layer.out_channels and len(known) == 1
            if fits and not refusal and not self.at[known[0]].last:
                self.at[node] = self._depthwise(self.at[known[0]], layer)
                return
            refusal = refusal or f"{node.target} has groups, which keep their channels"
        elif ndim is not None and len(shape) != ndim:
            refusal = refusal or "the convolution is called without a batch"
        for source in known:
            channels = self.at[source]
            expected = channels.space.size * channels.span
            inputs = layer.in_features if ndim is None else layer.in_channels
            if refusal or channels.last is not (ndim is None) or expected != inputs:
                self._pin([source], refusal or f"the channels go into {self._said(node)} as something else")
            else:
                channels.space.reads.append(Read(layer, channels))
        if not shape:
            return
        kept, weight, bias = kept_weights(layer)[0], effective(layer, "weight"), effective(layer, "bias")
        space = Space(weight.shape[0], [layer], pinned=refusal)
        self.spaces.append(space)
        value = weight.new_zeros(space.size) if bias is None else bias.detach().clone()
        self.at[node] = Channels(space, ndim is None, 1, value, ~kept.flatten(1).any(1))

    def _module(self, node: fx.Node, module: nn.Module, known: list[fx.Node]) -> Channels | str:
        channels = self.at[known[0]]
        if len(known) > 1:
            return ""
        if any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")):
            return f"{node.target} has hooks"
        if getattr(module, "inplace", False) and self._used_again(known[0]):
            return f"{node.target} changes in place what is used again"
        kind = type(module)
        if kind in ELEMENTWISE:
            return self._mapped(channels, module.forward)
        if kind in DROPOUT:
            return self._only_zeros(channels) if module.training else channels
        if kind in BATCH_NORMS:
            return self._normalized(channels, node, module)
        if kind in MAX_POOL or kind in MEAN_POOL:
            if channels.last:
                return ""
            padding = getattr(module, "padding", 0)
            pads = any(padding) if isinstance(padding, tuple) else bool(padding)
            plain = not pads and not getattr(module, "ceil_mode", False)
            return channels if kind in MAX_POOL or plain else self._only_zeros(channels)
        if kind is nn.Flatten:
            return self._flattened(channels, node, known[0]) if (module.start_dim, module.end_dim) == (1, -1) else ""
        return ""

    def _function(self, node: fx.Node, target: Any, known: list[fx.Node]) -> Channels | str:
        source, channels = known[0], self.at[known[0]]
        changes = target is operator.iadd or getattr(target, "__name__", str(target)).endswith("_")
        changes = changes or bool(node.kwargs.get("inplace")) or any(a is True for a in node.args[1:])
        if changes and self._used_again(node.args[0]):
            return f"{self._said(node)} changes in place what is used again"
        if target in ADDITIONS:
            return self._added(node, known)
        if node.args[:1] != (source,) or len(known) > 1 or (len(node.all_input_nodes) > 1 and target not in FLATTENS):
            return ""
        if target in ELEMENTWISE_FUNCTIONS:
            return self._mapped(channels, lambda v: target(v, *node.args[1:], **node.kwargs))
        if target in ELEMENTWISE_METHODS:
            return (
                channels if target in ("contiguous", "clone") else self._mapped(channels, operator.methodcaller(target))
            )
        if target in DROPOUT_FUNCTIONS:
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            return self._only_zeros(channels) if training else channels
        if target in MAX_POOL_FUNCTIONS and not channels.last:
            return channels
        if target in MEAN_POOL_FUNCTIONS and not channels.last:
            return channels if target in MEAN_POOL_FUNCTIONS[2:] else self._only_zeros(channels)
        if target in FLATTENS:
            arguments = (*node.args[1:], *node.kwargs.values())
            fits = arguments == (1,) if target in FLATTENS[:2] else node.args[-1] == -1  # not a number that stays
            return self._flattened(channels, node, source) if fits else ""
        if target in (torch.mean, "mean"):
            return self._mean(channels, node, source)
        return ""

    # ------------------------------------------------------------------------------------------- what becomes of them

    @staticmethod
    def _mapped(channels: Channels, function: Callable[[Tensor], Tensor]) -> Channels:
        return dataclasses.replace(channels, value=function(channels.value.clone()))

    @staticmethod
    def _only_zeros(channels: Channels) -> Channels:
        return dataclasses.replace(channels, constant=channels.constant & (channels.value == 0))

    def _normalized(self, channels: Channels, node: fx.Node, norm: nn.Module) -> Channels | str:
        if norm in self.refusals:
            return self.refusals[norm]
        if channels.span > 1 or (channels.last and len(self.shapes.get(node, ())) != 2):
            return f"{node.target} normalizes something else than channels"
        channels.space.norms.append(norm)
        scale = (norm.running_var + norm.eps).rsqrt()
        weight, bias = effective(norm, "weight"), effective(norm, "bias")
        value = (channels.value - norm.running_mean) * (scale if weight is None else scale * weight)
        value = value if bias is None else value + bias
        return dataclasses.replace(channels, value=value.detach().to(channels.value.dtype))

    @staticmethod
    def _depthwise(channels: Channels, layer: nn.Module) -> Channels:
        channels.space.norms.append(layer)
        kept, weight, bias = kept_weights(layer)[0], effective(layer, "weight"), effective(layer, "bias")
        value = torch.where(channels.constant, channels.value * weight.flatten(1).sum(1), 0)
        unread = ~kept.flatten(1).any(1)
        constant = unread | (channels.constant & ((channels.value == 0) | takes_constants(layer)))
        value = torch.where(unread, 0, value)
        value = value if bias is None else value + bias
        return dataclasses.replace(channels, value=value.detach(), constant=constant)

    def _flattened(self, channels: Channels, node: fx.Node, source: fx.Node) -> Channels | str:
        before, after = self.shapes.get(source, ()), self.shapes.get(node, ())
        if len(after) != 2 or not before or after[0] != before[0] or (channels.last and len(before) != 2):
            return ""
        span = channels.span if channels.last else math.prod(before[2:])
        return dataclasses.replace(channels, last=True, span=span)

    def _mean(self, channels: Channels, node: fx.Node, source: fx.Node) -> Channels | str:
        ndim = len(self.shapes.get(source, ()))
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        if channels.last or ndim < 3 or {d % ndim for d in dims} != set(range(2, ndim)) or node.kwargs.get("dtype"):
            return ""
        return dataclasses.replace(channels, last=len(self.shapes[node]) != ndim)

    def _added(self, node: fx.Node, known: list[fx.Node]) -> Channels | str:
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        if len(operands) != 2 or len(node.args) != 2 or node.kwargs or any(n not in self.at for n in operands):
            return ""
        a, b = (self.at[n] for n in operands)
        same_shape = self.shapes.get(operands[0]) == self.shapes.get(operands[1]) is not None
        if not same_shape or (a.last, a.span, a.space.size) != (b.last, b.span, b.space.size):
            return ""
        self._unite(a.space, b.space)
        return dataclasses.replace(a, value=a.value + b.value, constant=a.constant & b.constant)

    def _unite(self, a: Space, b: Space) -> None:
        if a is b:
            return
        a.producers += b.producers
        a.norms += b.norms
        a.reads += b.reads
        a.pinned = a.pinned or b.pinned
        self.spaces.remove(b)
        for channels in (*self.at.values(), *(read.channels for space in self.spaces for read in space.reads)):
            if channels.space is b:
                channels.space = a

    # ------------------------------------------------------------------------------------------- what stops them

    def _pin(self, nodes: list[fx.Node], why: str) -> None:
        for node in nodes:
            space = self.at[node].space
            space.pinned = space.pinned or why

    def _only_looks(self, node: fx.Node, source: fx.Node) -> bool:
        """True if this node reads sizes of the tensor other than the number of its channels."""
        ndim, channels = len(self.shapes.get(source, ())), self.at[source]
        channel = ndim - 1 if channels.last else 1

        def harmless(index: Any) -> bool:
            return isinstance(index, int) and -ndim <= index < ndim and index % ndim != channel

        method = node.target if node.op == "call_method" else ""
        attribute = node.args[1] if node.op == "call_function" and node.target is getattr else ""
        if method == "dim" or attribute in ("ndim", "dtype", "device"):
            return True
        if method == "size" and len(node.args) == 2:
            return harmless(node.args[1])
        sizes = method == "size" or attribute == "shape"
        return sizes and all(u.target is operator.getitem and harmless(u.args[1]) for u in node.users)

    def _used_again(self, node: Any) -> bool:
        """True if something else may see what is written into this tensor, or into one whose memory it may share."""
        if not isinstance(node, fx.Node) or node not in self.at:
            return False
        looks = [user for user in node.users if self._only_looks(user, node)]
        if len(node.users) - len(looks) > 1:
            return True
        new = node.op == "call_module" and isinstance(self.modules[node.target], (*LAYERS, *BATCH_NORMS))
        return not new and any(self._used_again(source) for source in node.all_input_nodes)

    def _said(self, node: fx.Node) -> str:
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[node.target]).__name__})"
        return getattr(node.target, "__name__", str(node.target))
