"""What a benchmark is made of: an `Op` with its `Case`s. Every file `bench/<op>.py` defines one `OP`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

Inputs = dict[str, torch.Tensor]


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


@dataclass(frozen=True)
class Op:
    """One op: its cases, how to make inputs and what is right."""

    name: str
    title: str
    cases: tuple[Case, ...]
    make_inputs: Callable[[Case, torch.device], Inputs]
    """Deterministic: every process makes the same tensors."""
    oracle: Callable[[Inputs], torch.Tensor]
    """The result without quantization, which every peer must approach."""
    reference: Callable[[Inputs], torch.Tensor]
    """What our kernel must compute, to the last bits."""
    min_sqnr_db: float
    """A peer whose signal-to-quantization-noise ratio against `oracle` is lower is wrong."""
    max_error_eps: float
    """Ours is wrong if an element differs from `reference` by more than this · eps(dtype) · max|reference|."""
    baseline: str
    """The peer that stands for plain PyTorch."""
    peak: str
    """The key in the ceilings that bounds `Case.ops`: "int8_gops" or "fp32_gflops"."""
    inference: bool = True
    """Time under `torch.inference_mode()`."""


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
