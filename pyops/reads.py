"""Parents that read the weight of a child in their forward, instead of only calling it: the child cannot be replaced.

What is looked at is the byte code of `forward` and of the methods that it calls: `self.dt_proj.weight` is there as two
loads of attributes, one after the other.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

LOADS = ("LOAD_ATTR", "LOAD_METHOD")
HARMLESS = ("device", "shape")
"""What may be asked of a weight. Not its dtype: inputs would be cast to it."""
PADDING = ("CACHE", "EXTENDED_ARG", "NOP")


def reads_weight(parent: nn.Module, child: str) -> bool:
    """True if the forward of `parent` uses `self.<child>.weight`; False for torch's modules, which are known."""
    cls = type(parent)
    return cls.__module__.partition(".")[0] != "torch" and child in _read_by(cls)


@functools.lru_cache(maxsize=1024)
def _read_by(cls: type[nn.Module]) -> frozenset[str]:
    """The children whose weights the forward of a class uses."""
    found, seen, todo = set(), set(), ["forward"]
    while todo:
        name = todo.pop()
        function = getattr(cls, name, None)
        code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
        if name in seen or code is None or (function.__module__ or "").startswith("torch."):
            continue
        seen.add(name)
        for part in _with_inner(code):
            steps = [step for step in dis.get_instructions(part) if step.opname not in PADDING]
            for a, b, c in zip(steps, steps[1:], steps[2:], strict=False):
                loaded = a.opname in LOADS and b.opname in LOADS and b.argval == "weight"
                if loaded and not (c.opname in LOADS and c.argval in HARMLESS):
                    found.add(a.argval)
            todo += part.co_names
    return frozenset(found)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """The code and that of functions and comprehensions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
