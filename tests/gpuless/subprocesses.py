"""Run a Python process over the checkout, whatever this process has set or imported."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]


def run_python(*args: str, **environment: str) -> subprocess.CompletedProcess:
    """`python *args` in the checkout, single-threaded, without this process's settings of Triton, pyops and pytest."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYOPS_", "PYTEST_"))}
    search_path = os.pathsep.join(
        filter(None, [str(CHECKOUT), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")])
    )
    return subprocess.run(
        [sys.executable, *args],
        cwd=CHECKOUT,
        env={**inherited, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
