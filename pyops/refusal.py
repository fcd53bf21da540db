"""Which layers of a model cannot be replaced by one of ours, and why."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyops.nn.effective import baked_hooks, effective

PLAIN_WEIGHTS = (torch.Tensor, nn.Parameter, torch._subclasses.FakeTensor)


def layer_refusal(layer: nn.Module, base: type[nn.Module], dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a layer that is a `base` (nn.Linear, nn.Conv2d …) by type cannot be replaced; None if it can.

    It must compute what `base` computes, with a weight and a bias of these dtypes and nothing else.
    """
    if is_lazy(layer):
        return "not initialized yet: run the model once"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "its parent (nn.MultiheadAttention) reads the weight instead of calling the layer"
    for name in ("forward", "__call__", "_conv_forward"):
        if name in layer.__dict__ or getattr(type(layer), name, None) is not getattr(base, name, None):
            return f"{type(layer).__name__} has a {name} of its own"
    own = {key for key, value in layer._parameters.items() if value is not None} - {"weight", "bias"}
    own = {key for key in own if not is_baked(layer, key)} | (layer._modules.keys() - {"parametrizations"})
    if own:
        return f"holds more than a weight and a bias: {', '.join(sorted(own))}"
    weight, bias = effective(layer, "weight"), effective(layer, "bias")
    if weight is None:
        return "has no weight"
    if type(weight) not in PLAIN_WEIGHTS:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in dtypes or (bias is not None and bias.dtype not in dtypes):
        return f"{weight.dtype if bias is None else bias.dtype} is not supported"
    return None


def is_lazy(module: nn.Module) -> bool:
    """True for a lazy layer that has not seen its first input."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def is_baked(module: nn.Module, key: str) -> bool:
    """True if this parameter or buffer only serves to make the weight or bias: weight_orig, weight_mask, weight_g …"""
    return any(key.startswith(name + "_") and baked_hooks(module, name) for name in ("weight", "bias"))
