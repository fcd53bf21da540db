"""Runs every interpreted_*.py of this folder in its own process, where Triton interprets kernels on CPU tensors.

Triton decides at the definition of a kernel whether it is compiled or interpreted, so neither this process nor its
environment can be used. To run them by hand:

    TRITON_INTERPRET=1 PYOPS_BACKEND=triton pytest tests/gpuless/interpreted_*.py
"""

import importlib.util

import pytest
from subprocesses import HERE, run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("file", sorted(HERE.glob("interpreted_*.py")), ids=lambda file: file.stem)
def test_interpreted(file):
    result = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), TRITON_INTERPRET="1", PYOPS_BACKEND="triton"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " skipped" not in result.stdout.splitlines()[-1], result.stdout
