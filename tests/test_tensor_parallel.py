"""Quantized layers split over two processes by `parallelize_module` equal one process: tensor_parallel_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_worker as worker
import torch.distributed as dist
from conftest import CHECKOUT

from pyops.parallel import RowwiseParallel

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each rank has left a file for each check that passed, and its log."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    env = {**os.environ, "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'tests'}", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(worker.RANKS):
        with (folder / f"log.{rank}").open("w") as log:
            command = [sys.executable, worker.__file__, str(rank), str(folder)]
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in started:
            process.wait(timeout=400)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("check", worker.CHECKS)
def test_two_ranks(ranks: Path, check: str) -> None:
    for rank in range(worker.RANKS):
        assert (ranks / f"{check}.{rank}").exists(), (ranks / f"log.{rank}").read_text()[-3000:]


def test_unknown_row_maxima() -> None:
    with pytest.raises(ValueError, match="row_maxima='mine' is not one of global, local"):
        RowwiseParallel(row_maxima="mine")
