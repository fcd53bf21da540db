"""Which weights of a pruned layer are kept, by the mask that each pruning library leaves in the module."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

BARE_MASKS = ("__weight_mma_mask", "mask", "binary_mask")
"""Bool buffers beside a weight that has its zeros already: apex ASP, SparseML, nncf."""


def find_mask(module: nn.Module, name: str = "weight") -> torch.Tensor | None:
    """The kept positions of `module`'s tensor `name`, bool of its shape; None if the module holds no mask for it.

    Found are: the buffer `<name>_mask` of `torch.nn.utils.prune`; tensors `mask` of parametrizations, such as
    `torch.ao.pruning.FakeSparsity`; and for `weight` the bool buffers `__weight_mma_mask`, `mask` and `binary_mask`. Of
    several, what all of them keep.
    """
    found = [getattr(module, f"{name}_mask", None)]
    if parametrize.is_parametrized(module, name):
        found += [getattr(step, "mask", None) for step in module.parametrizations[name]]
    if name == "weight":
        bare = (module._buffers.get(key) for key in BARE_MASKS)
        found += [mask for mask in bare if mask is not None and mask.dtype == torch.bool]
    shape = _shape(module, name)
    masks = [mask != 0 for mask in found if isinstance(mask, torch.Tensor) and mask.shape == shape]
    if not masks:
        return None
    kept = masks[0]
    for mask in masks[1:]:
        kept = kept & mask
    return kept.detach()


def _shape(module: nn.Module, name: str) -> torch.Size:
    original = getattr(module, f"{name}_orig", None)
    return (original if original is not None else getattr(module, name)).shape
