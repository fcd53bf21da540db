"""The benchmarks of optimizers: every peer makes the step that it stands for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyops.bench import optim, optim_peers, optim_shapes, report
from pyops.bench.peers import Peer
from pyops.bench.run import main

SMALL_SHAPES = ((33, 65), (2, 3, 5), (1,), (300,), (96, 64))
KINDS = {(case.rule, case.dtype, case.state_dtype, case.loop): case for case in reversed(optim.CASES)}
"""One case of each kind, by what it does."""
# torchao compiles for seconds.
PAIRS = [(c, p) for c in KINDS.values() for p in optim_peers.PEERS if p.covers(c) and p.name != "torchao"]


def _small(case: optim.OptimCase) -> optim.OptimCase:
    dims = {"parameters": optim_shapes.parameters(SMALL_SHAPES)}
    return dataclasses.replace(case, shapes=SMALL_SHAPES, dims=dims)


def _result(case: optim.OptimCase, peer: type[Peer]) -> tuple[np.ndarray, np.ndarray]:
    """(what the peer computes, what is right)."""
    instance = peer(torch.device("cpu"), 1).variants(optim.make_inputs(case, torch.device("cpu")))[""]()
    right = optim.oracle(optim.make_inputs(case, torch.device("cpu")))
    return instance.check().float().numpy(), right.float().numpy()


@pytest.mark.parametrize(("case", "peer"), PAIRS, ids=lambda value: value.name)
def test_optimizers_are_right(case: optim.OptimCase, peer: type[Peer]) -> None:
    case = _small(case)
    result, right = _result(case, peer)
    least = case.ours_min_sqnr_db if peer.role == "ours" else case.min_sqnr_db or optim.OP.min_sqnr_db
    assert report.sqnr_db(result, right) >= least


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyper-parameters that are a little off, gradients neither unscaled nor clipped, an average that is none."""
    case = _small(KINDS["adamw", torch.float32, "float32", True])
    exact, right = _result(case, optim_peers.TorchLoop)
    assert report.sqnr_db(exact, right) > 100
    n = len(right) // 3
    assert not right[2 * n :].any()  # the gradients

    def noise_db() -> float:
        inexact, _ = _result(case, optim_peers.TorchLoop)
        monkeypatch.undo()
        return report.sqnr_db(inexact, right)

    for wrong in ({"lr": 1.01e-3}, {"betas": (0.9, 0.998)}, {"weight_decay": 0.1}):
        monkeypatch.setitem(optim.HYPER, "adamw", optim.HYPER["adamw"] | wrong)
        assert noise_db() < 80
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, norm: None)
    assert noise_db() < 80
    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", lambda grads, found, inverse: None)
    assert noise_db() < 80
    exact[n : 2 * n] = exact[:n]
    assert report.sqnr_db(exact, right) < 80


def test_optimizer_cases_hold_what_they_say() -> None:
    by_name = {case.name: case for case in optim.CASES}
    for name, tensors, count in (
        ("large/adamw", 8, 8 * 2048**2),
        ("resnet50", 161, 25_557_032),
        ("bert6", 103, 66_955_008),
    ):
        assert (len(by_name[name].shapes), by_name[name].dims["parameters"]) == (tensors, count)
    sizes = [shape[0] for shape in by_name["small-64-4096"].shapes]
    assert (len(sizes), min(sizes) >= 64, max(sizes) <= 4096) == (1000, True, True)
    bytes_each = {name: case.bytes / case.ops for name, case in by_name.items()}
    assert bytes_each["large/sgd"] == bytes_each["large/lion"] == bytes_each["large/rmsprop"] == 20
    assert bytes_each["large/adamw"] == bytes_each["large/adamax"] == bytes_each["resnet50"] == 28
    assert (bytes_each["large/lamb"], bytes_each["large/adafactor"]) == (40, 24)
    assert bytes_each["amp+clip+ema+zero/large"] == 44
    assert (bytes_each["adamw-bf16-state"], bytes_each["bf16-stochastic"]) == (20, 14)
    assert bytes_each["adamw-int8-state"] == pytest.approx(16, rel=0.01)


def test_optimizer_benchmark_runs(tmp_path: Path) -> None:
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "small-64-4096", "--against", "torch-fused"]
    assert main(["optim", *options, "--json", str(tmp_path / "optim.json")]) == 0
    document = json.loads((tmp_path / "optim.json").read_text(encoding="utf-8"))
    assert {row["peer"]: row["status"] for row in document["rows"]}["torch-fused"] == "ok"
