"""What modules with a packed weight share in loading a state_dict: every entry is checked before any is taken."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyops.memory import has_values

EXTRA_STATE = "_extra_state"


def check_entry(
    key: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | tuple[torch.dtype, ...] | None
) -> str | None:
    """What is wrong with an entry of a state_dict, or None. `dtype` None allows any floating dtype."""
    return wrong_type(key, value, dtype) or wrong_value(key, value, shape, finite=dtype is not None)


def wrong_type(key: str, value: Any, dtype: torch.dtype | tuple[torch.dtype, ...] | None) -> str | None:
    """What is wrong with the type or dtype of a tensor, or None. `dtype` None allows any floating dtype."""
    if not isinstance(value, torch.Tensor):
        return f"{key} must be a tensor, got {type(value).__name__}."
    if dtype is None:
        return None if value.is_floating_point() else f"{key} has dtype {value.dtype}, expected a floating-point dtype."
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if value.dtype in allowed:
        return None
    float_layer = value.is_floating_point() and not any(a.is_floating_point and a.itemsize > 1 for a in allowed)
    hint = " This looks like the checkpoint of a float layer: load it before the layer is quantized."
    return f"{key} has dtype {value.dtype}, expected {' or '.join(map(str, allowed))}.{hint if float_layer else ''}"


def wrong_value(key: str, value: torch.Tensor, shape: tuple[int, ...], finite: bool) -> str | None:
    """What is wrong with the shape of a tensor, or, where `finite`, with its values; None if nothing is."""
    if tuple(value.shape) != shape:
        return f"size mismatch for {key}: got {tuple(value.shape)} from the checkpoint, the layer has {shape}."
    looked_at = finite and value.is_floating_point() and value.element_size() > 1  # torch cannot ask it of fp8
    if looked_at and has_values(value) and not bool(value.isfinite().all()):
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
