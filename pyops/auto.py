"""`pyops.swap_(model, pyops.Auto(), example_inputs=x)`: what is faster on this machine, layer by layer and as a whole.

Nothing is taken because it should be faster. Every layer is measured against what could stand in its place, on the
input that it really gets; then the whole model, whose output and time decide what stays.
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

from pyops.auto_layer import FAMILIES, best_form, has_fp8, quantizers_for, sparse_for, tried
from pyops.auto_whole import choose_channels_last, fold_where_it_pays, reach_sqnr, reach_time, time_all
from pyops.choose import MIN_GAIN
from pyops.config import Config, Layer
from pyops.nn.conv1d import is_linear
from pyops.report import Whole
from pyops.sparse import SPARSE
from pyops.swapping import Swap
from pyops.whole import WholeModel


@dataclasses.dataclass(frozen=True)
class Auto(Config):
    """Each layer to whatever is the fastest on this machine; what does not pay stays as it is.

    First batch normalizations are folded, if that makes the model faster. Then, of each `nn.Linear`, `nn.Conv2d` and
    `nn.Conv1d`, all forms that `allow` names are made and measured on the layer's own input against the layer as it is,
    convolutions in both memory formats. A form is a candidate if the SQNR of its output is at least `min_sqnr_db`, and
    the fastest is taken if it is faster by `min_gain`, twice. Then the whole model is looked at. While the SQNR of its
    output is below `min_sqnr_db`, the noisiest layers are chosen again among more exact forms, in the end as they were.
    If the layers do not make it faster, those that gain least are put back, until they do or all are back. At last the
    weights of convolutions are put into channels_last, if that makes it faster and its output stays the same.

    What counts are the shapes of the example inputs, the number of threads and the machine at hand.

    Args:
        min_sqnr_db: the least 10·log10(‖y‖² / ‖y − ŷ‖²) of the output of each swapped layer, and of the model.
        allow: the families to try. "int8": `Int8Weight()`, `Int8Dynamic()`, and int8 forms of pruned convolutions.
            "int4": `Int4Weight()` in groups of 32 and 128. "sparse": what `Sparse()` finds, of pruned layers. "fp8":
            `Fp8Dynamic()`, on GPUs that have it.
        min_gain: the share of a layer's time that must be gained.
        fold_batch_norm: fold batch normalizations that are in eval mode (`pyops.fold_batch_norm_`).
        channels_last: also try channels_last; kept only if the model's outputs keep their strides.
        cache: file of measured times (see `pyops.tune`); None for the default one, False for none.

    Raises TypeError or ValueError for other values, and in `swap_` ValueError without example inputs.
    """

    min_sqnr_db: float = 20.0
    allow: tuple[str, ...] = FAMILIES
    min_gain: float = MIN_GAIN
    fold_batch_norm: bool = True
    channels_last: bool = True
    cache: str | os.PathLike | bool | None = None

    choice = "auto"
    revertible = True

    def __post_init__(self) -> None:
        for name in ("min_sqnr_db", "min_gain"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if math.isnan(self.min_sqnr_db):
            raise ValueError("min_sqnr_db is nan")
        if not 0 <= self.min_gain < 1:
            raise ValueError(f"min_gain is {self.min_gain}; allowed: 0 to below 1")
        if not isinstance(self.allow, (tuple, list)) or not all(isinstance(name, str) for name in self.allow):
            raise TypeError(f"allow must be a tuple of names such as ('int8', 'sparse'), got {self.allow!r}")
        wrong = [name for name in self.allow if name not in FAMILIES]
        if wrong:
            raise ValueError(f"allow names {wrong[0]!r}; there are {', '.join(FAMILIES)}")
        object.__setattr__(self, "allow", tuple(self.allow))
        for name in ("fold_batch_norm", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.cache, (str, os.PathLike, bool, type(None))):
            raise TypeError(f"cache must be a path, None or False, got {type(self.cache).__name__}")

    def matches(self, module: nn.Module) -> bool:
        """A Linear, Conv2d or Conv1d, or a subclass of one; transformers' Conv1D."""
        return is_linear(module) or isinstance(module, tuple(SPARSE))

    def mentions(self, module: nn.Module) -> bool:
        """Any other module with a weight of its own, and layers that are ours already."""
        tensors = [*module._parameters.values(), *(module._buffers.values() if _is_ours(module) else ())]
        return any(t is not None and t.dim() >= 2 for t in tensors)

    def refusal(self, module: nn.Module) -> str | None:
        """Why no form of any family can stand in its place."""
        if _is_ours(module):
            return f"a {type(module).__name__} of pyops already"
        if not self.matches(module):
            return f"there is no kernel for a {type(module).__name__}"
        refusals = [config.refusal(module) for config in tried(self, module)]
        if not refusals:
            return f"allow={self.allow} has nothing for a {type(module).__name__}"
        return None if None in refusals else refusals[0]

    def by_hand(self, module: nn.Module) -> str:
        """A whole model is what this is for."""
        return "a config such as pyops.Int8Dynamic() names, `from_float` of its layer"

    def whole_model(self) -> bool:
        """The whole model is measured."""
        return True

    def check(self, example_inputs: Any) -> None:
        """Refuse to choose without measuring."""
        if example_inputs is None:
            raise ValueError("Auto() chooses by measuring and needs swap_(..., example_inputs=...)")

    @contextlib.contextmanager
    def prepared(self, swap: Swap) -> Iterator[Mapping[nn.Module, str]]:
        """Normalizations folded, where that pays."""
        swap.whole = Whole()
        model = swap.shared["model"] = WholeModel(swap.model, swap.example_inputs)
        swap.shared["expected"] = model.outputs()
        swap.shared["bars"] = {}
        swap.whole.notes += self._not_tried(model.device())
        yield fold_where_it_pays(swap) if self.fold_batch_norm else {}

    def replace(self, layer: Layer) -> nn.Module | None:
        """The fastest form of a layer that is exact enough; None if there is none, with the reason in its row."""
        if layer.captured is None:
            if not layer.row.reason:
                layer.row.add("cannot be measured: it has no values")
            return None
        bar = layer.shared["bars"].get(layer.module, self.min_sqnr_db)
        sparse = sparse_for(self, layer, bar)
        quantizers = quantizers_for(self, layer)
        return best_form(self, layer, sparse, quantizers, bar)

    def finish(self, swap: Swap) -> Mapping[str, str]:
        """What is not exact or fast enough on the whole goes back; memory format changed, where that pays."""
        reach_sqnr(swap, self.min_sqnr_db)
        reach_time(swap)
        if self.channels_last:
            choose_channels_last(swap, self.min_gain)
        time_all(swap)
        return {}

    def _not_tried(self, device: torch.device) -> list[str]:
        if "fp8" in self.allow and not has_fp8(device):
            return ["fp8 was not tried: it needs an NVIDIA GPU with e4m3 tensor cores (compute capability 8.9)"]
        return []


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("pyops.nn.")
