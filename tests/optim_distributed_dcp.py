"""Checks of checkpoints by `torch.distributed.checkpoint`: between two ranks, one process, and torch.optim.

Gradients are random and the same for all, so that what is continued elementwise in fp32 must be so to the last bit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optim_cases import groups_of, ours, randn
from optim_distributed_cases import Net, assert_same_state, check, full, params_of
from optim_distributed_fsdp import shard
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import pyops.optim
from pyops.ops.optim_codec import dequantize

BITS = {"rtol": 0, "atol": 0}
CASES: dict[str, tuple[str, dict, torch.dtype]] = {
    "AdamW": ("AdamW", {"amsgrad": True}, torch.float32),
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "l1": 1e-4}, torch.float32),
    "NAdam in bf16": ("NAdam", {"stochastic_rounding": True, "seed": 3}, torch.bfloat16),
    "int8": ("AdamW", {"state_dtype": "int8", "ema_decay": 0.9}, torch.float32),
    "bf16": ("Adam", {"state_dtype": "bfloat16", "max_grad_norm": 1.0}, torch.float32),
    "Adagrad": ("Adagrad", {"state_dtype": "int8", "ema_decay": 0.9, "initial_accumulator_value": 0.1}, torch.float32),
    "no state": ("SGD", {"lr": 0.1}, torch.float32),
}
ROUNDED = ("NAdam in bf16", "int8", "bf16", "Adagrad")
"""Of these a shard is rounded by other random bits than the whole."""
HALF = 3
"""Steps before the checkpoint, and after it."""


Run = tuple[nn.Module, torch.optim.Optimizer]


def start(case: str, sharded: bool, optim: ModuleType = pyops.optim) -> Run:
    """Two groups, and a parameter that is not trained."""
    name, options, dtype = CASES[case]
    model = Net().to(dtype)
    model.conv.bias.requires_grad_(False)
    model = shard(model) if sharded else model
    return model, getattr(optim, name)(groups_of(list(model.parameters())), **options)


def start_all(sharded: bool) -> dict[str, Run]:
    return {case: start(case, sharded) for case in CASES}


def go(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    """Steps begin … end - 1 on the gradients of those steps."""
    for step in range(begin, end):
        for i, p in enumerate(model.parameters()):
            if not p.requires_grad:
                continue
            g = randn(*p.shape, seed=100 * step + i).to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()
    optimizer.zero_grad()


def state_dicts(run: Run) -> dict[str, dict]:
    return dict(zip(("model", "optimizer"), get_state_dict(*run), strict=True))


def save(runs: dict[str, Run], path: Path) -> None:
    dcp.save({case: state_dicts(run) for case, run in runs.items()}, checkpoint_id=path)


def load(runs: dict[str, Run], path: Path) -> None:
    """Into what a new process has: optimizers that made no step."""
    found = {case: state_dicts(run) for case, run in runs.items()}
    dcp.load(found, checkpoint_id=path)
    for case, run in runs.items():
        set_state_dict(*run, model_state_dict=found[case]["model"], optim_state_dict=found[case]["optimizer"])


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, list[dict], list[dict]]:
    """Weights, states and groups, whole and on their own."""
    weights = {name: full(p).clone() for name, p in model.named_parameters()}
    trained = [p for p in params_of(optimizer) if p.requires_grad]  # torch saves no others, of Adagrad, too
    states = [{k: full(v).clone() for k, v in optimizer.state.get(p, {}).items()} for p in trained]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.state_dict()["param_groups"]]
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])  # of whole state dicts torch makes them lists
    return weights, states, copy.deepcopy(groups)


def assert_same_snapshot(actual: tuple, expected: tuple) -> None:
    for a, b in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, **BITS)
    assert actual[2] == expected[2], (actual[2], expected[2])


def assert_continues(case: str, run: Run, saved: list) -> None:
    """Raise unless the state is the first of `saved`, and after the second half of the steps the second."""
    model, optimizer = run
    assert_same_snapshot(snapshot(*run), saved[0])
    go(*run, HALF, 2 * HALF)
    if case in ROUNDED:
        for name, p in model.named_parameters():
            expected = saved[1][0][name].float()
            ulp = 2.0**-7 * expected.abs() if p.dtype == torch.bfloat16 else torch.zeros(())
            bound = HALF * (max(group["lr"] for group in optimizer.param_groups) + ulp)
            off = (full(p).float() - expected).abs()
            assert (off <= bound).all(), name
            assert off.mean() < 0.25 * bound.mean(), name
    else:
        assert_same_snapshot(snapshot(*run), saved[1])


def assert_all_continue(runs: dict[str, Run], saved: dict[str, list]) -> None:
    for case, run in runs.items():
        try:
            assert_continues(case, run, saved[case])
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


def write(folder: Path, writer: str, runs: dict[str, Run]) -> None:
    """A checkpoint of `runs` in the middle, and what they are then and at the end."""
    for run in runs.values():
        go(*run, 0, HALF)
    save(runs, folder / writer)
    saved = {case: [snapshot(*run)] for case, run in runs.items()}
    for case, run in runs.items():
        go(*run, HALF, 2 * HALF)
        saved[case].append(snapshot(*run))
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(saved, folder / f"{writer}.pt")


def written(folder: Path, writer: str) -> dict[str, list]:
    return torch.load(folder / f"{writer}.pt", weights_only=False)


def write_in_one_process(folder: Path) -> None:
    """What the checks below load; of torch.optim.AdamW, too."""
    write(folder, "one process", start_all(sharded=False))
    write(folder, "torch", {"AdamW": start("AdamW", sharded=False, optim=torch.optim)})


def read_in_one_process(folder: Path) -> None:
    """Raise unless what two ranks wrote goes on here."""
    runs = start_all(sharded=False)
    load(runs, folder / "two ranks")
    assert_all_continue(runs, written(folder, "two ranks"))


def assert_nearly_continues(folder: Path, writer: str, run: Run) -> None:
    """Raise unless AdamW goes on up to fp32 rounding: what wrote it and what reads it calculate in another order."""
    load({"AdamW": run}, folder / writer)
    saved = written(folder, writer)["AdamW"]
    assert_same_snapshot(snapshot(*run), saved[0])
    go(*run, HALF, 2 * HALF)
    torch.testing.assert_close(snapshot(*run)[:2], saved[1][:2], rtol=2e-5, atol=2e-6)


def read_by_torch(folder: Path) -> None:
    """Raise unless torch.optim.AdamW goes on from what two ranks wrote of ours."""
    assert_nearly_continues(folder, "two ranks", start("AdamW", sharded=False, optim=torch.optim))


def read_codes_as_floats(folder: Path) -> None:
    """Raise unless 8-bit codes that DCP put into an fp32 state are refused."""
    model, optimizer = start("int8", sharded=False)
    optimizer.options.state_dtype = "float32"
    with pytest.raises(ValueError, match="'exp_avg' of parameter 6 holds 8-bit codes without their scales"):
        load({"int8": (model, optimizer)}, folder / "two ranks")


@check
def dcp_between_ranks(folder: Path) -> None:
    """Saved and loaded on two ranks: not a bit is different after it, nor later, wherever it is rounded."""
    write(folder, "two ranks", start_all(sharded=True))
    dist.barrier()
    again, saved = start_all(sharded=True), written(folder, "two ranks")
    load(again, folder / "two ranks")
    for case, run in again.items():
        assert_same_snapshot(snapshot(*run), saved[case][0])
        go(*run, HALF, 2 * HALF)
        assert_same_snapshot(snapshot(*run), saved[case][1])


@check
def dcp_from_one_process(folder: Path) -> None:
    runs = start_all(sharded=True)
    load(runs, folder / "one process")
    assert_all_continue(runs, written(folder, "one process"))


@check
def dcp_from_torch(folder: Path) -> None:
    """What torch.optim.AdamW wrote in one process goes on sharded."""
    assert_nearly_continues(folder, "torch", start("AdamW", sharded=True))


@check
def state_dicts_of_every_kind(folder: Path) -> None:
    """Flattened, or whole on each rank or on the first: what an optimizer that made no step loads is the same."""
    for case in ("AdamW", "int8", "Adagrad"):
        model, optimizer = start(case, sharded=True)
        go(model, optimizer, 0, 1)
        expected = snapshot(model, optimizer)
        for options in (
            {"flatten_optimizer_state_dict": True},
            {"full_state_dict": True},
            {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
        ):
            o = StateDictOptions(**options)
            states = get_optimizer_state_dict(model, optimizer, options=o)
            again, other = start(case, sharded=True)
            set_optimizer_state_dict(again, other, copy.deepcopy(states), options=o)
            try:
                assert_same_snapshot((expected[0], *snapshot(again, other)[1:]), expected)
            except AssertionError as error:
                raise AssertionError(f"{case} {options}: {error}") from None


@check
def plain_state_dicts(folder: Path) -> None:
    """load_state_dict of sharded and of whole states; 8-bit states of vectors are sharded where no block is cut."""
    net = nn.Sequential(nn.LayerNorm(5120), nn.LayerNorm(5120), nn.Linear(5120, 5))
    net[1] = nn.LayerNorm(5120 - 14)  # half of it is no multiple of 128
    whole, sharded = copy.deepcopy(net), fully_shard(copy.deepcopy(net))
    optimizers = [ours("AdamW")(model.parameters(), state_dtype="int8") for model in (whole, sharded)]
    for model, optimizer in zip((whole, sharded), optimizers, strict=True):
        go(model, optimizer, 0, 2)
    again = ours("AdamW")(sharded.parameters(), state_dtype="int8")
    again.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert_same_state(again, optimizers[1], **BITS)
    again.load_state_dict(optimizers[0].state_dict())
    for i, (p, q) in enumerate(zip(sharded.parameters(), whole.parameters(), strict=True)):
        expected, actual = optimizers[0].state[q], again.state[p]
        assert (expected["exp_avg"].dtype == torch.int8) == (i != 5)
        assert (actual["exp_avg"].dtype == torch.int8) == (i not in (2, 3, 5))
        for name in ("exp_avg", "exp_avg_sq"):
            if actual[name].dtype == expected[name].dtype:
                assert all(torch.equal(full(actual[n]), expected[n]) for n in expected if n.startswith(name))
            else:
                wide = dequantize(expected[name], expected[name + "_scale"])
                assert torch.equal(full(actual[name]), wide)
