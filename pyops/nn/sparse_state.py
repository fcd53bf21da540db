"""Reads a sparse layer's entries of a state_dict, in whatever form they come, and says what is wrong with them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from pyops.memory import has_values
from pyops.nn.masks import BARE_MASKS
from pyops.ops.sparse_weight import (
    BLOCKS,
    PATTERNS,
    SparseWeight,
    check_block_mask,
    check_structure,
    is_2_4,
    scatter_blocks,
)

CANONICAL = ("values", "crow_indices", "col_indices")
IGNORED = ("__weight_mma_pruned_p",)
"""What apex ASP keeps to undo the pruning."""

NO_FAKE_SPARSITY = " (The masks of torch.ao.pruning are not in a state_dict: call squash_mask() before saving.)"


@dataclasses.dataclass
class Found:
    """What a state_dict holds for one layer.

    `tensors` has what is right, by canonical names; `used` the names that were read; `stands_for` the canonical names
    that need not be there beside them.
    """

    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    stands_for: set[str] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)


def read(
    state: Mapping[str, Any],
    prefix: str,
    dense_shape: tuple[int, ...],
    shape: tuple[int, int, int, int],
    groups: int,
    pattern: str,
    bias: bool,
) -> Found:
    """The entries below `prefix` for a layer of this weight; a dense weight with zeros is stored in `pattern`."""
    found = Found()
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if any(name in own for name in (*CANONICAL, "block_mask")):
        _read_canonical(own, prefix, shape, groups, found)
    else:
        _read_dense_weight(own, prefix, dense_shape, shape, groups, pattern, found)
    if bias:
        tensor, _ = _dense(own, prefix, "bias", (shape[0],), found)
        if tensor is not None:
            found.tensors["bias"] = tensor
            found.stands_for.add("bias")
    return found


def _read_canonical(own: dict, prefix: str, shape: tuple, groups: int, found: Found) -> None:
    entries = {name: own[name] for name in (*CANONICAL, "block_mask") if name in own}
    found.used |= entries.keys()
    lacking = [name for name in CANONICAL if name not in entries]
    if lacking:
        found.problems.append(
            f"{prefix}{next(iter(entries))} comes without {prefix}{lacking[0]}; they are loaded together or not at all."
        )
        return
    not_tensors = [name for name, value in entries.items() if not isinstance(value, torch.Tensor)]
    for name in not_tensors:
        found.problems.append(f"{prefix}{name} must be a tensor, got {type(entries[name]).__name__}.")
    if not_tensors:
        return
    values, crow, col = (entries[name] for name in CANONICAL)
    if not values.is_floating_point():
        found.problems.append(f"{prefix}values has dtype {values.dtype}, expected a floating-point dtype.")
    elif values.dim() != 3 or tuple(values.shape[1:]) not in BLOCKS:
        allowed = ", ".join(f"{bo}x{bc}" for bo, bc in BLOCKS)
        found.problems.append(
            f"{prefix}values has shape {tuple(values.shape)}, expected [B, bo, bc] in blocks bo x bc of {allowed}."
        )
    else:
        block = tuple(values.shape[1:])
        try:
            check_structure(values.shape, crow, col, shape, block, groups)
            check_block_mask(values, crow, col, entries.get("block_mask"), shape, block, groups)
        except ValueError as error:
            found.problems.append(f"{prefix}{error}.")
        else:
            found.tensors.update(entries)


def _read_dense_weight(
    own: dict, prefix: str, dense_shape: tuple, shape: tuple, groups: int, pattern: str, found: Found
) -> None:
    weight, mask = _dense(own, prefix, "weight", dense_shape, found)
    if found.used:
        found.stands_for |= {*CANONICAL, "block_mask"}
    if weight is None:
        return
    for name in BARE_MASKS:
        bare = own.get(name)
        if isinstance(bare, torch.Tensor) and bare.dtype == torch.bool and bare.shape == weight.shape:
            kept = bare.to(weight.device) | (weight != 0)  # never less than the layer computes with
            mask = kept if mask is None else mask & kept
            found.used.add(name)
    found.used |= own.keys() & set(IGNORED)
    mask = None if mask is None else mask.reshape(shape)
    try:
        sparse = SparseWeight.from_dense(weight.reshape(shape), mask, pattern=pattern, groups=groups)
    except ValueError as error:
        found.problems.append(f"{prefix}weight: {error}.")
        return
    found.tensors.update(values=sparse.values, crow_indices=sparse.crow_indices, col_indices=sparse.col_indices)
    if sparse.block_mask is not None:
        found.tensors["block_mask"] = sparse.block_mask


def _dense(
    own: dict, prefix: str, name: str, shape: tuple[int, ...], found: Found
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A tensor and its mask: plain, or as `torch.nn.utils.prune` or a parametrization stores it; None if not there."""
    original = f"parametrizations.{name}.original"
    if name in own:
        key, mask_keys = name, []
    elif f"{name}_orig" in own:
        key, mask_keys = f"{name}_orig", [f"{name}_mask"]
    elif original in own:
        steps = re.compile(rf"parametrizations\.{name}\.\d+\.mask")
        key = original
        mask_keys = [entry for entry in own if steps.fullmatch(entry)] or [f"parametrizations.{name}.0.mask"]
    else:
        return None, None
    found.used |= {key, *mask_keys}
    before = len(found.problems)
    _check(own, prefix, key, shape, found.problems)
    for mask_key in mask_keys:
        if mask_key not in own:
            hint = NO_FAKE_SPARSITY if key == original else ""
            found.problems.append(f"{prefix}{key} comes without {prefix}{mask_key}.{hint}")
        else:
            _check(own, prefix, mask_key, shape, found.problems)
    if len(found.problems) > before:
        return None, None
    tensor, mask = own[key].detach(), None
    for mask_key in mask_keys:
        kept = own[mask_key].to(tensor.device) != 0
        mask = kept if mask is None else mask & kept
    return (tensor if mask is None else torch.where(mask, tensor, 0)), mask


def _check(own: dict, prefix: str, key: str, shape: tuple[int, ...], problems: list[str]) -> None:
    value, is_mask = own[key], key.endswith("mask")
    if not isinstance(value, torch.Tensor):
        problems.append(f"{prefix}{key} must be a tensor, got {type(value).__name__}.")
    elif not (value.is_floating_point() or is_mask):
        problems.append(f"{prefix}{key} has dtype {value.dtype}, expected a floating-point dtype.")
    elif tuple(value.shape) != tuple(shape):
        problems.append(
            f"size mismatch for {prefix}{key}: got {tuple(value.shape)} from the checkpoint, the layer has {shape}."
        )


def pattern_of(found: Found, shape: tuple[int, int, int, int], groups: int, pattern: str) -> str:
    """The pattern that a layer of `pattern` has once it holds what was found: its own where that fits."""
    values, crow, col = (found.tensors[name].detach() for name in CANONICAL)
    block = tuple(values.shape[1:])
    if PATTERNS[pattern] == block:
        kept = torch.ones_like(values, dtype=torch.bool)
        if pattern != "2:4" or not has_values(col) or is_2_4(scatter_blocks(kept, crow, col, shape, block, groups)):
            return pattern
    return next(name for name, of in PATTERNS.items() if of == block)
