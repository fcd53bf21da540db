"""One layer for `Auto`: the forms that could take its place, and which of them does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyops.choose import DENSE, faster, measured, output, right
from pyops.config import Layer
from pyops.memory import all_finite
from pyops.nn.conv1d import is_linear
from pyops.nn.effective import effective
from pyops.quantize import Fp8Dynamic, Int4Weight, Int8Dynamic, Int8Weight, LinearConfig
from pyops.report import UNCHANGED
from pyops.sparse import SPARSE, Sparse
from pyops.sparse_dense import dense_forward, key_of
from pyops.tune import Cache

if TYPE_CHECKING:
    from pyops.auto import Auto

FAMILIES = ("int8", "int4", "sparse", "fp8")
QUANTIZERS: dict[str, dict[str, LinearConfig]] = {
    "int8": {"int8_weight": Int8Weight(), "int8_dynamic": Int8Dynamic()},
    "fp8": {"fp8_dynamic": Fp8Dynamic()},
    "int4": {"int4_weight_g32": Int4Weight(group_size=32), "int4_weight_g128": Int4Weight(group_size=128)},
}
"""The forms of a linear layer, by family and by the name that they have in a report; the more exact first, which is
taken of two that are as fast."""


@dataclasses.dataclass
class Form:
    """A form of a layer, made."""

    layer: nn.Module
    sqnr_db: float | None
    wrong: str
    """Why it cannot be taken; "" if it can."""
    structure: str = ""
    """Of a sparse one: what its time depends on."""


def has_fp8(device: torch.device) -> bool:
    """True for a GPU with e4m3 tensor cores."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def tried(config: Auto, module: nn.Module) -> list[LinearConfig | Sparse]:
    """The configs that are for a layer of this kind."""
    found: list[LinearConfig | Sparse] = list(_quantizers(config).values()) if is_linear(module) else []
    return found + ([_sparse(config, config.min_sqnr_db)] if _may_be_sparse(config, module) else [])


def quantizers_for(config: Auto, layer: Layer) -> dict[str, LinearConfig]:
    """By name the configs that could quantize this layer; its row says if its weight cannot be."""
    if not is_linear(layer.module):
        return {}
    found = {name: c for name, c in _quantizers(config).items() if c.refusal(layer.module) is None}
    if found and not all_finite(effective(layer.module, "weight").detach()):
        layer.row.add("its weight holds NaN or Inf, which cannot be quantized")
        return {}
    if not has_fp8(layer.captured.x.device):
        found = {name: c for name, c in found.items() if name not in QUANTIZERS["fp8"]}
    return found


def sparse_for(config: Auto, layer: Layer, bar: float) -> Form | None:
    """The fastest sparse form, if it is faster than the layer as it is; the row says what was found."""
    if not _may_be_sparse(config, layer.module):
        return None
    tries = _sparse(config, bar)
    if tries.refusal(layer.module) is not None:
        return None
    row = dataclasses.replace(layer.row, reason="")
    new = tries.replace(dataclasses.replace(layer, row=row))
    if row.sparsity:
        layer.row.sparsity, layer.row.structure, layer.row.pays_from = row.sparsity, row.structure, row.pays_from
        layer.row.add(row.reason)
    elif not is_linear(layer.module):
        layer.row.add("nothing is pruned, and only pruned convolutions have sparse and int8 forms")
    layer.row.ms_before, layer.row.ms_after = row.ms_before, row.ms_after
    if new is None:
        return None
    layer.row.choice = row.choice
    return Form(new, row.sqnr_db, "", f"{row.structure} {row.sparsity:.2f}")


def best_form(
    config: Auto, layer: Layer, sparse: Form | None, quantizers: Mapping[str, LinearConfig], bar: float
) -> nn.Module | None:
    """The fastest of the sparse form, which is faster than the layer, and the quantized ones; None if none is."""
    row, module, captured = layer.row, layer.module, layer.captured
    if not quantizers and sparse is not None:
        row.sqnr_db = sparse.sqnr_db
        return sparse.layer
    if not quantizers and row.ms_before is not None:
        return None
    dense = dense_forward(module)
    expected = output(dense, captured)
    made: dict[str, Form] = {} if sparse is None else {row.choice: sparse}

    def form(name: str) -> Form:
        if name not in made:
            new = quantizers[name].convert(module)
            made[name] = Form(new, *right(expected, new.forward, captured, bar))
        return made[name]

    names = [*made, *quantizers]
    if "times" not in layer.shared:
        layer.shared["times"] = Cache(config.cache)
    cache = layer.shared["times"]
    key = key_of(module, captured) | {"auto": names, "sparse": "" if sparse is None else sparse.structure}
    ms = cache.get(key)
    if ms is None or ms.keys() != {DENSE, *names}:
        forms = {name: form(name) for name in names}
        able = {name: f for name, f in forms.items() if f.sqnr_db is not None}  # the others have no kernel
        candidates = {name: f.layer.forward for name, f in able.items() if not f.wrong}
        others = {name: f.layer.forward for name, f in able.items() if f.wrong}
        ms = measured(dense, candidates, others, captured, config.min_gain)  # at least of the layer as it is
        if able.keys() == forms.keys():
            cache.put(key, ms)
            cache.save()
    left = [name for name in names if name in ms]
    best = faster(ms, dict.fromkeys(left), config.min_gain)
    while best is not None and form(best).wrong:
        left.remove(best)
        best = faster(ms, dict.fromkeys(left), config.min_gain)
    row.ms_before = row.ms_after = ms[DENSE]
    told = _told(ms, made)
    if best is None:
        row.choice = UNCHANGED
        if names:
            row.add(f"nothing is {config.min_gain:.0%} faster and exact enough: {told}")
        return None
    row.choice, row.ms_after, row.sqnr_db = best, ms[best], made[best].sqnr_db
    row.add(told)
    if sparse is not None:
        sparse.layer._packed.clear()  # made again at the first call
    return made[best].layer


def _quantizers(config: Auto) -> dict[str, LinearConfig]:
    return {name: c for family, configs in QUANTIZERS.items() if family in config.allow for name, c in configs.items()}


def _may_be_sparse(config: Auto, module: nn.Module) -> bool:
    return "sparse" in config.allow and isinstance(module, tuple(SPARSE))


def _sparse(config: Auto, bar: float) -> Sparse:
    int8 = "int8" in config.allow
    return Sparse(
        min_gain=config.min_gain, int8=int8, min_sqnr_db=bar, both_formats=config.channels_last, cache=config.cache
    )


def _told(ms: Mapping[str, float], made: Mapping[str, Form]) -> str:
    """Times of all forms, and of those that were made and are no candidates, why."""
    words = []
    for name, t in sorted(ms.items(), key=lambda item: item[1]):
        wrong = name in made and made[name].wrong
        sqnr = f" at {made[name].sqnr_db:.1f} dB" if wrong and math.isfinite(made[name].sqnr_db or math.nan) else ""
        words.append(f"{name} {t:.4g} ms{sqnr}")
    return ", ".join(words)
