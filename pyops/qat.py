"""Quantization-aware training: `prepare_qat_` before it, `convert_` after it.

    pyops.prepare_qat_(model, pyops.Int4Weight(group_size=32))     # nn.Linear → QatLinear, the same parameters
    train(model)                                                   # any loop, any optimizer
    pyops.convert_(model)                                          # QatLinear → Int4Linear

Both are swaps: what holds of `pyops.swap_` (all or nothing, hooks, names, the report) holds of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

from torch import nn

from pyops.config import Config, FilterFn, Layer
from pyops.nn.conv1d import is_conv1d
from pyops.nn.qat_linear import QatLinear, unshared
from pyops.quantize import LinearConfig
from pyops.replacing import nbytes, weight_and_bias
from pyops.report import Report, Row
from pyops.swap import swap_
from pyops.swapping import Swap


def prepare_qat_(model: nn.Module, config: LinearConfig, filter_fn: FilterFn | None = None) -> Report:
    """Make the layers that `config` is for compute as quantized ones, and train; a row for each in the report.

    Every `nn.Linear` becomes a `pyops.nn.QatLinear`: the same parameters under the same names, so that an optimizer
    made before goes on to work and checkpoints of the float model load. Hooks stay, tied and shared weights stay so,
    and pruning goes on with its mask. Layers can be prepared for different configs, one call each, told apart by
    `filter_fn`.

    Args:
        model: any module that holds layers.
        config: what `convert_` is to make, such as `Int8Dynamic()` or `Int4Weight()`.
        filter_fn: called as filter_fn(module, qualified_name); False leaves a layer as it is.

    Raises:
        TypeError for arguments of a wrong type, and a config that cannot be trained for. ValueError if a layer that the
        filter takes is prepared already, if a weight holds NaN or Inf, or if the model itself is the layer. After any
        exception the model is exactly as it was.
    """
    if not isinstance(config, LinearConfig):
        hint = f"; write {config.__name__}()" if isinstance(config, type) and issubclass(config, LinearConfig) else ""
        got = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"config must be one of a linear layer, such as Int8Dynamic() or Int4Weight(), got {got}{hint}")
    why = config.untrainable()
    if why:
        raise ValueError(f"config {config!r} cannot be trained for: {why}")
    return swap_(model, _Prepare(config), filter_fn)


def convert_(model: nn.Module) -> Report:
    """Put the quantized layers that a model was prepared for into it; a row for each in the report.

    Each `QatLinear` becomes what its config makes: the integers and scales are those that the last forward computed
    with, so that only the order of sums in fp32 and one rounding differ. Training flag, hooks and the bias (the same
    Parameter) are kept; pruning is baked in.

    Raises:
        TypeError if `model` is no module, ValueError if no layer in it was prepared, if a weight holds NaN or Inf, or
        if the model itself is the layer. After any exception the model is exactly as it was.
    """
    report = swap_(model, _Convert())
    if not report.rows:
        raise ValueError("model holds no layer that pyops.prepare_qat_ prepared")
    return report


@dataclasses.dataclass(frozen=True)
class _Prepare(Config):
    """Every layer that a config is for to one that trains for it."""

    config: LinearConfig

    @property
    def choice(self) -> str:
        return f"qat_{self.config.choice}"

    def matches(self, module: nn.Module) -> bool:
        return self.config.matches(module)

    def refusal(self, module: nn.Module) -> str | None:
        if isinstance(module, QatLinear):
            return None  # if the filter takes it, an error
        if is_conv1d(module):
            return "its weight lies transposed, and is trained as it lies"
        return self.config.refusal(module) or unshared(module)

    def by_hand(self, module: nn.Module) -> str:
        return f"pyops.nn.QatLinear.from_float(model, {self.config!r})"

    def convert(self, module: nn.Module) -> nn.Module:
        if isinstance(module, QatLinear):
            raise ValueError(f"it is already prepared, for {module.config!r}: leave it out by filter_fn, or convert it")
        self.config.check_layer(module)
        return QatLinear.from_float(module, self.config, self.config.buffers(module))

    def prepared(self, swap: Swap) -> contextlib.AbstractContextManager[Mapping[nn.Module, str]]:
        return self.config.prepared(swap)

    def replace(self, layer: Layer) -> nn.Module | None:
        lacking = None if isinstance(layer.module, QatLinear) else self.config.lacking(layer.module)
        if lacking:
            layer.row.add(lacking)
            return None
        return super().replace(layer)

    def complete(self, layer: nn.Module, new: nn.Module, row: Row, names: list[str], tied: list[str]) -> None:
        """It holds what the layer holds, and nothing is tied or cut."""
        facts = [f"trains for {self.config!r}"]
        if len(names) > 1:
            facts.append(f"the same layer as {', '.join(names[1:])}")
        row.bytes_after = nbytes(weight_and_bias(new))
        row.reason = "; ".join(facts)


@dataclasses.dataclass(frozen=True)
class _Convert(Config):
    """Every prepared layer to what it was prepared for."""

    choice = "converted"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QatLinear)

    def refusal(self, module: nn.Module) -> str | None:
        return None

    def by_hand(self, module: nn.Module) -> str:
        return "model.config.convert(model)"

    def convert(self, module: nn.Module) -> nn.Module:
        return module.config.convert(module)

    def complete(self, layer: nn.Module, new: nn.Module, row: Row, names: list[str], tied: list[str]) -> None:
        row.choice = layer.config.choice
        super().complete(layer, new, row, names, tied)
