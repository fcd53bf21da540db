"""What was changed in the modules of a model: seen by comparing, undone, done again.

A `Snapshot` remembers which objects the modules hold, not what is in them: attributes, parameters, buffers, children,
hooks, and which memory the parameters use. What is written into that memory afterwards is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TENSORS_AND_CHILDREN = ("_parameters", "_buffers", "_modules")
ABSENT = object()
"""In the place of a value where a dict has no such key."""


class Snapshot:
    """The state of some modules, to be put back or compared with."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        # The dicts within are changed in place by nn.Module, so they are copied too: _parameters, _modules, hooks …
        self._attributes = [dict(module.__dict__) for module in self.modules]
        self._inner = [_inner_dicts(module) for module in self.modules]
        parameters = {id(p): p for module in self.modules for p in module._parameters.values() if p is not None}
        self._data = [(p, p.data) for p in parameters.values()]

    def restore(self) -> None:
        """Put everything back; may be called any number of times."""
        for module, attributes, inner in zip(self.modules, self._attributes, self._inner, strict=True):
            _refill(module.__dict__, attributes)
            for name, content in inner.items():
                _refill(module.__dict__[name], content)
        for parameter, data in self._data:
            if not same_memory(parameter.data, data):
                parameter.data = data

    def changes(self) -> Edit:
        """What is different now: parameters and their memory, buffers, children, and attributes.

        Attributes only of modules of torch and of ours, and forward functions: others are set by a model's own code,
        when it runs.
        """
        dicts, attributes = [], []
        for module, before, inner in zip(self.modules, self._attributes, self._inner, strict=True):
            for name in TENSORS_AND_CHILDREN:
                now = dict(module.__dict__[name])
                if not _same(inner[name], now):
                    dicts.append((module, name, inner[name], now))
            known = type(module).__module__.partition(".")[0] in ("torch", "pyops")
            for name in {**before, **module.__dict__} if known else ("forward",):
                old, new = before.get(name, ABSENT), module.__dict__.get(name, ABSENT)
                if old is not new and name != "training":
                    attributes.append((module, name, old, new))
        data = [(p, old, p.data) for p, old in self._data if not same_memory(p.data, old)]
        return Edit(self.modules[0], dicts, attributes, data)


class Edit:
    """Changes to a model that can be undone and done again; holds what was there before and after."""

    def __init__(
        self,
        root: nn.Module,
        dicts: list[tuple[nn.Module, str, dict, dict]],
        attributes: list[tuple[nn.Module, str, Any, Any]],
        data: list[tuple[nn.Parameter, Tensor, Tensor]],
    ) -> None:
        self.root = root
        self._dicts, self._attributes, self._data = dicts, attributes, data

    def __bool__(self) -> bool:
        return bool(self._dicts or self._attributes or self._data)

    def undo(self) -> None:
        """Everything as it was before."""
        for module, name, before, _ in self._dicts:
            _refill(module.__dict__[name], before)
        for module, name, before, _ in self._attributes:
            _assign(module, name, before)
        for parameter, before, _ in self._data:
            parameter.data = before

    def redo(self) -> None:
        """Everything as it was after."""
        for module, name, _, after in self._dicts:
            _refill(module.__dict__[name], after)
        for module, name, _, after in self._attributes:
            _assign(module, name, after)
        for parameter, _, after in self._data:
            parameter.data = after

    def replaced(self) -> list[tuple[nn.Module, nn.Module]]:
        """(module before, module after) for every child that took the place of another."""
        pairs = {}
        for _, name, before, after in self._dicts:
            if name == "_modules":
                for key in before.keys() & after.keys():
                    old, new = before[key], after[key]
                    if old is not new and old is not None and new is not None:
                        pairs[id(old)] = (old, new)
        return list(pairs.values())

    def changed_since(self) -> list[str]:
        """What is no longer as this edit left it, in words."""
        found = []
        for module, name, _, after in self._dicts:
            if not _same(module.__dict__.get(name, {}), after):
                found.append(f"{name} of a {type(module).__name__}")
        for module, name, _, after in self._attributes:
            if module.__dict__.get(name, ABSENT) is not after:
                found.append(f"{name} of a {type(module).__name__}")
        return found


@contextlib.contextmanager
def undoing(modules: Iterable[nn.Module]) -> Iterator[Snapshot]:
    """Put everything that these modules hold back if the body raises, whatever it raises."""
    snapshot = Snapshot(modules)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise


class ModelState:
    """A model and torch's modes and random state, to be put back after an interrupt, which may come anywhere.

    Also what is in the buffers, which a model's own forward may write into.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = Snapshot(model.modules())
        self._grad, self._rng = torch.is_grad_enabled(), torch.random.get_rng_state()
        self._buffers = [(b, b._version, b.clone()) for b in _writable_buffers(model)]

    def restore(self) -> None:
        """Put everything back; may be called any number of times."""
        self.modules.restore()
        self.restore_buffers()
        torch.set_grad_enabled(self._grad)
        torch.random.set_rng_state(self._rng)

    def restore_buffers(self) -> None:
        """Put the values of buffers back that were written into."""
        with torch.no_grad():
            for buffer, version, value in self._buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True if both are the same elements of the same memory, in the same order."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    try:
        return a.stride() == b.stride() and a.data_ptr() == b.data_ptr()
    except (RuntimeError, NotImplementedError):  # no memory of its own: fake, sharded, sparse. Nothing here swaps that.
        return True


def _writable_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that a forward could write into; not the weights of our own layers, which it only reads."""
    modules = [m for m in model.modules() if not type(m).__module__.startswith("pyops.")]
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    return [b for b in {id(b): b for b in buffers}.values() if not (b.is_inference() or b.is_meta)]


def _inner_dicts(module: nn.Module) -> dict[str, dict]:
    return {name: dict(value) for name, value in module.__dict__.items() if isinstance(value, dict)}


def _same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(a[key] is b[key] for key in a)


def _refill(target: dict, content: dict) -> None:
    if not _same(target, content):
        target.clear()
        target.update(content)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    if value is ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value
