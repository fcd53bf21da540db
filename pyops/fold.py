"""Fold eval-mode batch normalization into the layer before it.

    BN(y) = γ (y - μ) / √(σ² + ε) + β,   y = W x + b
          = (s W) x + s (b - μ) + β,     s = γ / √(σ² + ε), one per output channel

so the normalization costs nothing. The arithmetic is done in float64 and rounded once to the dtypes of the layer.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2; `torch.nn.utils.fusion` does one pair, into a copy and without
pruning.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from pyops.measure import call, check_inputs, evaluating
from pyops.nn.effective import baked_hooks, effective, origin
from pyops.trace import LAYERS, owners, trace

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclasses.dataclass(frozen=True)
class Fold:
    """One batch normalization of a model: what became of it."""

    batch_norm: str
    """Its qualified name; under several names the first."""
    layer: str | None
    """The layer before it, where that is known."""
    folded: bool
    reason: str
    """Why it was left alone, or what else changed; "" if there is nothing to say."""


def fold_batch_norm_(model: nn.Module, example_inputs: Any = None) -> list[Fold]:
    """Fold each BatchNorm1d/2d into the Conv1d, Conv2d or Linear whose output it takes; a row for each of them.

    In place: the layer keeps its Parameters, scaled, and gets a bias if it had none; `nn.Identity` takes the place of
    the normalization. Zeros of a weight stay zeros; one pruned by `torch.nn.utils.prune` stays pruned, by the same
    mask. A pruned bias is baked, since what is folded into it is not zero.

    A pair is folded where everything that the layer gives goes into this normalization, and nothing else does. That is
    read from a trace by `torch.fx`. Of a model that fx cannot trace, it is watched while the model runs once on
    `example_inputs`, in eval mode and without gradients; without example inputs, only neighbours in an `nn.Sequential`
    are seen. What the model does with other inputs, or when its methods other than forward are called, none of them
    can see. A Linear is taken to give [N, F], not [N, L, F], unless the model is run.

    Args:
        model: any module. Call `model.eval()` before: a normalization in training mode is left alone.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`.

    Raises:
        TypeError for arguments of a wrong type. After any exception, also one of the model's own forward, nothing is
        folded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_inputs(example_inputs)
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, _BatchNorm)]
    if not norms:
        return []
    flow, unseen = _flow(model, example_inputs)
    ties = _ties(model)
    rows, changes = [], []
    for bn in norms:
        layer, reason = _pair(bn, flow, names, unseen)
        if layer is not None and not reason:
            reason = fold_refusal(layer, bn) or _tied(layer, ties)
        if layer is not None and not reason:
            new, reason = _folded(layer, bn)
            if new is not None:
                changes.append((layer, bn, new))
                note = "its pruned bias is baked" if "bias_orig" in layer._parameters else ""
                rows.append(Fold(names[bn], names[layer], True, note))
                continue
        rows.append(Fold(names[bn], None if layer is None else names[layer], False, reason))
    for layer, _, new in changes:
        _assign(layer, *new)
    replaced = {bn: nn.Identity().train(bn.training) for _, bn, _ in changes}
    for parent in names:
        for key, child in parent._modules.items():
            if child in replaced:
                parent._modules[key] = replaced[child]
    return rows


def fold_into(layer: nn.Module, bn: nn.Module) -> None:
    """Fold one normalization into one layer, in place: layer(x) is bn(layer(x)) from now on; `bn` is unchanged.

    Raises:
        ValueError with the reason if they cannot be folded; the layer is unchanged then.
    """
    reason = fold_refusal(layer, bn)
    new = None
    if reason is None:
        new, reason = _folded(layer, bn)
    if new is None:
        raise ValueError(f"cannot fold {type(bn).__name__} into {type(layer).__name__}: {reason}")
    _assign(layer, *new)


def scale_and_bias(bn: _BatchNorm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale [O] of the weight's output channels, new bias [O]), float64, of a layer with this bias before `bn`."""
    mean, var = bn.running_mean.double(), bn.running_var.double()
    scale = (var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -mean if bias is None else bias.double() - mean
    new_bias = shift * scale
    if bn.bias is not None:
        new_bias = new_bias + bn.bias.double()
    return scale, new_bias


def fold_refusal(layer: nn.Module, bn: nn.Module) -> str | None:
    """Why this normalization cannot be folded into this layer, which gives its input; None if it can."""
    return _norm_refusal(bn) or _layer_refusal(layer, bn)


def _norm_refusal(bn: nn.Module) -> str | None:
    if isinstance(bn, LazyModuleMixin) and bn.has_uninitialized_params():
        return "not initialized yet: run the model once"
    if not isinstance(bn, NORMS):
        return f"{type(bn).__name__} is not supported"
    if "forward" in bn.__dict__ or type(bn).forward is not _BatchNorm.forward:
        return f"{type(bn).__name__} has a forward of its own"
    if bn.training:
        return "in training mode: call eval() first"
    if bn.running_mean is None or bn.running_var is None:
        return "has no running statistics"
    if any(origin(bn, name) for name in ("weight", "bias")):
        return "its weight or bias is parametrized"
    if _hooks(bn):
        return "has hooks, which nn.Identity would not call in the same way"
    return None


def _layer_refusal(layer: nn.Module, bn: nn.Module) -> str | None:
    kind = type(layer)
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, LAYERS):
        return f"{kind.__name__} before it is not supported"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "the layer is not initialized yet: run the model once"
    for name in ("weight", "bias"):
        made = origin(layer, name)
        if made not in (None, "pruned"):
            return f"the layer's {name} is {made}"
    # Of a parametrized layer the class is made up, so that question came first.
    if "forward" in layer.__dict__ or kind.forward not in {base.forward for base in LAYERS}:
        return f"{kind.__name__} has a forward of its own"
    extra = [key for key in layer._modules if layer._modules[key] is not None]
    if extra:
        return f"the layer holds other modules: {', '.join(extra)}"
    if _hooks(layer):
        return "the layer has hooks that see its output"
    weight = _stored(layer, "weight")
    if weight is None or (layer.bias is not None and _stored(layer, "bias") is None):
        return "the layer's weight or bias is no Parameter"
    if not weight.is_floating_point() or weight.is_inference():
        return f"the layer's weight is {weight.dtype}" + ", made in inference mode" * weight.is_inference()
    if weight.shape[0] != bn.num_features:
        return f"it normalizes {bn.num_features} channels, the layer gives {weight.shape[0]}"
    return None


def _stored(layer: nn.Module, name: str) -> nn.Parameter | None:
    """The Parameter that holds the weight or bias, with pruning the one under the mask."""
    return layer._parameters.get(f"{name}_orig", layer._parameters.get(name))


def _hooks(module: nn.Module) -> bool:
    """True if hooks see the module's output or gradients; of a normalization also its input."""
    names = ["_forward_hooks", "_backward_hooks", "_backward_pre_hooks"]
    names += ["_forward_pre_hooks"] if isinstance(module, _BatchNorm) else []
    return any(module.__dict__.get(name) for name in names)


def _ties(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter, by its identity; names of a module that is found twice count once."""
    ties: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ties[id(parameter)].append(f"{module_name}.{name}".lstrip("."))
    return ties


def _tied(layer: nn.Module, ties: dict[int, list[str]]) -> str:
    for parameter in layer._parameters.values():
        if parameter is not None and len(ties[id(parameter)]) > 1:
            return f"the layer's parameters are shared: {', '.join(ties[id(parameter)])}"
    return ""


# ------------------------------------------------------------------------------------------- arithmetic of one pair


def _folded(layer: nn.Module, bn: _BatchNorm) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """((weight or weight_orig, bias), "") after folding, or (None, why not)."""
    with torch.inference_mode(False), torch.no_grad():
        bias = effective(layer, "bias")
        scale, new_bias = scale_and_bias(bn, bias)
        old = _stored(layer, "weight")
        scale = scale.to(old.device).view(-1, *[1] * (old.dim() - 1))
        weight = (old.double() * scale).to(old.dtype)
        new_bias = new_bias.to(old.device, old.dtype if bias is None else bias.dtype)
    if not old.is_meta and not (weight.isfinite().all() and new_bias.isfinite().all()):
        return None, f"the folded weight or bias would not be finite in {old.dtype}"
    return (weight, new_bias), ""


@torch.no_grad()
def _assign(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    if "bias_orig" in layer._parameters:
        prune.remove(layer, "bias")
    old = _stored(layer, "weight")
    old.copy_(weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias, requires_grad=old.requires_grad)
    else:
        layer.bias.copy_(bias)
    for hook in baked_hooks(layer, "weight"):
        hook(layer, ())  # `.weight` of a pruned layer is stale until then


# ------------------------------------------------------------------------------------------- what goes where


LOOKS = frozenset({"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point"})
"""Methods that only look at a tensor's form, which a fold does not change."""
FORM = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"})
"""Attributes that are part of it."""


class Flow:
    """What is seen of a model: modules, or words for what is no module."""

    def __init__(self) -> None:
        self.uses: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        """For each layer, what takes its outputs."""
        self.sources: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        """For each normalization, what gives its inputs."""
        self.reads: dict[nn.Module, list[str]] = defaultdict(list)
        """For each module, what uses it in other ways than calling it."""


def _flow(model: nn.Module, example_inputs: Any) -> tuple[Flow, str]:
    """(the flow, what to say of a normalization that is not in it)."""
    try:
        return _traced(model), "never called by the model's forward"
    except Exception as error:  # whatever a model's own code raises on fx's proxies
        failure = f"{type(error).__name__}: {error}".strip().split("\n")[0][:100]
    if example_inputs is not None:
        return _watched(model, example_inputs), "not called with these example_inputs"
    return _neighbours(model), f"the model cannot be traced ({failure}): give example_inputs"


def _pair(bn: nn.Module, flow: Flow, names: dict[nn.Module, str], unseen: str) -> tuple[nn.Module | None, str]:
    """(the layer before `bn` if there is one, why they cannot be folded or "")."""
    sources = list(dict.fromkeys(flow.sources.get(bn, [])))
    if not sources:
        return None, unseen
    if len(sources) > 1:
        return None, f"called on several outputs: {', '.join(_said(s, names) for s in sources)}"
    layer = sources[0]
    if isinstance(layer, str):
        return None, f"its input comes from {layer}"
    for module, said in ((bn, "it"), (layer, "the layer")):
        if flow.reads.get(module):
            return layer, f"{said} is also used by {', '.join(dict.fromkeys(flow.reads[module]))}"
    others = [use for use in dict.fromkeys(flow.uses.get(layer, [])) if use is not bn]
    if others:
        return layer, f"the layer's output also goes to {', '.join(_said(use, names) for use in others)}"
    return layer, ""


def _said(what: nn.Module | str, names: dict[nn.Module, str]) -> str:
    return what if isinstance(what, str) else f"{names[what]} ({type(what).__name__})"


def _traced(model: nn.Module) -> Flow:
    graph = trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    owned = owners(model)
    flow = Flow()

    def described(node: fx.Node) -> nn.Module | str:
        if node.op == "call_module":
            return modules[node.target]
        said = {"output": "the model's output", "placeholder": f"the model's input {node.target}"}
        return said.get(node.op, getattr(node.target, "__name__", str(node.target)))

    for node in graph.nodes:
        users = [user for user in node.users if not _only_looks(user)]
        if node.op == "call_module":
            module = modules[node.target]
            flow.uses[module] += [described(user) for user in users]
            if isinstance(module, _BatchNorm):
                flow.sources[module] += [described(source) for source in node.all_input_nodes]
        elif node.op == "get_attr" and users:
            parent, _, name = node.target.rpartition(".")
            owner = owned.get(id(getattr(modules.get(parent), name, None)))
            if owner is not None:
                flow.reads[owner].append(f"code that reads {node.target}")
    return flow


def _only_looks(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in FORM
    return node.op == "call_method" and node.target in LOOKS


def _neighbours(model: nn.Module) -> Flow:
    """Children of an `nn.Sequential` feed one another; what any other module does with its children is unknown."""
    flow = Flow()
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None]
        if type(parent).forward is not nn.Sequential.forward or "forward" in parent.__dict__:
            for child in children:
                flow.reads[child].append(f"a {type(parent).__name__} that holds it")
            continue
        for first, second in itertools.pairwise(["the input of a Sequential", *children, "the end of a Sequential"]):
            if isinstance(first, nn.Module):
                flow.uses[first].append(second)
            if isinstance(second, _BatchNorm):
                flow.sources[second].append(first)
    return flow


class _Watch(TorchFunctionMode):
    """Sees what every torch function is given, while hooks see what every module is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.owners = owners(model)
        self.made: dict[int, tuple[TensorWeakRef, nn.Module]] = {}  # by id, which is only good while the tensor lives
        self.inside: list[nn.Module] = []
        """Layers and normalizations that run at this moment, the innermost last."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        looks = name in LOOKS or (name == "__get__" and getattr(func.__self__, "__name__", "") in FORM)
        for tensor in () if looks else tree_leaves((args, kwargs)):
            maker, owner = self.maker(tensor), self.owners.get(id(tensor))
            if maker is not None:
                self.flow.uses[maker].append(self.inside[-1] if self.inside else name)
            if owner is not None and owner not in self.inside:
                self.flow.reads[owner].append(f"code that reads its tensors in {name}")
        return func(*args, **kwargs)

    def maker(self, tensor: Any) -> nn.Module | None:
        """The layer whose output this very tensor is."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self.made:
            return None
        ref, layer = self.made[id(tensor)]
        return layer if ref() is tensor else None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of layers and normalizations, ahead of the hooks that read the module's own tensors."""
        self.inside.append(module)
        if isinstance(module, _BatchNorm):
            x = args[0] if args else kwargs.get("input")
            layer = self.maker(x)
            if layer is None:
                self.flow.sources[module].append("something else than a layer")
                return
            self.flow.uses[layer].append(module)
            channels_at_1 = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Linear: 2}
            wrong = any(isinstance(layer, kind) and x.dim() != dims for kind, dims in channels_at_1.items())
            form = f"a {type(layer).__name__} whose output of {x.dim()} dimensions has its channels elsewhere"
            self.flow.sources[module].append(form if wrong else layer)

    def after(self, module: nn.Module, args: tuple, y: Any) -> None:
        """Forward hook of the same, also called after an exception."""
        self.inside.pop()
        if isinstance(y, Tensor) and not isinstance(module, _BatchNorm):
            self.made[id(y)] = TensorWeakRef(y), module

    def kept(self) -> list[nn.Module]:
        """Layers with an output that somebody still holds."""
        gc.collect()  # frames in cycles hold tensors too
        return [layer for ref, layer in self.made.values() if ref() is not None]


def _watched(model: nn.Module, example_inputs: Any) -> Flow:
    watch, handles = _Watch(model), []
    for module in model.modules():
        if isinstance(module, (*LAYERS, _ConvTransposeNd, _BatchNorm)):
            handles.append(module.register_forward_pre_hook(watch.before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.after, always_call=True))
    try:
        with evaluating(model), watch:
            result = call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in watch.kept():
        watch.flow.uses[layer].append("the model's result, or an attribute that keeps it")
    del result  # held until here, whatever its type is
    return watch.flow
