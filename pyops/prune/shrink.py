"""Take channels out of one layer or normalization, with its masks and statistics, so that it can be undone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyops.nn.effective import baked_hooks
from pyops.nn.masks import BARE_MASKS
from pyops.ops.sparse_packed import is_channels_last

SIZES = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
}
SHRINK = frozenset(
    {*BARE_MASKS, "running_mean", "running_var"}
    | {f"{name}{suffix}" for name in ("weight", "bias") for suffix in ("", "_orig", "_mask")}
)
"""The tensors that have a layer's channels; what else a module may hold is not known to."""


def shrink(module: nn.Module, dim: int, left: Tensor, extra_bias: Tensor | None = None) -> None:
    """Keep these channels: output channels or features of a normalization (dim 0), or input channels (dim 1).

    Every parameter and buffer that has them is replaced by a smaller one, masks included. `extra_bias` [O] is added to
    the bias, which is made if there is none.
    """
    names = next(names for kind, names in SIZES.items() if isinstance(module, kind))
    before = getattr(module, names[dim])
    for tensors in (module._parameters, module._buffers):
        for key, old in tensors.items():
            if key in SHRINK and old is not None and old.dim() > dim and old.shape[dim] == before:
                tensors[key] = _like(old, old.detach().index_select(dim, left.to(old.device)))
    setattr(module, names[dim], left.numel())
    if getattr(module, "groups", 1) > 1:  # depthwise
        module.in_channels = module.groups = left.numel()
    if extra_bias is not None:
        bias, weight = module._parameters["bias"], next(p for p in module._parameters.values() if p is not None)
        new = extra_bias if bias is None else bias.detach().double() + extra_bias
        module._parameters["bias"] = _like(weight if bias is None else bias, new)
    for hook in baked_hooks(module, "weight", "bias"):
        hook(module, ())  # `.weight` of a pruned layer is stale until then


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.to(old.dtype)
    if old.dim() == 4 and new.dim() == 4 and is_channels_last(old):
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
