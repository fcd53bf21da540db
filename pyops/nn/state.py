"""What modules with a packed weight share in loading a state_dict: every entry is checked before any is taken."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

EXTRA_STATE = "_extra_state"


def check_entry(key: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> str | None:
    """What is wrong with an entry of a state_dict, or None. `dtype` None allows any floating dtype."""
    if not isinstance(value, torch.Tensor):
        return f"{key} must be a tensor, got {type(value).__name__}."
    if dtype is None and not value.is_floating_point():
        return f"{key} has dtype {value.dtype}, expected a floating-point dtype."
    if dtype is not None and value.dtype != dtype:
        hint = " This looks like the checkpoint of a float layer: load it before the layer is quantized."
        return f"{key} has dtype {value.dtype}, expected {dtype}.{hint if value.is_floating_point() else ''}"
    if tuple(value.shape) != shape:
        return f"size mismatch for {key}: got {tuple(value.shape)} from the checkpoint, the layer has {shape}."
    if dtype is torch.float32 and _has_values(value) and not bool(value.isfinite().all()):
        return f"{key} holds NaN or Inf."
    return None


@contextlib.contextmanager
def load_hooks_run(module: nn.Module, *args: Any) -> Iterator[None]:
    """Run the hooks before loading now, as they may rename keys that are to be checked; and once, so not again inside.

    `args` are those of `_load_from_state_dict`.
    """
    hooks, module._load_state_dict_pre_hooks = module._load_state_dict_pre_hooks, OrderedDict()
    try:
        for hook in hooks.values():
            hook(*args)
        yield
    finally:
        module._load_state_dict_pre_hooks = hooks


def own_keys(module: nn.Module, prefix: str, also: Iterable[str] = ("weight",)) -> list[str]:
    """The keys of `module` alone, without its children, in a state_dict; `also` are no parameters or buffers."""
    return [prefix + name for name in _names(module, also)]


def foreign_keys(
    module: nn.Module, state_dict: Iterable[str], prefix: str, also: Iterable[str] = ("weight",)
) -> list[str]:
    """Keys below `prefix` that neither `module` nor one of its children owns."""
    names = {*_names(module, also), EXTRA_STATE}
    found = []
    for key in state_dict:
        if key.startswith(prefix):
            name, _, rest = key[len(prefix) :].partition(".")
            if name not in names and not (rest and name in module._modules):
                found.append(key)
    return found


def _names(module: nn.Module, also: Iterable[str]) -> list[str]:
    names = list(also)
    for key, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and key not in module._non_persistent_buffers_set:
            names.append(key)
    return names


def _has_values(t: torch.Tensor) -> bool:
    """False for tensors that have a shape only: on meta, or fake."""
    return not t.is_meta and not isinstance(t, torch._subclasses.FakeTensor)
