"""What the zeros of a pruned weight look like, and which sparse formats would hold it without much waste."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pyops.nn.effective import effective
from pyops.nn.masks import find_mask
from pyops.ops.sparse_weight import PATTERNS, all_blocks, is_2_4

OC_BLOCKS = ("oc_block16", "oc_block8", "oc_block4")
TILES = ("block64", "block32", "block16")
"""Square blocks: only the GPU kernels are made for them."""
LEAST_SKIPPED = 0.5
"""The share of the pruned weights that a block format must leave out to be one: a format that stores nearly all of a
weight that is hardly pruned wastes little, but it is not its structure."""
MOST_KEPT_2_4 = 0.4
"""2:4 keeps a half. What keeps much less than that satisfies it by chance."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a mask [O, C/groups, R, S]."""

    sparsity: float
    """The fraction that is pruned."""
    outputs: int
    dead_outputs: int
    """Output channels of which nothing is kept."""
    inputs: int
    dead_inputs: int
    """Input channels (of a group) that nothing reads."""
    channels_only: bool
    """True if dead channels are all that is pruned."""
    stored: dict[str, float]
    """For each format worth trying, coarsest blocks first: the values it stores over the weights of the dense layer."""

    @property
    def pattern(self) -> str:
        """The format that fits best: the coarsest."""
        return next(iter(self.stored))

    def waste(self, pattern: str) -> float:
        """The fraction of the stored values that is fill-in or padding."""
        return 1 - (1 - self.sparsity) / self.stored[pattern] if self.stored[pattern] else 0.0

    def __str__(self) -> str:
        if not self.sparsity:
            return "dense"
        words = []
        if not self.channels_only:
            waste = self.waste(self.pattern)
            words.append(self.pattern if waste < 0.005 else f"{self.pattern} with {waste:.0%} fill-in")
        if self.dead_outputs:
            words.append(f"{self.dead_outputs} of {self.outputs} output channels dead")
        if self.dead_inputs:
            words.append(f"{self.dead_inputs} of {self.inputs} input channels dead")
        return ", ".join(words)


def kept_weights(module: nn.Module) -> tuple[torch.Tensor, bool]:
    """(what `from_dense` would keep of the weight, in its shape; False if the layer computes with more than that)."""
    weight, mask = effective(module, "weight").detach(), find_mask(module)
    if mask is None:
        return weight != 0, True
    mask = mask.to(weight.device)
    return mask, not bool(((weight != 0) & ~mask).any())


def structure_of(kept: torch.Tensor, groups: int, max_waste: float, tiles: bool = False) -> Structure:
    """The structure of `kept`, bool [O, C/groups, ...]: of Conv2d, Conv1d or Linear.

    Formats are listed where at most `max_waste` of what they store is fill-in or padding; "unstructured", or "2:4" in
    its place, always is. `tiles` adds square blocks.
    """
    kept = as_4d(kept)
    total = max(kept.numel(), 1)
    nnz = int(kept.sum())
    outputs, inputs = kept.flatten(1).any(1), kept.transpose(0, 1).flatten(1).any(1)
    taps = kept.shape[2] * kept.shape[3]
    channels_only = nnz == int(outputs.sum()) * int(inputs.sum()) * taps
    stored = {}
    for pattern in (*(TILES if tiles else ()), *OC_BLOCKS, *(() if channels_only else ("ic_block4",))):
        size = stored_values(kept, groups, pattern)
        skipped = total - size
        if nnz >= (1 - max_waste) * size and skipped >= LEAST_SKIPPED * (total - nnz):
            stored[pattern] = size / total
    exact_2_4 = nnz >= MOST_KEPT_2_4 * total and is_2_4(kept)
    stored["2:4" if exact_2_4 else "unstructured"] = nnz / total
    return Structure(
        sparsity=1 - nnz / total if kept.numel() else 0.0,
        outputs=kept.shape[0],
        dead_outputs=int((~outputs).sum()),
        inputs=kept.shape[1],
        dead_inputs=int((~inputs).sum()),
        channels_only=channels_only,
        stored=stored,
    )


def stored_values(kept: torch.Tensor, groups: int, pattern: str) -> int:
    """How many values the blocks of `pattern` hold that reach into `kept`, bool [O, C/groups, R, S]."""
    bo, bc = PATTERNS[pattern]
    return int(all_blocks(kept, (bo, bc), groups).any(dim=(1, 2)).sum()) * bo * bc


def as_4d(t: torch.Tensor) -> torch.Tensor:
    """[O, C] or [O, C, S] as [O, C, R, S]."""
    return t.reshape(*t.shape[:2], *(1,) * (4 - t.dim()), *t.shape[2:])
