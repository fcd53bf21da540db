"""What a benchmark is made of: an `Op` with its `Case`s. Every file `bench/<op>.py` defines one `OP`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Inputs = dict[str, Any]
"""What `Op.make_inputs` makes: tensors by name, for ops on many tensors also lists of them and the case itself."""

CACHE_TITLES = {"warm": "warm weights", "cold": "cold weights"}


@dataclass(frozen=True)
class Pass:
    """One pass over memory: some arrays are read, others updated in place, all equally long."""

    bytes: float
    """What it moves; an updated byte counts twice."""
    reads: int
    updates: int

    @property
    def footprint(self) -> float:
        """Bytes of all arrays together."""
        return self.bytes * (self.reads + self.updates) / (self.reads + 2 * self.updates)


@dataclass(frozen=True)
class Case:
    """One point: a shape from a real model."""

    name: str
    group: str
    """The plot puts the cases of one group side by side."""
    label: str
    """Names the case inside its group."""
    dims: dict[str, int]
    ops: float
    """Arithmetic operations of one call; a multiply-add is two."""
    bytes: float
    """Bytes that one call of our kernel must read and write; other formats are held to the same number."""
    source: str
    """The model that this shape comes from."""
    cold: bool = True
    """Also time with weights that are not in the cache."""
    ours: str = "pyops"
    """The peer that is ours in this case."""
    counted: bool = True
    """False keeps the case out of the means (call overhead, say)."""
    passes: tuple[Pass, ...] = ()
    """How `bytes` are moved, where some are written: the roof is then the time of these passes. Else all is read."""
    target: float | None = None
    """The ratio to the best peer that is aimed at, with more than one thread."""
    against: tuple[str, ...] | None = None
    """The peers that compete here; None: all that compete anywhere."""
    min_sqnr_db: float | None = None
    """In place of the op's."""
    ours_min_sqnr_db: float | None = None
    """What ours must reach, where there is no reference to compare with to the last bits."""
    reference_min_sqnr_db: float | None = None
    """What ours must reach against the op's reference, where that is not to be met to the last bits."""
    peak: str | None = None
    """In place of the op's."""
    family: str | None = None
    """The key in `Op.families` of those cases whose geometric mean is looked at together."""
    shared: str | None = None
    """Cases in a row with the same key differ in nothing that the other peers look at (in sparsity, say): they are run
    together, and all peers but ours are checked and timed in the first of them, for all."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    default: bool = True
    """False: run only with --full, or if --cases is given."""


@dataclass(frozen=True)
class Family:
    """Cases that make one point of a curve: the geometric mean of their ratios to the best peer."""

    line: str
    """The curve."""
    at: float
    """Where on `Op.family_axis`."""
    target: float | None = None
    """The geometric mean that is aimed at, with any number of threads."""


@dataclass(frozen=True)
class Op:
    """One op: its cases, how to make inputs and what is right."""

    name: str
    title: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.device], Inputs]
    """Deterministic: every process makes the same tensors."""
    oracle: Callable[[Inputs], torch.Tensor]
    """The exact result (without quantization, in float64), which every peer must approach."""
    min_sqnr_db: float
    """A peer whose signal-to-noise ratio against `oracle` is lower is wrong."""
    baseline: str
    """The peer that stands for plain PyTorch."""
    peak: str | None
    """The key in the ceilings that bounds `Case.ops`: "int8_gops" or "fp32_gflops"; None: memory alone is the limit."""
    reference: Callable[[Inputs], torch.Tensor | None] | None = None
    """What our kernel must compute, to the last bits or to `Case.reference_min_sqnr_db`; None: `Case.ours_min_sqnr_db`
    is what is asked of ours."""
    max_error_eps: float = 0.0
    """Ours is wrong if an element differs from `reference` by more than this · eps(dtype) · max|reference|."""
    inference: bool = True
    """Time under `torch.inference_mode()`."""
    checks: str = "SQNR"
    """What the signal-to-noise ratio is called in messages."""
    ops_unit: str = "GOP/s"
    """The unit of 10⁹ `Case.ops` a second."""
    cache_titles: dict[str, str] = field(default_factory=lambda: dict(CACHE_TITLES))
    """What "warm" and "cold" mean here, for tables and plots."""
    families: dict[str, Family] = field(default_factory=dict)
    """With them the plot shows curves in place of bars."""
    family_axis: str = ""


def op_names() -> list[str]:
    """The names of the ops that have a benchmark: modules of `pyops.bench` that define `OP`."""
    package = importlib.import_module("pyops.bench")
    found = []  # by their source: importing every module just to list them would be slow
    for module in pkgutil.iter_modules(package.__path__):
        source = Path(module.module_finder.path) / f"{module.name}.py"
        if source.is_file() and "\nOP = Op(" in source.read_text(encoding="utf-8"):
            found.append(module.name)
    return sorted(found)


def load(spec: str) -> tuple[Op, ModuleType]:
    """The op called `spec`, or that of a file `spec` ending in .py, and the module that holds its `PEERS`.

    The peers of `bench/<op>.py` stand in `bench/<op>_peers.py`; a file named by path may hold both. Raises ValueError
    if there is no such op.
    """
    if spec.endswith(".py"):
        path = Path(spec)
        if not path.is_file():
            raise ValueError(f"there is no file {spec}")
        module_spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        if not isinstance(getattr(module, "OP", None), Op):
            raise ValueError(f"{spec} defines no OP")
        return module.OP, module
    if spec not in op_names():
        raise ValueError(f"no op {spec!r}; there are: {', '.join(op_names())}, or a path to a .py file that defines OP")
    return importlib.import_module(f"pyops.bench.{spec}").OP, importlib.import_module(f"pyops.bench.{spec}_peers")
