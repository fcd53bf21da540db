"""`pyops.swap_(model, pyops.Sparse(), example_inputs=x)`: pruned layers made sparse where that is faster.

The mask of each layer decides which formats are tried, its own input which is the fastest. A layer for which none is
faster than what it is stays untouched, and its row says from which sparsity on one would be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyops.choose import DENSE, MIN_GAIN, MIN_SQNR_DB, faster, measured, output, right
from pyops.config import Config, Layer
from pyops.fuse import Fused, fuse_activations_
from pyops.measure import Captured
from pyops.memory import has_values
from pyops.nn.conv import SparseConv1d, SparseConv2d
from pyops.nn.effective import effective
from pyops.nn.int8_conv import Int8SparseConv2d
from pyops.nn.sparse_linear import SparseLinear
from pyops.ops.sparse_checks import FLOAT_DTYPES
from pyops.ops.sparse_weight import PATTERNS, is_2_4
from pyops.prune.dead_channels import removing
from pyops.refusal import layer_refusal
from pyops.residual import fuse_residuals_
from pyops.sparse_dense import OTHER_FORMATS, dense_forward, key_of, other_format, sparse_key
from pyops.sparse_estimate import BLOCKED, THINNED, best_pattern, pays_from, probes
from pyops.structure import Structure, as_4d, kept_weights, stored_values, structure_of
from pyops.swapping import Swap
from pyops.tune import Cache

SPARSE = {nn.Conv2d: SparseConv2d, nn.Conv1d: SparseConv1d, nn.Linear: SparseLinear}
INT8 = "int8"
"""The name of the int8 form of a layer among measured times."""


@dataclasses.dataclass(frozen=True)
class Sparse(Config):
    """Pruned `nn.Conv2d`, `nn.Conv1d` and `nn.Linear` to `pyops.nn.SparseConv2d`, `SparseConv1d` and `SparseLinear`.

    The mask is the one that the layer holds (`torch.nn.utils.prune`, `torch.ao.pruning`, apex ASP …), else its zeros.
    Each format that fits the mask is measured against the dense layer on the layer's own input, in the memory format in
    which the model gives it. The fastest is taken if it is faster by `min_gain`, twice; else the layer stays as it is.
    What the dense layer would take in the other memory format is measured and told as well.

    Args:
        pattern: "auto", or the one format of `pyops.ops.sparse_weight.PATTERNS` to try.
        max_waste: the share of stored values that may be fill-in or padding when "auto" tries a block format.
        min_gain: the share of the dense layer's time that must be gained.
        measure: False converts every pruned layer to `pattern` without asking if it is faster.
        remove_channels: first remove dead channels across layers by `pyops.prune.remove_dead_channels_`. Not measured.
        fuse_activations: at the end let the sparse layers apply the activations that follow them, by
            `pyops.fuse_activations_`. Not measured.
        fuse_residuals: at the end let them add the residuals too, by `pyops.fuse_residuals_`, which does all that
            fuse_activations does and rewrites the forward of the modules that add. Not measured. Needs example inputs.
        int8: also try `pyops.nn.Int8SparseConv2d` in the place of each pruned Conv2d. It is for inference: its weight
            is rounded and frozen.
        min_sqnr_db: the least SQNR of the output of a layer that becomes int8, on its own input.
        both_formats: a sparse form must also be faster than the dense layer in the other memory format.
        cache: file of measured times (see `pyops.tune`); None for the default one, False for none.

    Raises TypeError or ValueError for other values, and in `swap_` ValueError without example inputs, unless
    measure=False.
    """

    pattern: str = "auto"
    max_waste: float = 0.25
    min_gain: float = MIN_GAIN
    measure: bool = True
    remove_channels: bool = False
    fuse_activations: bool = False
    fuse_residuals: bool = False
    int8: bool = False
    min_sqnr_db: float = MIN_SQNR_DB
    both_formats: bool = False
    cache: str | os.PathLike | bool | None = None

    choice = "sparse"

    def __post_init__(self) -> None:
        if self.pattern != "auto" and self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r} is not one of auto, {', '.join(PATTERNS)}")
        for name in ("max_waste", "min_gain", "min_sqnr_db"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if name != "min_sqnr_db" and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; allowed: 0 to below 1")
        if math.isnan(self.min_sqnr_db):
            raise ValueError("min_sqnr_db is nan")
        for name in ("measure", "remove_channels", "fuse_activations", "fuse_residuals", "int8", "both_formats"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.cache, (str, os.PathLike, bool, type(None))):
            raise TypeError(f"cache must be a path, None or False, got {type(self.cache).__name__}")
        if not self.measure and self.pattern == "auto":
            raise ValueError('measure=False needs a pattern: which of several is "auto" is found by measuring')
        if not self.measure and self.int8:
            raise ValueError("int8=True needs measure=True; pyops.nn.Int8SparseConv2d.from_dense converts one layer")

    def matches(self, module: nn.Module) -> bool:
        """A Conv2d, Conv1d or Linear, or a subclass of one."""
        return isinstance(module, tuple(SPARSE))

    def refusal(self, module: nn.Module) -> str | None:
        """Why no sparse layer can stand in its place."""
        reason = layer_refusal(module, _base(module), FLOAT_DTYPES)
        if reason is None and getattr(module, "groups", 1) > 1 and module.in_channels == module.groups:
            return "depthwise: stays dense"
        return reason

    def by_hand(self, module: nn.Module) -> str:
        """`from_dense` of the sparse layer."""
        return f"pyops.nn.{SPARSE[_base(module)].__name__}.from_dense(model, pattern=...)"

    def whole_model(self) -> bool:
        """True if channels are removed or something is fused."""
        return self.remove_channels or self.fuse_activations or self.fuse_residuals

    def check(self, example_inputs: Any) -> None:
        """Refuse to choose without measuring."""
        if self.measure and example_inputs is None:
            raise ValueError(
                "Sparse() chooses by measuring and needs swap_(..., example_inputs=...); to convert without measuring "
                'write Sparse(pattern="oc_block16", measure=False), or another pattern'
            )
        if self.fuse_residuals and example_inputs is None:
            raise ValueError("fuse_residuals=True needs swap_(..., example_inputs=...)")

    @contextlib.contextmanager
    def prepared(self, swap: Swap) -> Iterator[Mapping[nn.Module, str]]:
        """Dead channels removed, if they shall be."""
        if not self.remove_channels:
            yield {}
            return
        with removing(swap.model, swap.example_inputs, swap.filter_fn) as found:
            yield {module: str(row) for module, row in found.items()}

    def finish(self, swap: Swap) -> Mapping[str, str]:
        """Activations and residuals fused, if they shall be; of every layer that has something to be fused."""
        if self.fuse_residuals:
            rows = fuse_residuals_(swap.model, swap.example_inputs)
        else:
            rows = fuse_activations_(swap.model, swap.example_inputs) if self.fuse_activations else []
        return {row.layer: _said(row) for row in rows if row.fused or row.activation is not None}

    def convert(self, module: nn.Module) -> nn.Module:
        """`from_dense` in the pattern of this config."""
        if self.pattern == "auto":
            raise ValueError('pattern="auto" is found by measuring; give one to convert a single layer')
        return self._sparse(module, self.pattern)

    def replace(self, layer: Layer) -> nn.Module | None:
        """The fastest sparse form of a layer; None if there is none that is faster, with the reason in its row."""
        module, row, captured = layer.module, layer.row, layer.captured
        if not has_values(effective(module, "weight").detach()):
            row.add("its weight has no values in which to look for zeros")
            return None
        kept, fits = kept_weights(module)
        groups = getattr(module, "groups", 1)
        found = structure_of(kept, groups, self.max_waste, tiles=kept.is_cuda)
        row.sparsity, row.structure = found.sparsity, str(found)
        refusal = self._misfit(kept, fits, found)
        if refusal:
            row.add(refusal)
            return None
        if self.pattern != "auto":
            stored = {self.pattern: stored_values(as_4d(kept), groups, self.pattern) / kept.numel()}
            found = dataclasses.replace(found, stored=stored)
        if not self.measure:
            new = super().replace(layer)
            row.choice = f"sparse_{self.pattern}"
            return new
        if captured is None:
            if not row.reason:
                row.add("cannot be measured: it has no values")
            return None
        return self._fastest(layer, found, kept, captured)

    def _misfit(self, kept: torch.Tensor, fits: bool, found: Structure) -> str:
        if not found.sparsity:
            return "nothing is pruned"
        if not fits:
            return "weights outside of its mask are not zero: the mask is not applied"
        if self.pattern == "2:4" and not is_2_4(as_4d(kept)):
            return "its mask keeps more than 2 of 4 consecutive input channels"
        return ""

    def _fastest(self, layer: Layer, found: Structure, kept: torch.Tensor, captured: Captured) -> nn.Module | None:
        module, row = layer.module, layer.row
        dense = dense_forward(module)
        expected = output(dense, captured)
        made: dict[str, _Made] = {}
        names = list(found.stored)
        if self.int8 and isinstance(module, nn.Conv2d):
            made[INT8] = self._made(module, INT8, expected, captured)
            if made[INT8].wrong:
                row.add(f"{INT8} {made[INT8].wrong}")
            else:
                names.append(INT8)
        if "times" not in layer.shared:
            layer.shared["times"] = Cache(self.cache)
        cache, dense_key = layer.shared["times"], key_of(module, captured)
        key = sparse_key(dense_key, found, INT8 in names)
        ms = _known(cache.get(key), names)
        if ms is None:
            made = {name: made.get(name) or self._made(module, name, expected, captured) for name in names}
            wrong = "; ".join(f"{name} {new.wrong}" for name, new in made.items() if new.wrong)
            if wrong:
                row.add(wrong)
            candidates = {name: new.layer.forward for name, new in made.items() if not new.wrong}
            if not candidates:
                return None
            known = cache.get(dense_key)
            others = other_format(module, captured) if known is None else {}
            ms = measured(dense, candidates, others, captured, self.min_gain)
            if others:
                cache.put(dense_key, {name: ms[name] for name in others})
            ms |= {name: t for name, t in (known or {}).items() if name in OTHER_FORMATS}
            if faster(ms, candidates, self.min_gain) is None and found.stored.keys() & candidates.keys():
                ms |= probes(lambda p, m: self._sparse(module, p, m), module, found, kept, ms, captured)
            if not wrong:
                cache.put(key, ms)
                cache.save()
        best = faster(self._rivals(ms), dict.fromkeys(names), self.min_gain)
        row.ms_before = row.ms_after = ms[DENSE]
        told_of = (DENSE, *(OTHER_FORMATS if self.both_formats else ()), *names)
        told = ", ".join(f"{name} {t:.4g} ms" for name, t in ms.items() if name in told_of)
        advice = _other_format_is_best(ms, ms[best or DENSE])
        if best is None:
            row.pays_from = pays_from(ms, found, self.min_gain)
            row.add(_why_dense(ms, found, told, self, row.pays_from, captured.x.device.type) + advice)
            return None
        new = made.get(best) or self._made(module, best, expected, captured)
        if new.wrong:  # times of another layer, or from the cache, but this weight
            row.add(f"{best} {new.wrong}")
            return None
        row.ms_after, row.sqnr_db, row.choice = ms[best], new.sqnr_db, f"sparse_{best}"
        row.add(told + advice)
        new.layer._packed.clear()  # made again at the first call, when the dense weights are gone
        return new.layer

    def _rivals(self, ms: dict[str, float]) -> dict[str, float]:
        """The times, that of the dense layer being of the format in which it is the faster, if both count."""
        formats = (DENSE, *(OTHER_FORMATS if self.both_formats else ()))
        return ms | {DENSE: min(ms[name] for name in formats if name in ms)}

    def _made(self, module: nn.Module, name: str, expected: torch.Tensor, captured: Captured) -> _Made:
        """One form of a layer, and what is wrong with it; `expected` is what the layer gives."""
        if name != INT8:
            new = self._sparse(module, name)
            return _Made(new, *right(expected, new.forward, captured))
        try:
            new = Int8SparseConv2d.from_dense(module)
            return _Made(new, *right(expected, new.forward, captured, self.min_sqnr_db))
        except (TypeError, ValueError) as error:
            return _Made(None, None, f"is not possible: {error}")

    @staticmethod
    def _sparse(module: nn.Module, pattern: str, mask: torch.Tensor | None = None) -> nn.Module:
        return SPARSE[_base(module)].from_dense(module, pattern=pattern, mask=mask)


@dataclasses.dataclass
class _Made:
    """A form of a layer."""

    layer: nn.Module | None
    sqnr_db: float | None
    wrong: str
    """Why it cannot be taken; "" if it can."""


def _base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in SPARSE if isinstance(module, base))


def _said(row: Fused) -> str:
    if row.activation is None or row.reason.startswith("the residual"):
        return f"fused: {row.reason}"
    return f"activation {row.activation} " + ("fused" if row.fused else f"not fused: {row.reason}")


def _known(ms: dict[str, float] | None, names: list[str]) -> dict[str, float] | None:
    """Times from a cache, if they are all that is asked for and nothing else."""
    allowed = {DENSE, *OTHER_FORMATS, THINNED, BLOCKED, *names}
    return ms if ms is not None and {DENSE, *names} <= ms.keys() <= allowed else None


def _why_dense(
    ms: Mapping[str, float], found: Structure, told: str, config: Sparse, pays: float | None, device: str
) -> str:
    reasons = [f"not {config.min_gain:.0%} faster sparse: {told}"]
    if pays is not None:
        reasons.append(f"{best_pattern(ms, found)} would pay from a sparsity of about {pays:.0%}")
    if ms.get(BLOCKED, math.inf) <= (1 - config.min_gain) * ms[DENSE]:
        reasons.append(f"at this sparsity oc_block16 would pay: {ms[BLOCKED]:.4g} ms")
    if device == "cuda" and not any(pattern.startswith("block") for pattern in found.stored):
        reasons.append("on a GPU only square blocks (block16 to block64) have a sparse kernel, others run dense")
    if (found.dead_outputs or found.dead_inputs) and not config.remove_channels:
        reasons.append("remove_channels=True may remove dead channels across layers")
    return "; ".join(reasons)


def _other_format_is_best(ms: Mapping[str, float], now: float) -> str:
    """Advice, if the dense layer is faster than what was chosen where the model is in the other memory format."""
    name = min((name for name in OTHER_FORMATS if name in ms), key=ms.__getitem__, default=None)
    if name is None or ms[name] >= 0.97 * now:
        return ""
    return f"; a model in memory_format=torch.{OTHER_FORMATS[name]} would take {ms[name]:.4g} ms dense here"
