"""Fold eval-mode batch normalization into the layer before it.

    BN(y) = γ (y - μ) / √(σ² + ε) + β,   y = W x + b
          = (s W) x + s (b - μ) + β,     s = γ / √(σ² + ε), one per output channel

so the normalization costs nothing. The arithmetic is done in float64 and rounded once to the dtypes of the layer.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2; `torch.nn.utils.fusion` does one pair, into a copy and without
pruning.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import prune

from pyops.flow import Flow, find_flow, hooked, said
from pyops.measure import check_inputs
from pyops.nn.effective import baked_hooks, effective, origin
from pyops.trace import LAYERS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CHANNELS_AT_1 = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Linear: 2}
"""Dimensions of an output whose channels are where a normalization looks for them."""


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


def fold_batch_norm_(
    model: nn.Module, example_inputs: Any = None, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Fold]:
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
        filter_fn: called as filter_fn(layer, qualified_name) for the layer of each pair; False leaves both alone.

    Raises:
        TypeError for arguments of a wrong type. After any exception, also one of the model's own forward, nothing is
        folded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_inputs(example_inputs)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {type(filter_fn).__name__}")
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, _BatchNorm)]
    if not norms:
        return []
    flow = find_flow(
        model,
        example_inputs,
        lambda module: isinstance(module, (*LAYERS, _ConvTransposeNd)),
        lambda module: isinstance(module, _BatchNorm),
    )
    ties = _ties(model)
    rows, changes = [], []
    for bn in norms:
        layer, reason = _pair(bn, flow, names)
        if layer is not None and not reason:
            reason = fold_refusal(layer, bn) or _tied(layer, ties)
        if layer is not None and not reason and filter_fn is not None and not filter_fn(layer, names[layer]):
            reason = "filter_fn"
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
    if hooked(bn, inputs=True):
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
    if hooked(layer):
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


def _pair(bn: nn.Module, flow: Flow, names: dict[nn.Module, str]) -> tuple[nn.Module | None, str]:
    """(the layer before `bn` if there is one, why they cannot be folded or "")."""
    sources = list(dict.fromkeys(flow.sources.get(bn, [])))
    if not sources:
        return None, flow.unseen
    if len(sources) > 1:
        return None, f"called on several outputs: {', '.join(said(s, names) for s in sources)}"
    layer = sources[0]
    if isinstance(layer, str):
        return None, f"its input comes from {layer}"
    for module, it in ((bn, "it"), (layer, "the layer")):
        if flow.read_by(module):
            return layer, f"{it} is also used by {flow.read_by(module)}"
    others = [use for use in dict.fromkeys(flow.uses.get(layer, [])) if use is not bn]
    if others:
        return layer, f"the layer's output also goes to {', '.join(said(use, names) for use in others)}"
    wrong = flow.dims[bn] - {next((dims for kind, dims in CHANNELS_AT_1.items() if isinstance(layer, kind)), None)}
    if wrong and isinstance(layer, LAYERS):
        return layer, f"a {type(layer).__name__} whose output of {max(wrong)} dimensions has its channels elsewhere"
    return layer, ""


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
