"""`pyops.optim` on two ranks of gloo: DDP, FSDP2, tensor parallelism, ZeRO and checkpoints; and on several threads.

The checks are in `optim_distributed_*.py`. One start of torchrun runs all that are selected; after one that failed, the
rest is started anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

import optim_distributed_dcp as checkpoints
from conftest import CHECKOUT, MALLOC_POISONED
from optim_cases import ours, randn
from optim_distributed_cases import CHECKS, RANKS
from optim_distributed_ddp import stepped
from safetensors import safe_open
from safetensors.torch import save_file

WORKER = CHECKOUT / "tests" / "optim_distributed_worker.py"
PATIENCE = 240  # seconds
STARTS = 5
"""No more of torchrun: something is wrong with all checks then."""

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # says DCP in one process


def start(folder: Path, names: list[str]) -> dict[str, str]:
    """Run checks on two ranks; what each said that was run to its end, nothing if it passed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "tests")))}
    env.pop("OMP_NUM_THREADS", None)  # torchrun sets it
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if MALLOC_POISONED:
        env["MALLOC_PERTURB_"] = "1"
    files = [folder / str(rank) for rank in range(RANKS)]
    for file in files:
        file.write_text("")
    torchrun = subprocess.Popen(
        [*command, f"--nproc-per-node={RANKS}", str(WORKER), str(folder), *names],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = torchrun.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        torchrun.terminate()  # it ends the ranks
        printed, _ = torchrun.communicate(timeout=60)
    by_rank = [dict(json.loads(line)[:2] for line in file.read_text().splitlines()) for file in files]
    said = {}
    for name in names:
        problems = [f"rank {rank}: {report[name]}" for rank, report in enumerate(by_rank) if report.get(name)]
        if problems or all(name in report for report in by_rank):
            said[name] = "\n".join(problems)
    if not any(said.values()) and len(said) < len(names):
        unfinished = next(name for name in names if name not in said)
        said[unfinished] = f"torchrun ended with {torchrun.returncode} in it:\n{printed[-8000:]}"
    return said


class Checked(NamedTuple):
    folder: Path
    said: dict[str, str]

    def passed(self, name: str) -> Path:
        """The folder of the check; the test fails here if the check did."""
        if self.said[name]:
            pytest.fail(f"{name}\n{self.said[name]}", pytrace=False)
        return self.folder


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Every check that a selected test asks for, run."""
    folder = tmp_path_factory.mktemp("ranks")
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    asked = {item.callspec.params.get("check") for item in items}
    rest = [name for name in CHECKS if name in asked]
    if any(name.startswith("dcp") for name in rest):
        checkpoints.write_in_one_process(folder)
    said: dict[str, str] = {}
    for _ in range(STARTS):
        if rest:
            said |= start(folder, rest)
            rest = [name for name in rest if name not in said]
    return Checked(folder, said | dict.fromkeys(rest, "not run: too many others failed"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(check, checked):
    checked.passed(check)


@pytest.mark.parametrize("check", ["dcp_between_ranks"])
def test_checkpoint_of_two_ranks_goes_on_in_one_process(check, checked):
    checkpoints.read_in_one_process(checked.passed(check))


@pytest.mark.parametrize("check", ["dcp_between_ranks"])
def test_checkpoint_of_two_ranks_goes_on_in_torch(check, checked):
    checkpoints.read_by_torch(checked.passed(check))


@pytest.mark.parametrize("check", ["dcp_between_ranks"])
def test_checkpoint_of_8_bit_states_is_not_read_as_fp32(check, checked):
    checkpoints.read_codes_as_floats(checked.passed(check))


@pytest.mark.parametrize("check", ["results_do_not_depend_on_the_number_of_threads"])
def test_a_rank_of_one_thread_gets_the_same_bits_as_this_process(check, checked):
    expected, actual = torch.load(checked.passed(check) / "threads.pt"), stepped(2)
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("options", [{"state_dtype": "int8", "ema_decay": 0.9}, {"state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Lion"])
def test_safetensors(name, options, tmp_path):
    """States as flat tensors and groups as JSON, without pickle: the next steps are the same to the last bit."""
    layouts = [randn(70, 64), randn(5000), randn(33, 3), randn(40, 7, 5, 5).to(memory_format=torch.channels_last)]
    params = [p.requires_grad_() for p in layouts]
    own = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = ours(name)(params, lr=0.01, **own, **options)

    def go(optimizer, params, steps):
        for step in steps:
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * step + i)
            optimizer.step()

    go(optimizer, params, range(3))
    saved = optimizer.state_dict()
    flat = {f"{i}.{key}": t.contiguous() for i, state in saved["state"].items() for key, t in state.items()}
    save_file(flat, tmp_path / "optimizer", metadata={"param_groups": json.dumps(saved["param_groups"])})
    with safe_open(tmp_path / "optimizer", "pt") as file:
        groups, state = json.loads(file.metadata()["param_groups"]), {}
        for key in file.keys():  # noqa: SIM118  it is no dictionary
            i, _, what = key.partition(".")
            state.setdefault(int(i), {})[what] = file.get_tensor(key)
    others = [p.detach().clone().requires_grad_() for p in params]
    again = ours(name)(others, **own, **options)
    again.load_state_dict({"state": state, "param_groups": groups})
    for o, ps in ((optimizer, params), (again, others)):
        go(o, ps, range(3, 6))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        loaded = again.state[q]
        assert optimizer.state[p].keys() == loaded.keys()
        for key, s in optimizer.state[p].items():
            assert torch.equal(s, loaded[key])
            assert s.stride() == loaded[key].stride()
