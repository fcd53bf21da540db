"""From which sparsity on a layer that stays dense would be faster sparse.

The time of a sparse layer is taken to be linear in what it keeps, t = a + b · (1 - sparsity), through two measured
points: its own mask, and one that keeps a quarter of its blocks. That is an estimate: caches make it bend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pyops import measure
from pyops.choose import DENSE
from pyops.measure import Captured
from pyops.ops.sparse_weight import PATTERNS, full_structure, scatter_blocks
from pyops.structure import Structure, as_4d

THINNED, BLOCKED = "thinned", "blocked"
"""Names of times: a quarter of the blocks of the best format; the layer's sparsity in blocks of 16 output channels."""
LEFT = 0.25
MAX_MS = 100.0
"""A layer of which one call takes longer is not measured twice more only to give an advice."""


def best_pattern(ms: Mapping[str, float], found: Structure) -> str:
    """The fastest of the formats that were tried."""
    return min((name for name in found.stored if name in ms), key=ms.__getitem__)


def probes(
    sparse: Callable[[str, torch.Tensor], nn.Module],
    module: nn.Module,
    found: Structure,
    kept: torch.Tensor,
    ms: Mapping[str, float],
    captured: Captured,
) -> dict[str, float]:
    """Times of this layer with other masks, by name; `sparse` makes it of a pattern and a mask."""
    best = best_pattern(ms, found)
    if ms[best] > MAX_MS:
        return {}
    groups = getattr(module, "groups", 1)
    shape = tuple(as_4d(kept).shape)
    thin = kept & random_mask(shape, groups, best, LEFT, kept.device).reshape(kept.shape)
    functions = {THINNED: sparse(best, thin).forward}
    if "oc_block16" not in found.stored and shape[0] // groups >= PATTERNS["oc_block16"][0]:
        blocked = random_mask(shape, groups, "oc_block16", 1 - found.sparsity, kept.device).reshape(kept.shape)
        functions[BLOCKED] = sparse("oc_block16", blocked).forward
    return measure.times(functions, captured)


def pays_from(ms: Mapping[str, float], found: Structure, min_gain: float) -> float | None:
    """The sparsity at which the best format would reach (1 - min_gain) of the dense time; None if it never would."""
    if THINNED not in ms:
        return None
    best = best_pattern(ms, found)
    density = 1 - found.sparsity
    per_density = (ms[best] - ms[THINNED]) / (density * (1 - LEFT)) if density else 0.0
    if per_density <= 0:
        return None
    needed = density - (ms[best] - (1 - min_gain) * ms[DENSE]) / per_density
    return 1 - needed if 0 < needed < 1 else None


def random_mask(
    shape: tuple[int, ...], groups: int, pattern: str, density: float, device: torch.device
) -> torch.Tensor:
    """A mask [O, C/groups, R, S] of `density` in blocks of `pattern`, the same at every call."""
    block = PATTERNS[pattern]
    crow, col = full_structure(shape, groups, "unstructured" if pattern == "2:4" else pattern, "cpu")
    random = torch.rand(col.numel(), 1, 1, generator=torch.Generator().manual_seed(0))
    blocks = (random < density).expand(-1, *block)
    return scatter_blocks(blocks, crow, col, shape, block, groups).to(device)
