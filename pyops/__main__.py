"""`python -m pyops info | bench | demo | tune`: exit code 0 if all is well, 2 for a usage error."""

from __future__ import annotations

import argparse
import json
import sys

import pyops
from pyops import demo, tune_command


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        # Before argparse, so that bench sees every argument of its own, --help too.
        from pyops.bench import run

        return run.main(argv[1:])
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"pyops {args.command}: interrupted", file=sys.stderr)
        return 130  # as a shell says it of a signal


def _info(args: argparse.Namespace) -> int:
    found = pyops.info()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def parser() -> argparse.ArgumentParser:
    """Of all commands but `bench`, which has its own."""
    every = argparse.ArgumentParser(prog="python -m pyops", description=pyops.__doc__)
    every.add_argument("--version", action="version", version=pyops.__version__)
    commands = every.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what is active here and why", description="What is active here and why.")
    info.add_argument("--json", action="store_true", help="machine-readable")
    info.set_defaults(run=_info)
    tune_command.add_parser(commands)
    demo.add_parser(commands)
    commands.add_parser(
        "bench", help="time kernels against their peers; `bench --help` for its arguments", add_help=False
    )
    return every


if __name__ == "__main__":
    sys.exit(main())
