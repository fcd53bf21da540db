"""`python -m pyops tune my_module:build_model --input 1x3x224x224`: what `Auto` makes of a model, and what that brings.

Exit codes: 0, the report was made; 1, the model raised an error; 2, a wrong argument; 3, the model is not as many times
faster as --require-speedup says.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyops.auto import Auto
from pyops.auto_layer import FAMILIES
from pyops.measure import check_inputs
from pyops.swap import swap_

MODEL_ERROR, USAGE_ERROR, TOO_SLOW = 1, 2, 3
DTYPES = {
    name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64", "int64", "int32", "bool")
}


class UsageError(ValueError):
    """A bad argument; the message says which."""


class ModelError(RuntimeError):
    """Code of the user's raised an error."""


def add_parser(commands: Any) -> None:
    """Add `tune` to the commands of the command line."""
    parser = commands.add_parser(
        "tune",
        help="swap the layers of a model for what is faster here, and print the report",
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[1],
    )
    parser.add_argument(
        "model",
        metavar="MODULE:FUNCTION",
        help="what makes the model: my_module:build_model or path/to/file.py:build_model. It is called without "
        "arguments and returns a torch.nn.Module, or (module, example inputs)",
    )
    parser.add_argument(
        "--input",
        metavar="SPEC",
        action="append",
        default=[],
        help="an argument of the model, random: 1x3x224x224, 1x128:int64 (zeros and ones), 1x128:int64:30522 (below "
        "30522), mask=1x128:bool (by keyword); once for each argument",
    )
    parser.add_argument("--min-sqnr-db", type=float, default=Auto.min_sqnr_db, help="default: %(default)s")
    parser.add_argument(
        "--allow", default=",".join(FAMILIES), help="families to try, comma-separated; default: %(default)s"
    )
    parser.add_argument("--device", default="cpu", help="where the model is put; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; default: as it is")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: all cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--no-cache", action="store_true", help="measure anew, and keep no times")
    parser.add_argument(
        "--require-speedup", type=float, metavar="X", help="exit with 3 if the model is not X times as fast"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        return _run(args)
    except UsageError as error:
        print(f"pyops tune: {error}", file=sys.stderr)
        return USAGE_ERROR
    except ModelError as error:
        traceback.print_exception(error.__cause__)
        print(f"pyops tune: {error}", file=sys.stderr)
        return MODEL_ERROR


def _run(args: argparse.Namespace) -> int:
    try:
        config = Auto(
            min_sqnr_db=args.min_sqnr_db,
            allow=tuple(name.strip() for name in args.allow.split(",")),
            cache=False if args.no_cache else None,
        )
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(str(error).split("\n")[0]) from error
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    for path in (args.json, args.html):
        if path is not None and not path.resolve().parent.is_dir():
            raise UsageError(f"{path}: there is no such folder")
    torch.manual_seed(0)
    positional, named = inputs_of(args.input)
    model, given = _built(_factory(args.model))
    if args.input and given is not None:
        raise UsageError(f"--input: {args.model} gives example inputs itself")
    if not args.input and given is None:
        raise UsageError(f"--input is needed: {args.model} gives a model without example inputs")
    model = model.eval().to(device=device, dtype=DTYPES[args.dtype] if args.dtype else None)
    example = _moved(given if given is not None else _example(positional, named), device, args.dtype)
    if named and positional:
        raise UsageError("--input: give all arguments by position or all by keyword")
    try:
        check_inputs(example)
    except TypeError as error:
        raise UsageError(f"{args.model}: {error}") from error
    try:
        report = swap_(model, config, example_inputs=example)
    except Exception as error:
        raise ModelError(f"the model cannot be run with these inputs: {type(error).__name__}") from error
    print(report)
    if args.json is not None:
        report.to_json(args.json)
        print(f"\n{args.json}")
    if args.html is not None:
        print(f"\n{report.save_html(args.html)}")
    speedup = report.whole.ms_before / report.whole.ms_after
    if args.require_speedup is not None and not speedup >= args.require_speedup:
        print(f"pyops tune: {speedup:.3f} times as fast, --require-speedup {args.require_speedup:g}", file=sys.stderr)
        return TOO_SLOW
    return 0


def inputs_of(specs: list[str]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Random tensors as the specs say; raises UsageError, naming the spec."""
    positional, named = [], {}
    for spec in specs:
        name, equals, rest = spec.rpartition("=")
        shape, *others = rest.split(":")
        kind, most, *more = [*others, *["float32", ""][len(others) :]]
        sizes = shape.split("x")
        hint = "write sizes joined by x, such as 1x3x224x224, 1x128:int64 or ids=1x128:int64:30522"
        if more or not all(size.isdecimal() for size in sizes) or (equals and not name.isidentifier()):
            raise UsageError(f"--input {spec!r}: {hint}")
        if kind not in DTYPES:
            raise UsageError(f"--input {spec!r}: {kind!r} is not one of {', '.join(DTYPES)}")
        dtype = DTYPES[kind]
        if most and (not most.isdecimal() or int(most) < 1 or dtype.is_floating_point):
            raise UsageError(f"--input {spec!r}: {most!r} must be a positive number, of an integer dtype")
        size = tuple(map(int, sizes))
        value = torch.randn(size).to(dtype) if dtype.is_floating_point else _integers(size, int(most or 2), dtype)
        if equals:
            named[name] = value
        else:
            positional.append(value)
    return positional, named


def _integers(size: tuple[int, ...], most: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(most, size).to(dtype)


def _example(positional: list[torch.Tensor], named: dict[str, torch.Tensor]) -> Any:
    return named or tuple(positional)


def _factory(spec: str) -> Callable[[], Any]:
    """The function that the spec names; raises UsageError, or ModelError if its module raises."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(
            f"{spec!r} must be MODULE:FUNCTION, such as my_module:build_model or models/net.py:build_model"
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _imported(place)
    except UsageError:
        raise
    except Exception as error:
        raise ModelError(f"{place} cannot be imported: {type(error).__name__}") from error
    if not hasattr(module, name):
        raise UsageError(f"{place} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise UsageError(f"{spec} is a {type(function).__name__}, not a function that makes a model")
    return function


def _imported(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[: error.name.count(".") + 1] == error.name.split("."):
            raise UsageError(f"there is no module {error.name!r} here or among what is installed") from error
        raise
    finally:
        sys.path.remove(os.getcwd())


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look there
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _built(function: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """(the model, example inputs or None)."""
    try:
        made = function()
    except Exception as error:
        raise ModelError(f"{function.__name__}() raised {type(error).__name__}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{function.__name__}() gives a {type(model).__name__}, not a torch.nn.Module")
    return model, example


def _moved(example: Any, device: torch.device, dtype: str | None) -> Any:
    def move(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return t.to(device, DTYPES[dtype] if dtype and t.is_floating_point() else t.dtype)

    return torch.utils._pytree.tree_map(move, example)
