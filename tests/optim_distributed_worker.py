"""Runs checks of `pyops.optim` on one of two ranks; `test_optim_distributed.py` starts it, and by hand

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/optim_distributed_worker.py FOLDER [CHECK ...]

What each check said is written to `FOLDER/<rank>`. After one that failed the ranks are out of step, so both stop.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import cases
import optim_distributed_dcp
import optim_distributed_ddp
import optim_distributed_fsdp
import torch.distributed as dist
from optim_distributed_cases import CHECKS, RANKS

FILLED_BY = (optim_distributed_ddp, optim_distributed_fsdp, optim_distributed_dcp)
PATIENCE = timedelta(seconds=60)
"""For the other rank, which may have failed."""


def main(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo", timeout=PATIENCE)
    assert dist.get_world_size() == RANKS
    with open(folder / str(dist.get_rank()), "w") as file:
        for name in names or CHECKS:
            start, problem = time.perf_counter(), None
            try:
                CHECKS[name](folder)
                dist.barrier()
            except BaseException:
                problem = traceback.format_exc()
            print(json.dumps([name, problem, time.perf_counter() - start]), file=file, flush=True)
            if problem is not None:
                print(problem, file=sys.stderr, flush=True)
                os._exit(1)  # an orderly end would wait for the other rank
    cases.end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
