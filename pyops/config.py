"""What `pyops.swap_` asks of a config: which layers it is for, and what takes the place of each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pyops.measure import Captured, compare
from pyops.replacing import complete
from pyops.report import Row

if TYPE_CHECKING:
    from pyops.swapping import Swap

FilterFn = Callable[[nn.Module, str], bool]


@dataclasses.dataclass
class Layer:
    """A layer of the model that could be replaced."""

    module: nn.Module
    name: str
    row: Row
    """Its row of the report, to be filled with what is found out."""
    captured: Captured | None
    """The input of its first call; None without example inputs, if it was not called, or on the meta device."""
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    """`Swap.shared` of the swap."""


class Config:
    """Which layers a swap is for and what it makes of them; subclasses are small frozen dataclasses."""

    choice: str
    """The name of this choice in a report."""
    revertible: ClassVar[bool] = False
    """True if a report keeps what was replaced unless it is told not to."""

    def matches(self, module: nn.Module) -> bool:
        """True if `module` is of the kind that this config is for: it gets a row, converted or not."""
        raise NotImplementedError

    def mentions(self, module: nn.Module) -> bool:
        """True for a module that is of another kind and still gets a row; `refusal` says why it stays."""
        return False

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that matches must stay as it is; None if it can be converted."""
        raise NotImplementedError

    def by_hand(self, module: nn.Module) -> str:
        """The expression that converts a single module that matches, called `model`."""
        raise NotImplementedError

    def convert(self, module: nn.Module) -> nn.Module:
        """The replacement. Must not change `module`; may raise."""
        raise NotImplementedError

    def check_layer(self, module: nn.Module) -> None:
        """Raise the ValueError that `convert` would raise for a layer that is not refused, if that is cheap to find."""

    def whole_model(self) -> bool:
        """True if `prepared` or `finish` change the model, so that its layers cannot be replaced one by one."""
        return type(self).prepared is not Config.prepared or type(self).finish is not Config.finish

    def check(self, example_inputs: Any) -> None:
        """Raise ValueError if this config cannot do without example inputs, or not with these."""

    def prepared(self, swap: Swap) -> contextlib.AbstractContextManager[Mapping[nn.Module, str]]:
        """Change the model before its layers are looked at one by one; {layer: what was changed, or why it was not}.

        The changes last when the context ends, and are undone if it ends with an exception.
        """
        return contextlib.nullcontext({})

    def finish(self, swap: Swap) -> Mapping[str, str]:
        """Change the model after its layers are replaced; {name of a layer: what was changed, or why it was not}.

        May raise; all that it changes in modules of the model is undone then.
        """
        return {}

    def replace(self, layer: Layer) -> nn.Module | None:
        """Choose what takes the place of one layer, measured where there is an input; None if it stays.

        Must not change `layer.module`. Fills `layer.row`, above all its choice, or the reason why the layer stays.
        """
        new = self.convert(layer.module)
        row = layer.row
        if layer.captured is not None:
            # forward, not __call__: hooks belong to the model and shall not see these calls.
            row.ms_before, row.ms_after, row.sqnr_db = compare(layer.module.forward, new.forward, layer.captured)
        row.choice = self.choice
        return new

    def complete(self, layer: nn.Module, new: nn.Module, row: Row, names: list[str], tied: list[str]) -> None:
        """Give `new`, from `replace`, what `layer` has, and the row what there is to say; must not change `layer`.

        `names` are all that the layer has in the model, `tied` all that its weight has.
        """
        complete(layer, new, row, names, tied)
