"""Masks of pruned parameters: given by parameter, or found in a module that `torch.nn.utils.prune` has pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyops.optim.distributed import local, shard_as

SUFFIX = ("_mask", "_orig")
"""Of the buffer and the parameter into which `torch.nn.utils.prune` splits a weight."""


def masks_of(model: nn.Module, zeros: bool = False) -> dict[Tensor, Tensor]:
    """{parameter: mask} of `model`, for the argument `masks` of an optimizer.

    Takes every `<name>_orig` that `torch.nn.utils.prune` has pruned, with its `<name>_mask`. With `zeros`, also the
    zeros of every other parameter of two or more dimensions that contains some and is not all zero, for models after
    `prune.remove` (biases and layers that start at zero are meant to leave it).
    """
    found = dict(_pruned(list(model.modules())))
    if zeros:
        for p in model.parameters():
            if p not in found and p.dim() > 1:
                mask = p.detach() != 0
                if not mask.all() and mask.any():
                    found[p] = mask
    return found


def _pruned(modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    mask_end, orig_end = SUFFIX
    found = []
    for module in modules:
        buffers = module._buffers
        if buffers:
            for name, mask in buffers.items():
                if name.endswith(mask_end):
                    p = module._parameters.get(name[: -len(mask_end)] + orig_end)
                    if p is not None and mask is not None:
                        found.append((p, mask))
    return found


class Masks:
    """The masks of an optimizer, each as uint8 of its parameter's strides and device.

    A copy is made anew when another tensor takes the mask's place, or the mask is changed in place.
    """

    def __init__(self, source: Mapping[Tensor, Tensor] | nn.Module | None) -> None:
        self._modules: list[nn.Module] | None = None
        self._given: dict[Tensor, Tensor] = {}
        self._copies: dict[Tensor, tuple[Tensor, int, Tensor]] = {}  # mask, its version, the copy
        self._settled: dict[Tensor, Tensor] = {}
        if isinstance(source, nn.Module):
            self._modules = list(source.modules())
        elif isinstance(source, Mapping):
            for p, mask in source.items():
                _check(p, mask)
            self._given = dict(source)
        elif source is not None:
            raise TypeError(f"masks is a {type(source).__name__}; allowed: a mapping of parameters to masks, a module")
        self.refresh()

    def __bool__(self) -> bool:
        """True if some parameter has a mask, or may come to have one: a module can still be pruned."""
        return self._modules is not None or bool(self._given)

    def refresh(self) -> None:
        """Look up what is pruned in the module, which pruning again replaces."""
        if self._modules is not None:
            self._given = dict(_pruned(self._modules))

    def settle(self, params: list[Tensor]) -> None:
        """Say that the averages of these parameters are zero where they are masked now."""
        for p in params:
            if p in self._copies:
                self._settled[p] = self._copies[p][2]

    def unsettle(self) -> None:
        """Say that other averages may have been loaded."""
        self._settled.clear()

    def get(self, p: Tensor) -> tuple[Tensor | None, bool]:
        """(the mask of p's local elements or None, True if p's average may not be zero where it is masked)."""
        mask = self._given.get(p)
        if mask is None:
            return None, False
        old = self._copies.get(p)
        if old is not None and old[0] is mask and old[1] == mask._version and old[2].device == p.device:
            return old[2], self._settled.get(p) is not old[2]
        if self._modules is not None:
            _check(p, mask, values=False)  # made by torch, and reading the values would wait for the device
        values = shard_as(mask.detach(), p).to(p.device) != 0
        here = local(p).detach()
        if here.is_complex():
            here, values = torch.view_as_real(here), values.unsqueeze(-1)
        copy = torch.empty_like(here, dtype=torch.uint8, memory_format=torch.preserve_format).copy_(values)
        self._copies[p] = mask, mask._version, copy
        return copy, True

    def __getstate__(self) -> dict[str, Any]:
        """As they are now: the module would take its activations' graph along, which cannot be copied."""
        self.refresh()
        masks = {p: mask.detach() for p, mask in self._given.items()}
        return {"_modules": None, "_given": masks, "_copies": {}, "_settled": {}}


def _check(p: Any, mask: Any, values: bool = True) -> None:
    if not isinstance(p, Tensor) or not isinstance(mask, Tensor):
        raise TypeError(f"masks maps {type(p).__name__} to {type(mask).__name__}; allowed: parameters to tensors")
    if mask.shape != p.shape:
        raise ValueError(f"masks: a mask is {tuple(mask.shape)}, its parameter {tuple(p.shape)}")
    if mask.is_complex():
        raise TypeError(f"masks: a mask is {mask.dtype}; allowed: bool, or 0 and 1 of any real dtype")
    if values and mask.dtype != torch.bool and not local((mask == 0) | (mask == 1)).all():
        raise ValueError("masks: a mask holds something else than 0 and 1")
