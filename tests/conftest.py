"""Fixtures of all tests.

Memory is poisoned. torch.empty gives NaN (or the largest integer) inside the fixture `poison`. What C++ allocates is
filled by glibc itself with the byte 0xfe, about -1.7e38 as fp32 and bf16: an output that a kernel forgets to write, or
padding that it reads, cannot pass for a plausible number.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from auto_clock import clock as clock
from memory_use import without_holes_in_heap

from pyops import backend, measure

with contextlib.suppress(ImportError):  # tests/gpu runs without it
    import hypothesis

    # The same examples in every run; `pytest --hypothesis-profile=default` looks for others.
    hypothesis.settings.register_profile("repeatable", derandomize=True)
    hypothesis.settings.load_profile("repeatable")

CHECKOUT = Path(__file__).resolve().parents[1]
POISON_BYTE = 0xFE
M_PERTURB = -6  # of glibc's mallopt: new memory is filled with the complement of the byte


def _perturb_malloc() -> bool:
    try:
        glibc = "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
        return glibc and ctypes.CDLL(None).mallopt(M_PERTURB, 0xFF ^ POISON_BYTE) == 1
    except (AttributeError, OSError, ValueError):
        return False


MALLOC_POISONED = _perturb_malloc()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random layers of a test are the same whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty and its kin give NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_holes_in_heap() -> Iterator[None]:
    """What large tensors take and give back shows in the resident memory, whatever tests ran before."""
    with without_holes_in_heap():
        yield


@pytest.fixture(params=backend.native.available_cpu_isas() if backend.native else ["ref"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine, forced, and the one before put back; "ref" where nothing is compiled."""
    if backend.native is None:
        yield request.param
        return
    before = backend.native.cpu_isa()
    backend.native.force_cpu_isa(request.param)
    yield request.param
    backend.native.force_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """`swap_` times layers for milliseconds: what it measures is not looked at."""
    monkeypatch.setattr(measure, "TURN_S", 1e-4)
    monkeypatch.setattr(measure, "BUDGET_S", 1e-3)
    monkeypatch.setattr(measure, "STATE_BUDGET_S", 1e-3)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Starts and leaves torch.compile without the graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python *args` in a fresh process at the checkout, with these environment variables changed (None: unset)."""

    def run(*args: str, **env: str | None) -> subprocess.CompletedProcess:
        merged = {**os.environ, "PYTHONPATH": str(CHECKOUT), **env}
        merged = {name: value for name, value in merged.items() if value is not None}
        command = [sys.executable, *args]
        return subprocess.run(command, env=merged, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)

    return run
