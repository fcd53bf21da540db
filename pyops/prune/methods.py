"""Pruning methods in the way of `torch.nn.utils.prune`: what a mask looks like.

A weight is seen as t [O, I, T]: output channels, input channels of a group, taps. All methods but `NM` cut it into
units of o x i x t weights (those at the end may be smaller), give each unit of n weights the score

    s = (1/n · Σ |w|^p)^(1/p),    p = 2, or max |w| for p = inf

and zero the units of the lowest score. Within units of one size that is the order of their norms ‖w‖ₚ; the mean keeps a
smaller unit at the end, or in another layer, from losing for being small. Where scores are equal the first goes first.

Called through torch's own functions, such as `prune.global_unstructured(..., pruning_method=Magnitude, sparsity=0.5)`,
`Magnitude` acts as torch's methods do: it prunes a share of what is left. `apply` and the functions of `pyops.prune`
always mean the total.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from pyops.nn.effective import effective
from pyops.prune.layers import check_layer, install, mask_of
from pyops.sizes import ceil_div


class Method(BasePruningMethod):
    """What the methods share: a total mask over one or several layers, and `apply` in torch's signature."""

    PRUNING_TYPE = "global"  # torch's container passes the whole tensor and its mask, not only what is left

    def compute_masks(self, tensors: list[Tensor], masks: list[Tensor], together: bool = False) -> list[Tensor]:
        """New bool masks, each a subset of its old one; `together` ranks the units of all tensors in one list."""
        raise NotImplementedError

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """torch's protocol: a mask in the dtype of `default_mask`, zero where that is and where this method prunes."""
        (mask,) = self.compute_masks([t.detach()], [default_mask != 0])
        return default_mask * mask

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> BasePruningMethod:
        """Prune the parameter `name` of one layer; args and kwargs are those of the class. Returns the hook.

        Raises:
            TypeError, ValueError for bad arguments and for a layer that cannot be pruned; nothing has changed then.
        """
        method = cls(*args, **kwargs)
        check_layer(module, name)
        weight = effective(module, name)
        scores = weight if importance_scores is None else check_scores(importance_scores, weight)
        mask = method.compute_mask(scores, mask_of(module, name))
        return install(module, name, method, mask)


class Ranked(Method):
    """Zeroes the units of lowest score until `sparsity` of all weights are in units that are zero.

    Args:
        sparsity: share of the weights in zero units afterwards, in [0, 1). Units that are pruned already count, single
            pruned weights of a unit that lives do not: blocks on top of another pattern are as many as asked for. It
            is met as nearly as whole units allow, but the last unit that lives always stays, since less than all was
            asked for. Where more is pruned already, nothing is.
        norm: p of the score, a number above 0 or inf.

    Raises:
        TypeError, ValueError for other values.
    """

    def __init__(self, sparsity: float, norm: float = 2.0) -> None:
        self.sparsity = check_sparsity(sparsity)
        if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
            raise TypeError(f"norm must be a number above 0 or inf, got {type(norm).__name__}")
        if not norm > 0:
            raise ValueError(f"norm must be above 0, got {norm}")
        self.norm = float(norm)

    def unit(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(o, i, t) of one unit, for a weight of this shape [O, I, T]."""
        raise NotImplementedError

    def compute_masks(self, tensors: list[Tensor], masks: list[Tensor], together: bool = False) -> list[Tensor]:
        """New bool masks, each a subset of its old one; `together` ranks the units of all tensors in one list."""
        weights = [as_3d(t) for t in tensors]
        units = [tuple(max(1, u) for u in self.unit(tuple(t.shape))) for t in weights]
        scores, sizes = [], []
        for t, mask, unit in zip(weights, masks, units, strict=True):
            score, size = unit_scores(t, unit, self.norm)
            alive = unit_scores(as_3d(mask).to(score.dtype), unit, math.inf)[0] > 0
            scores.append(score.where(alive, -1))  # what is pruned already comes before every score
            sizes.append(size)
        device = weights[0].device
        if together:
            lowest = _lowest(
                torch.cat([s.flatten().to(device) for s in scores]),
                torch.cat([s.flatten().to(device) for s in sizes]),
                self.sparsity,
            )
            parts = lowest.split([s.numel() for s in scores])
        else:
            parts = [_lowest(s.flatten(), n.flatten(), self.sparsity) for s, n in zip(scores, sizes, strict=True)]
        found = []
        for t, mask, unit, score, part in zip(weights, masks, units, scores, parts, strict=True):
            keep = ~part.view(score.shape).to(mask.device)
            for dim, (length, size) in enumerate(zip(t.shape, unit, strict=True)):
                if size > 1:
                    keep = keep.repeat_interleave(size, dim).narrow(dim, 0, length)
            found.append(mask & keep.reshape(mask.shape))
        return found


class Magnitude(Ranked):
    """Single weights of the smallest |w|; any shape of parameter."""

    PRUNING_TYPE = "unstructured"  # what `prune.global_unstructured` asks for

    def __init__(self, sparsity: float) -> None:
        super().__init__(sparsity)

    def unit(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(1, 1, 1)."""
        return 1, 1, 1


class OcBlock(Ranked):
    """Blocks of `block` consecutive output channels x 1 input channel x 1 tap; the last is shorter if O % block."""

    def __init__(self, sparsity: float, block: int = 16, norm: float = 2.0) -> None:
        super().__init__(sparsity, norm)
        self.block = check_positive("block", block)

    def unit(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(block, 1, 1)."""
        return min(self.block, shape[0]), 1, 1


class IcBlock(Ranked):
    """Blocks of 1 output channel x `block` consecutive input channels x 1 tap; the last is shorter if I % block."""

    def __init__(self, sparsity: float, block: int = 4, norm: float = 2.0) -> None:
        super().__init__(sparsity, norm)
        self.block = check_positive("block", block)

    def unit(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(1, block, 1)."""
        return 1, min(self.block, shape[1]), 1


class Channels(Ranked):
    """Whole output channels (dim 0) or input channels (dim 1)."""

    def __init__(self, sparsity: float, dim: int = 0, norm: float = 2.0) -> None:
        super().__init__(sparsity, norm)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim must be 0 or 1, got {type(dim).__name__}")
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (output channels) or 1 (input channels), got {dim}")
        self.dim = dim

    def unit(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(1, I, T) or (O, 1, T)."""
        return (1, shape[1], shape[2]) if self.dim == 0 else (shape[0], 1, shape[2])


class NM(Method):
    """Keeps the n largest |w| of each m consecutive input channels, for every output channel and tap.

    Where I is not a multiple of m, the last group is shorter and keeps up to n too: a layer of up to n input channels
    a group (depthwise) is left whole. Of equal values the first is kept. What is pruned stays so, so a group may keep
    fewer than n.

    Raises:
        TypeError, ValueError unless 1 <= n <= m.
    """

    def __init__(self, n: int = 2, m: int = 4) -> None:
        self.n, self.m = check_positive("n", n), check_positive("m", m)
        if n > m:
            raise ValueError(f"n must be at most m, got n={n}, m={m}")

    def compute_masks(self, tensors: list[Tensor], masks: list[Tensor], together: bool = False) -> list[Tensor]:
        """New bool masks, each a subset of its old one."""
        return [self._mask(t, mask) for t, mask in zip(tensors, masks, strict=True)]

    def _mask(self, t: Tensor, mask: Tensor) -> Tensor:
        weight = as_3d(t)  # [O, I, T]
        if not weight.numel():
            return mask
        score = weight.abs().where(as_3d(mask), -1)
        score = F.pad(score, (0, 0, 0, -score.shape[1] % self.m), value=-1.0)
        score = score.unflatten(1, (-1, self.m))  # [O, I/m, m, T]
        largest = score.argsort(dim=2, descending=True, stable=True).narrow(2, 0, self.n)
        keep = torch.zeros_like(score, dtype=torch.bool).scatter_(2, largest, True)
        return mask & keep.flatten(1, 2).narrow(1, 0, weight.shape[1]).reshape(mask.shape)


def as_3d(t: Tensor) -> Tensor:
    """[O, I, ...] → [O, I, T]; a vector is [O, 1, 1]."""
    return t.reshape(*t.shape[:2], *[1] * (2 - t.dim()), math.prod(t.shape[2:]))


def unit_scores(t: Tensor, unit: tuple[int, int, int], p: float) -> tuple[Tensor, Tensor]:
    """(score, number of weights) of each unit of t [O, I, T], both [⌈O/o⌉, ⌈I/i⌉, ⌈T/t⌉]."""
    dtype = t.dtype if t.dtype == torch.float64 else torch.float32
    if unit == (1, 1, 1):
        return t.abs().to(dtype), torch.ones((), dtype=torch.int32, device=t.device).expand(t.shape)
    grid = [ceil_div(length, size) for length, size in zip(t.shape, unit, strict=True)]
    padding = [n * size - length for n, size, length in zip(grid, unit, t.shape, strict=True)]
    cut = F.pad(t, [v for pad in reversed(padding) for v in (0, pad)])
    cut = cut.reshape(grid[0], unit[0], grid[1], unit[1], grid[2], unit[2])
    size = torch.ones((), dtype=torch.int64, device=t.device)
    for dim, (n, length, pad) in enumerate(zip(grid, unit, padding, strict=True)):
        lengths = torch.full((n,), length, device=t.device)
        lengths[n - 1 :] -= pad
        size = size * lengths.view([-1 if d == dim else 1 for d in range(3)])
    # In double: the squares of small weights underflow in float.
    norm = torch.linalg.vector_norm(cut, p, dim=(1, 3, 5), dtype=torch.float64)
    return (norm / size.double() ** (1 / p)).to(dtype), size


def _lowest(scores: Tensor, sizes: Tensor, sparsity: float) -> Tensor:
    """Bool [units]: those of the lowest scores that bring the sum of their sizes nearest to the share of all."""
    lowest = torch.zeros_like(scores, dtype=torch.bool)
    if not len(scores):
        return lowest
    if sizes.min() == sizes.max():
        count = min(round(sparsity * len(scores)), len(scores) - 1)
        if count > 0:
            threshold = scores.kthvalue(count).values  # linear in time, unlike a sort
            lowest = scores < threshold
            lowest[(scores == threshold).nonzero()[: count - int(lowest.sum()), 0]] = True
        return lowest
    order = scores.argsort(stable=True)
    size = sizes[order].long()
    before = size.cumsum(0) - size
    # A unit of n is taken if that brings the sum nearer to the target: b + n - target < target - b.
    taken = before + size / 2 < sparsity * size.sum()
    taken[-1] = False
    lowest[order[taken]] = True
    return lowest


def check_sparsity(sparsity: Any, name: str = "sparsity") -> float:
    """The argument as a float; TypeError or ValueError naming it if it is not one in [0, 1)."""
    if isinstance(sparsity, numbers.Integral) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"{name} must be a float in [0, 1), got {type(sparsity).__name__} {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"{name} must be in [0, 1), got {sparsity}")
    return float(sparsity)


def check_positive(name: str, value: Any) -> int:
    """The argument; TypeError or ValueError naming it if it is not an int above 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def check_scores(scores: Any, weight: Tensor, where: str = "") -> Tensor:
    """Importance scores on the device of the weight; TypeError or ValueError if they do not fit it."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{where}importance_scores must be a tensor of floating point, got {got}")
    if scores.shape != weight.shape:
        raise ValueError(
            f"{where}importance_scores is {tuple(scores.shape)}, the parameter that it ranks {tuple(weight.shape)}"
        )
    if scores.isnan().any():
        raise ValueError(f"{where}importance_scores holds NaN")
    return scores.detach().to(weight.device)
