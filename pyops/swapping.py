"""A swap under way: which layers are looked at, what is made of each, and how it is put into its place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyops.config import Config, FilterFn, Layer
from pyops.edit import Snapshot
from pyops.measure import Captured, captured_inputs, evaluating
from pyops.progress import with_progress
from pyops.reads import reads_weight
from pyops.replacing import commit, names_of_weights, nbytes, weight_and_bias
from pyops.report import UNCHANGED, Row, Whole


@dataclasses.dataclass
class Swap:
    """One call of `pyops.swap_`."""

    model: nn.Module
    config: Config
    filter_fn: FilterFn | None
    example_inputs: Any
    names: dict[nn.Module, list[str]]
    """The layers that have a row, with all their names."""
    rows: dict[nn.Module, Row]
    training: dict[nn.Module, bool]
    """The training flags that they had."""
    original: Snapshot | None = None
    """The model before anything; None where layers are replaced one by one."""
    dense: Snapshot | None = None
    """The model after the config prepared it, before the first layer was replaced; None until then."""
    made: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)
    """What takes the place of a layer, and in `finish` has taken it."""
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the config keeps from one of its methods, and one layer, to the next."""
    whole: Whole | None = None
    """For the report, if the config looks at the whole model."""
    _blank: dict[nn.Module, Row] = dataclasses.field(default_factory=dict)
    """The rows before anything was made of their layers."""

    @property
    def measured(self) -> bool:
        """True if layers are measured."""
        return self.example_inputs is not None

    def taken(self) -> list[nn.Module]:
        """The layers to replace; the rows of the others say why they stay."""
        taken = []
        for module, found in self.names.items():
            refusal = self.config.refusal(module) or _read_by_parent(self.model, found)
            refusal = refusal or _filtered(module, found, self.filter_fn)
            if refusal:
                self.rows[module].add(refusal)
            else:
                taken.append(module)
        return taken

    def choose(self, layers: list[nn.Module]) -> None:
        """Make what takes the place of each of these layers, measured on its input, beside the model that holds it."""
        tied = names_of_weights(self.model, layers)
        with evaluating(self.model):
            found = captured_inputs(self.model, layers, self.example_inputs) if self.measured else unmeasured(layers)
            for module, captured in with_progress(found, len(layers), self.measured, "pyops.swap_", "layer"):
                self._blank[module] = dataclasses.replace(self.rows[module])
                new = self.make(module, captured)
                if new is not None:
                    self.made[module] = new
        for module in layers:
            if module in self.made:
                new, found = self.made[module], self.names[module]
                new.train(self.training[module])
                self.config.complete(module, new, self.rows[module], found, tied[module])

    def forget(self, layers: Iterable[nn.Module]) -> None:
        """Take back what was made of these layers; they stay in the model from the next `place` on."""
        for module in layers:
            del self.made[module]
            self.rows[module].__dict__.update(vars(self._blank[module]))

    def make(self, module: nn.Module, captured: Captured | None) -> nn.Module | None:
        """What takes the place of one layer; None if it stays."""
        name, row = self.names[module][0], self.rows[module]
        if captured is not None:
            row.input_shape = tuple(captured.x.shape)
        if captured is not None and captured.x.is_meta:
            row.input_shape = captured = None
        elif captured is None and self.measured:
            row.add("not called with these example_inputs")
        with naming(name):
            return self.config.replace(Layer(module, name, row, captured, self.shared))

    def place(self) -> None:
        """Put all that is made into its place, in the model as it was before the first was."""
        self.dense.restore()
        commit(self.dense.modules, self.made, self.rows)


def new_swap(model: nn.Module, config: Config, filter_fn: FilterFn | None, example_inputs: Any) -> Swap:
    """A swap in which nothing has happened: every layer has its row."""
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if config.matches(module) or config.mentions(module):
            names[module].append(name)
    rows = {module: _row(module, found, config.matches(module)) for module, found in names.items()}
    training = {module: module.training for module in names}
    return Swap(model, config, filter_fn, example_inputs, dict(names), rows, training)


def unmeasured(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, None]]:
    """Each layer without an input."""
    return ((module, None) for module in layers)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """TypeError and ValueError tell the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"layer {name!r}: {error}") from error


def _row(module: nn.Module, found: list[str], layer: bool) -> Row:
    cls = type(module)
    kind = cls.__bases__[0] if nn.utils.parametrize.is_parametrized(module) else cls
    # Of another kind of module any tensor may be the largest, and an attribute of that name a computed one.
    own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    held = weight_and_bias(module) if layer else sorted(own, key=torch.numel, reverse=True)
    shape = tuple(held[0].shape) if held and held[0] is not None else ()
    size = nbytes(held)
    return Row(found[0], kind.__name__, UNCHANGED, "", shape, size, size)


def _read_by_parent(model: nn.Module, found: list[str]) -> str | None:
    """Why it must stay because a parent uses its weight, under any of its names."""
    for name in found:
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if reads_weight(parent, child):
            return f"its parent ({type(parent).__name__}) reads its weight instead of only calling the layer"
    return None


def _filtered(module: nn.Module, found: list[str], filter_fn: Callable | None) -> str | None:
    refused = [name for name in found if filter_fn is not None and not filter_fn(module, name)]
    if not refused:
        return None
    return "filter_fn" if len(found) == 1 else f"filter_fn refuses it as {', '.join(refused)}; it is also {found}"
