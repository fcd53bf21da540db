"""The benchmarks of sparse convolutions: every peer is right, and cases hold what they say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from pyops.bench import report, sparse_conv2d, sparse_conv2d_peers, sparse_resnet50_peers
from pyops.bench.peers import Peer
from pyops.bench.run import main
from pyops.ops.sparse_packed import packs


@pytest.mark.parametrize("peer", sparse_conv2d_peers.PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("pruning", sparse_conv2d.PRUNINGS[::3], ids=lambda pruning: pruning.family)
def test_sparse_convolutions_are_right(pruning: sparse_conv2d.Pruning, peer: type[Peer]) -> None:
    """On small images and odd channels, the weights with as many zeros as they say, in every memory format."""
    case = sparse_conv2d._case("resnet50", (20, 40, 3, 2, 9), 2, pruning)
    inputs = sparse_conv2d.make_inputs(case, torch.device("cpu"))
    zeros = float((inputs["w"] == 0).float().mean())
    assert zeros == pytest.approx(pruning.percent / 100, abs=0.01 if "block" not in pruning.pattern else 0.15)
    right = sparse_conv2d.oracle(inputs).numpy()
    for build in peer(torch.device("cpu"), 1).variants(inputs).values():
        instance = build()
        assert report.sqnr_db(instance.output(instance.call()).detach().numpy(), right) > 100


def test_sparse_cases_hold_what_they_say() -> None:
    assert (len(set(sparse_conv2d.RESNET50)), len(set(sparse_conv2d.VGG16))) == (23, 9)
    cases = [case for case in sparse_conv2d.CASES if "cpu" in case.devices]
    assert {case.family for case in sparse_conv2d.CASES} == set(sparse_conv2d.OP.families)
    assert len(cases) == 32 * 2 * 12
    runs = [name for name, _ in itertools.groupby(case.shared for case in cases)]
    assert len(runs) == len(set(runs)) == 64  # those of a shape and batch stand together
    (case,) = [case for case in cases if case.name == "resnet50/64-64-3x3@56/b1/unstructured-90"]
    assert case.ops == pytest.approx(2 * 64 * 64 * 9 * 56 * 56 / 10)
    assert case.bytes == pytest.approx(4 * (2 * 64 * 56 * 56 + 64 * 64 * 9 / 10))


@pytest.mark.parametrize("int8", [False, True])
def test_a_user_keeps_the_packed_weight(int8: bool) -> None:
    """Under inference mode too, in which the runner times."""
    pruning = next(p for p in sparse_conv2d.PRUNINGS if p.int8 == int8)
    case = sparse_conv2d._case("resnet50", (16, 16, 3, 1, 8), 1, pruning)
    with torch.inference_mode():
        inputs = sparse_conv2d.make_inputs(case, torch.device("cpu"))
        instance = sparse_conv2d_peers.Pyops(torch.device("cpu"), 1).variants(inputs)["NCHW"]()
        y = instance.call()
    assert report.sqnr_db(y.numpy(), sparse_conv2d.oracle(inputs).numpy()) >= case.ours_min_sqnr_db
    weight = next(c.cell_contents for c in instance.call.__closure__ if hasattr(c.cell_contents, "packed"))
    assert bool(weight.packed.forward.by_shape) == packs(inputs["x"], weight.values)


def test_models_that_cannot_be_made_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without transformers every peer says so, and nothing tries to make the model."""
    monkeypatch.setattr(sparse_resnet50_peers._Model, "module", "no_such_module")
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "b1/unstructured-90"]
    assert main(["sparse_resnet50", *options, "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["missing"] * 3
    assert {row["reason"] for row in rows} == {"not installed: pip install transformers"}
