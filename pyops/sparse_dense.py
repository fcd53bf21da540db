"""The dense side of a choice: the layer as it runs, in the other memory format, and what its time depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyops import tune
from pyops.measure import Captured
from pyops.nn.effective import effective, origin
from pyops.ops.sparse_packed import is_channels_last
from pyops.structure import Structure

OTHER_FORMATS = {"dense_channels_last": "channels_last", "dense_contiguous": "contiguous_format"}
"""Names of times of the dense layer in the memory format that the model does not give it."""


def dense_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer as it is; what prunes or parametrizes its weight at each call is not counted, it could be baked in."""
    if origin(module, "weight") is None and origin(module, "bias") is None:
        return module.forward  # not __call__: hooks belong to the model and shall not see these calls
    return _with_weight(module, effective(module, "weight").detach())


def other_format(module: nn.Module, captured: Captured) -> dict[str, Callable[[Any], torch.Tensor]]:
    """A Conv2d with its input and weight in the other memory format, by name; none where the two are one."""
    x = captured.x
    if not isinstance(module, nn.Conv2d) or x.dim() != 4 or not x.numel():
        return {}
    if x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return {}
    name = "dense_contiguous" if is_channels_last(x) else "dense_channels_last"
    form = getattr(torch, OTHER_FORMATS[name])
    image = x.contiguous(memory_format=form)
    forward = _with_weight(module, effective(module, "weight").detach().contiguous(memory_format=form))
    return {name: lambda _: forward(image)}


def key_of(module: nn.Module, captured: Captured) -> dict[str, Any]:
    """What the times of a dense layer depend on."""
    weight, x = effective(module, "weight"), captured.x
    return tune.machine(x.device) | {
        "kind": "linear" if isinstance(module, nn.Linear) else f"conv{weight.dim() - 2}d",
        "weight": [list(weight.shape), str(weight.dtype), _format(weight)],
        "bias": module.bias is not None,
        "window": [
            str(getattr(module, name, "")) for name in ("stride", "padding", "padding_mode", "dilation", "groups")
        ],
        "x": [list(x.shape), str(x.dtype), _format(x)],
        "autocast": str(captured.autocast),
    }


def sparse_key(key: Mapping[str, Any], found: Structure, int8: bool) -> dict[str, Any]:
    """The same and what those of its sparse forms depend on; sparsity and sizes are rounded to 1 %."""
    stored = {pattern: round(stored, 2) for pattern, stored in found.stored.items()}
    return {**key, "sparsity": round(found.sparsity, 2), "stored": stored, **({"int8": True} if int8 else {})}


def _with_weight(module: nn.Module, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = effective(module, "bias")
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    return lambda x: module._conv_forward(x, weight, bias)


def _format(t: torch.Tensor) -> str:
    if t.is_contiguous():
        return "contiguous"
    return "channels_last" if t.dim() == 4 and is_channels_last(t) else f"strides {t.stride()}"
