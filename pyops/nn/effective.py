"""The tensors that a layer really computes with, where pruning or a reparametrization stands between.

`torch.nn.utils.prune`, the old `weight_norm` and `spectral_norm` keep `weight` as a plain attribute that a forward
pre-hook refreshes: after `load_state_dict` or an optimizer step it is stale until the next forward.
`torch.nn.utils.parametrize` computes `weight` at every access.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def effective(module: nn.Module, name: str) -> torch.Tensor | None:
    """`getattr(module, name)` as the next forward would see it."""
    original, mask = getattr(module, f"{name}_orig", None), getattr(module, f"{name}_mask", None)
    if original is not None and mask is not None:
        return original * mask.to(original.dtype)
    for hook in baked_hooks(module, name):
        if isinstance(hook, WeightNorm):
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm):
            return hook.compute_weight(module, do_power_iteration=False)
    return getattr(module, name)


def trainable(module: nn.Module, name: str) -> bool:
    """True if what `effective(module, name)` is made of is trained."""
    if parametrize.is_parametrized(module, name):
        return any(p.requires_grad for p in module.parametrizations[name].parameters())
    made_of = (module._parameters.get(key) for key in (name, f"{name}_orig"))
    return any(p is not None and p.requires_grad for p in made_of)


def baked_hooks(module: nn.Module, *names: str) -> list[object]:
    """Forward pre-hooks that do nothing but refresh one of these tensors (of PruningContainers: the container)."""
    refresh = (BasePruningMethod, WeightNorm, SpectralNorm)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, refresh) and _target(hook) in names]


def origin(module: nn.Module, name: str = "weight") -> str | None:
    """What stands between the stored and the effective tensor, in words; None if nothing does."""
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]
        return "parametrized by " + ", ".join(type(step).__name__ for step in chain)
    for hook in baked_hooks(module, name):
        return "pruned" if isinstance(hook, BasePruningMethod) else f"under {type(hook).__name__}"
    return None


def _target(hook: object) -> str:
    return getattr(hook, "_tensor_name", None) or getattr(hook, "name", "")
