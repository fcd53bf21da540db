"""Every benchmark: cases, inputs, oracles and peers fit together, and committed results can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pyops.bench import report
from pyops.bench.case import load, op_names
from pyops.bench.peers import select
from pyops.bench.run import main

RESULTS = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json"))


@pytest.mark.skipif(not RESULTS, reason="no results in this checkout")
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_drawn(path: Path, tmp_path: Path) -> None:
    assert main(["--replot", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_op_is_well_formed() -> None:
    """Case names are unique, what a case or op names exists, and inputs, oracle and reference fit together."""
    for name in op_names():
        op, module = load(name)
        names = [case.name for case in op.cases]
        assert op.name == name
        assert len(set(names)) == len(names)
        peers = {peer.name for peer in module.PEERS}
        assert {op.baseline, *(case.ours for case in op.cases)} <= peers
        assert len(peers) == len(module.PEERS)
        for peer in module.PEERS:
            assert peer.runs
            assert bool(peer.excluded) == (peer.role == "figure")
        for case in op.cases:
            covering = [peer for peer in module.PEERS if peer.covers(case)]
            assert case.ours in {peer.name for peer in covering}
            assert any(peer.role in report.COMPETING for peer in covering)
            assert set(case.against or ()) <= {peer.name for peer in covering}
            assert not case.passes or case.bytes == pytest.approx(sum(part.bytes for part in case.passes))
            assert op.reference or case.ours_min_sqnr_db
            assert set(op.cache_titles) >= ({"warm", "cold"} if case.cold else {"warm"})
            assert case.family is None or case.family in op.families
        if all(peer.missing("cpu") for peer in module.PEERS):
            continue  # what makes the inputs may be missing too
        smallest = min(op.cases, key=lambda case: case.ops)
        inputs = op.make_inputs(smallest, torch.device("cpu"))
        exact = op.oracle(inputs).numpy()
        assert np.isfinite(exact).all()
        assert np.abs(exact).max() > 0
        if op.reference:
            assert report.sqnr_db(op.reference(inputs).numpy(), exact) >= op.min_sqnr_db


@pytest.mark.parametrize("name", ["int8_linear", "int8_weight_linear", "int4_linear"])
def test_peers_for_cuda_take_its_inputs(name: str) -> None:
    """bf16 activations beside fp32 weights, without values: reference and peers agree on what comes out."""
    op, module = load(name)
    case = min(op.cases, key=lambda case: case.ops)
    inputs = op.make_inputs(case, torch.device("meta"))
    inputs["x"] = inputs["x"].bfloat16()
    shape = case.dims["M"], case.dims["N"]
    assert op.oracle(inputs).shape == shape
    assert (op.reference(inputs).shape, op.reference(inputs).dtype) == (shape, torch.bfloat16)
    peers = [peer for peer in module.PEERS if "cuda" in peer.devices and peer.module == "torch"]
    assert {"pyops", "torch-bf16", "torch-fp16"} <= {peer.name for peer in peers}
    with torch.inference_mode():
        for peer in peers:
            for build in peer(torch.device("meta"), 1).variants(inputs).values():
                instance = build()
                result = instance.output(instance.call())
                assert result.shape == shape, peer.name
                assert peer.role != "ours" or result.dtype == torch.bfloat16


def test_select_takes_prefixes() -> None:
    _, module = load("int8_linear")
    names = [peer.name for peer in select(module.PEERS, ["torch", "onnxruntime"])]
    assert names == ["pyops", "pyops-module", "torch-fp32", "torch-bf16", "torch-fp16", "onnxruntime", "torch-int_mm"]
