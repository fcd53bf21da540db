"""The runner of all benchmarks: `python -m pyops bench OP`, or `python -m pyops.bench.run OP`.

For each thread count every peer gets a worker process that lives over all cases. For each case the workers build and
compute it; a result that is not right is reported as wrong and gets no time. Then the workers take turns, one at a
time, a few rounds, so that a noisy moment of the machine hits all of them; a noisy case gets more rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pyops.bench import case as cases
from pyops.bench import machine, plot, report
from pyops.bench.case import Case, Op
from pyops.bench.peers import select
from pyops.bench.runner import FOREIGN_CPUS, Runner


class UsageError(ValueError):
    """A bad argument; the message says which."""


def run_op(spec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Benchmark one op: prints its tables, returns the document that becomes the JSON."""
    op, module = cases.load(spec)
    chosen = _chosen(op, args)
    kinds = select(module.PEERS, args.against)
    kinds = [kind for kind in kinds if args.device in kind.devices]
    document: dict[str, Any] = {
        "schema": report.SCHEMA,
        "op": op.name,
        "title": op.title,
        "baseline": op.baseline,
        "cache_titles": op.cache_titles,
        "ops_unit": op.ops_unit,
        "families": {name: dataclasses.asdict(family) for name, family in op.families.items()},
        "family_axis": op.family_axis,
        "quick": args.quick,
        "machine": machine.describe(args.device),
        "threads": args.threads,
        "ceilings": {},
        "peers": [
            {"name": k.name, "role": k.role, "runs": k.runs, "excluded": k.excluded, "package": k.package}
            | {"version": k.version(), "missing": k.missing(args.device)}
            for k in kinds
        ],
    }
    rows: list[report.Row] = []
    progress = _progress(len(chosen) * len(args.threads), op.name)
    for threads in args.threads:
        runner = Runner(op, spec, chosen, kinds, threads, args)
        document["ceilings"][str(threads)] = runner.ceilings
        try:
            for _, together in itertools.groupby(chosen, key=lambda case: case.shared or case.name):
                case, *others = together
                progress.set_postfix_str(f"{case.name} {threads}T")
                if progress.disable:  # what follows may take minutes before it prints anything
                    print(f"{op.name}: {case.name} {threads}T, building", file=sys.stderr, flush=True)
                fresh = runner.rows([case, *others])
                rows += fresh
                progress.clear()
                _print_case(op, case, threads, [row for row in fresh if row["case"] == case.name])
                for other in others:
                    print(report.line([row for row in fresh if row["case"] == other.name]), flush=True)
                progress.update(1 + len(others))
        finally:
            runner.close()
    progress.close()
    return {
        **document,
        "rows": rows,
        "points": report.points(rows),
        "summary": report.summarize(rows, document["families"]),
    }


def _chosen(op: Op, args: argparse.Namespace) -> list[Case]:
    """The cases that --cases, --full and --device leave."""
    every = args.full or args.cases is not None
    named = [case for case in op.cases if fnmatch.fnmatch(case.name, args.cases or "*") and (case.default or every)]
    return [case for case in named if args.device in case.devices]


def _print_case(op: Op, case: Case, threads: int, rows: list[report.Row]) -> None:
    for cache in dict.fromkeys(row["cache"] for row in rows if row["cache"]):
        title = f"{case.name}  {threads} thread{'s' * (threads > 1)}, {op.cache_titles[cache]}"
        busy = max(row.get("foreign_cpus", 0.0) for row in rows)
        noise = f"\n  NOISY: other processes used {busy:.1f} CPUs meanwhile" * (busy > FOREIGN_CPUS)
        shown = [row for row in rows if row["cache"] in (cache, None)]
        print(f"\n{title}  ({case.source}){noise}\n{report.table(shown, op.ops_unit)}", flush=True)
        if case.against and any(row["role"] == "figure" for row in shown):
            print(f"  measured against {', '.join(case.against)}; the others (*) are only shown", flush=True)
        for point in report.points(shown):
            if point["target"] is not None and point["speedup"] is not None:
                word = "reached" if point["speedup"] >= point["target"] else "missed"
                ratio = f"{point['speedup']:.2f}× over {point['best_peer']}"
                print(f"  target {point['target']:g}× {word}: {ratio}", flush=True)
    if not any(row["cache"] for row in rows):
        print(f"\n{case.name}  {threads}T\n{report.table(rows, op.ops_unit)}", flush=True)


def list_ops(device: str) -> str:
    """The ops with their cases and peers, in words."""
    lines = []
    for name in cases.op_names():
        op, module = cases.load(name)
        lines += [f"{op.name}: {op.title}", f"  cases: {', '.join(case.name for case in op.cases)}", "  peers:"]
        for kind in module.PEERS:
            state = kind.missing(device) or kind.version()
            lines.append(
                f"    {kind.name.ljust(16)} {kind.runs} [{state}]" + f" ({kind.excluded})" * bool(kind.excluded)
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyops bench", description="Benchmark ops against their peers.")
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="an op, or a .py file that defines OP and PEERS; none: list"
    )
    parser.add_argument(
        "--against", type=lambda s: s.split(","), help="only these peers, comma-separated (ours always runs)"
    )
    parser.add_argument("--threads", help="thread counts, comma-separated; default: 1 and all cores")
    parser.add_argument("--cases", help="only cases whose name matches this glob")
    parser.add_argument("--full", action="store_true", help="also the cases that are left out by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--quick", action="store_true", help="short turns, few rounds: for a first look, not for a claim"
    )
    parser.add_argument("--skip-ceilings", action="store_true", help="do not measure the machine's ceilings")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where the JSON goes")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="where the PNG goes; default: beside the JSON")
    parser.add_argument("--replot", type=Path, metavar="JSON", help="draw the plot of an earlier run and exit")
    parser.add_argument("--list", action="store_true", help="list ops, cases and peers and exit")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Complete the arguments. Raises UsageError."""
    if args.threads is None:
        args.threads = sorted({1, machine.cores()}) if args.device == "cpu" else [1]
    else:
        words = args.threads.split(",")
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            raise UsageError(f"--threads must be positive numbers, comma-separated, got {args.threads!r}")
        args.threads = list(dict.fromkeys(int(word) for word in words))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here")
    if len(args.ops) > 1 and (args.json or args.plot):
        raise UsageError("--json and --plot name one file; give one OP with them")
    for spec in args.ops:
        try:
            op, module = cases.load(spec)
            select(module.PEERS, args.against)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not _chosen(op, args):
            names = ", ".join(case.name for case in op.cases if args.device in case.devices)
            what = f"--cases {args.cases!r} matches no case" if args.cases else f"--device {args.device}: no case"
            raise UsageError(f"{what} of {op.name}; there are: {names}")


def _default_json(document: dict[str, Any]) -> Path:
    """bench/results/ in a checkout, else the working directory. A quick run never takes the place of a real one."""
    results = Path(__file__).resolve().parent / "results"
    folder = results if (results.parents[1] / "pyproject.toml").is_file() else Path()
    quick = "-quick" if document["quick"] else ""
    return folder / f"{document['op']}-{machine.slug(document['machine'])}{quick}.json"


def _progress(total: int, title: str) -> Any:
    """A tqdm bar, or a stand-in that shows nothing where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoProgress()
    return tqdm(total=total, desc=title, unit="case", file=sys.stderr, disable=None)


class _NoProgress:
    disable = True

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _NoProgress:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if ours is right everywhere, 1 if not, 2 for a bad argument."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if args.replot:
            print(plot.replot(args.replot, args.plot))
            return 0
        _check(args)
    except (UsageError, OSError, ValueError) as error:
        print(f"pyops bench: {error}", file=sys.stderr)
        return 2
    if args.list or not args.ops:
        print(list_ops(args.device))
        return 0
    failed = False
    for spec in args.ops:
        began = time.monotonic()
        document = run_op(spec, args)
        path = args.json or _default_json(document)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"\n{report.summary_text(document)}\n\n{path}")
        try:
            print(plot.replot(path, args.plot))
        except ModuleNotFoundError as error:
            print(f"no plot: {error}; pip install matplotlib, then --replot {path}")
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
        failed |= any(r["role"] == "ours" and r["status"] in ("wrong", "error") for r in document["rows"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
