"""`pyops.swap_(model, pyops.Sparse(...))`: int8 among the choices, fusing at the end, and what is not measured twice.

Times are faked wherever a choice depends on them.
"""

from __future__ import annotations

import json
import time

import pytest
import torch
from cases import randn
from sparse_swap_cases import FakeTimes, X, net, swap
from torch import nn

import pyops
from pyops import measure
from pyops.choose import DENSE
from pyops.nn import Int8SparseConv2d, SparseConv2d
from pyops.report import UNCHANGED
from pyops.sparse import _why_dense
from pyops.structure import structure_of


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PYOPS_CACHE", str(tmp_path))


@pytest.fixture
def times(monkeypatch):
    """Fake times, which can be changed."""
    fake = FakeTimes()
    monkeypatch.setattr(measure, "times", fake)
    return fake


# ------------------------------------------------------------------------------------------- int8


def test_int8_takes_the_place_where_it_is_fastest(times):
    times.ms |= {"oc_block16": 0.5, "unstructured": 0.5, "int8": 0.4}
    model = net().eval()
    y = model(X)
    model, rows = swap(model, int8=True)
    assert [name for name, row in rows.items() if row.choice == "sparse_int8"] == ["0", "2"]
    assert (type(model[0]), type(model[2])) == (Int8SparseConv2d, Int8SparseConv2d)
    assert (rows["0"].ms_before, rows["0"].ms_after, rows["0"].sparsity) == (1.0, 0.4, 0.75)
    assert 30 < rows["0"].sqnr_db < 60
    assert "oc_block16 0.5 ms" in rows["0"].reason
    assert "int8 0.4 ms" in rows["0"].reason
    assert times.calls[0][-2:] == ["int8", "dense_channels_last"]
    assert measure.sqnr_db(y, model(X)) > 25


def test_int8_has_to_be_faster_than_the_formats_that_round_less(times):
    times.ms |= {"oc_block16": 0.5, "int8": 0.495}
    assert swap(int8=True)[1]["0"].choice == "sparse_oc_block16"


def test_int8_below_the_bound_is_refused(times):
    times.ms |= {"oc_block16": 0.5, "int8": 0.1}
    model, rows = swap(int8=True, min_sqnr_db=70)
    assert isinstance(model[0], SparseConv2d)
    assert "int8 gives another result (" in rows["0"].reason
    assert "dB, below 70)" in rows["0"].reason
    assert (rows["2"].choice, "dB, below 70)" in rows["2"].reason) == (UNCHANGED, True)
    assert all("int8" not in call for call in times.calls), "nor is it measured"


@pytest.mark.parametrize("what", ["dtype", "NaN"])
def test_what_int8_cannot_do_is_said(times, what):
    times.ms |= {"oc_block16": 0.5, "int8": 0.1}
    model, x = net(), X
    if what == "dtype":
        model, x = model.double(), X.double()
    else:
        with torch.no_grad():
            model[0].weight_orig[tuple(model[0].weight_mask.nonzero()[0])] = torch.nan
    rows = swap(model, lambda module, name: name == "0", int8=True, x=x)[1]
    said = {"dtype": "int8 is not possible: x has dtype torch.float64", "NaN": "int8 is not possible: "}[what]
    assert said in rows["0"].reason
    assert rows["0"].choice == ("sparse_oc_block16" if what == "dtype" else UNCHANGED)


def test_without_int8_nothing_is_int8(times):
    times.ms |= {"oc_block16": 0.5, "int8": 0.1}
    model, rows = swap()
    assert rows["0"].choice == "sparse_oc_block16"
    assert not any(isinstance(module, Int8SparseConv2d) for module in model.modules())
    assert all("int8" not in call for call in times.calls)
    assert all("int8" not in row.reason for row in rows.values())


def test_int8_is_for_conv2d(times):
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.Flatten(), nn.Linear(16 * 7, 32)).eval()
    pyops.prune.oc_block(model, 0.5, 16)
    swap(model, x=randn(3, 4, 9), int8=True)
    assert all("int8" not in call for call in times.calls)


def test_times_with_and_without_int8_are_kept_apart(times, tmp_path):
    times.ms |= {"oc_block16": 0.5, "int8": 0.4}
    assert swap()[1]["0"].choice == "sparse_oc_block16"
    count = len(times.calls)
    assert swap(int8=True)[1]["0"].choice == "sparse_int8"
    assert len(times.calls) > count
    count = len(times.calls)
    assert swap()[1]["0"].choice == "sparse_oc_block16"
    assert swap(int8=True)[1]["0"].choice == "sparse_int8"
    assert swap(int8=True, min_sqnr_db=70)[1]["0"].choice == "sparse_oc_block16"
    assert len(times.calls) == count
    keys = [json.loads(key) for key in json.loads((tmp_path / "tune.json").read_text())["entries"]]
    assert sum("int8" in key for key in keys) == sum("stored" in key and "int8" not in key for key in keys) == 2


def test_a_model_with_int8_layers_goes_through_its_life(times):
    times.ms |= {"int8": 0.4}
    model, _ = swap(net().eval(), int8=True)
    pyops.prune.bake_(model)
    y, state = model(X), model.state_dict()
    assert state["0.values"].dtype == torch.int8
    other = net().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    fresh, _ = swap(other, int8=True)
    pyops.prune.bake_(fresh)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), y)
    model.train()(X).sum().backward()
    assert model[0].bias.grad is not None
    assert "0.values" not in dict(model.named_parameters()), "frozen"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"int8": 1}, TypeError, "int8 must be True or False"),
        ({"fuse_residuals": None}, TypeError, "fuse_residuals must be True or False"),
        ({"min_sqnr_db": "30"}, TypeError, "min_sqnr_db must be a number"),
        ({"min_sqnr_db": float("nan")}, ValueError, "min_sqnr_db is nan"),
        ({"int8": True, "measure": False, "pattern": "ic_block4"}, ValueError, "int8=True needs measure=True"),
    ],
)
def test_bad_options(arguments, error, message):
    with pytest.raises(error, match=message):
        pyops.Sparse(**arguments)


# ------------------------------------------------------------------------------------------- fusing at the end


class Residual(nn.Module):
    """Two convolutions around an addition."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return torch.relu(self.second(self.act(self.first(x))) + x)


@pytest.mark.parametrize("int8", [False, True])
def test_residuals_are_fused_at_the_end(times, int8):
    times.ms |= {"oc_block16": 0.5, "int8": 0.4}
    model, x = nn.Sequential(Residual(), Residual()).eval(), randn(2, 16, 8, 8)
    pyops.prune.oc_block(model, 0.5, 16)
    y = model(x)
    model, rows = swap(model, x=x, fuse_residuals=True, int8=int8)
    assert [row.choice for row in rows.values()] == ["sparse_int8" if int8 else "sparse_oc_block16"] * 4
    assert "activation relu fused" in rows["0.first"].reason
    assert "fused: the residual and activation relu in place of code in 0" in rows["0.second"].reason
    assert isinstance(model[0].act, nn.Identity)
    assert (model[1].first.activation, model[1].second.activation) == ("relu", "relu")
    assert measure.sqnr_db(y, model(x)) > (25 if int8 else 100)


def test_fusing_residuals_needs_inputs():
    with pytest.raises(ValueError, match=r"fuse_residuals=True needs swap_"):
        pyops.swap_(net(), pyops.Sparse(pattern="oc_block4", measure=False, fuse_residuals=True))


# ------------------------------------------------------------------------------------------- measured once


def test_who_is_clearly_slower_gets_no_more_turns(monkeypatch):
    monkeypatch.setattr(measure, "BUDGET_S", 1.0)
    calls = dict.fromkeys(("slow", "fast", "as fast"), 0)

    def sleeping(name, seconds):
        def function(x):
            calls[name] += 1
            time.sleep(seconds)

        return function

    functions = {name: sleeping(name, 0.012 if name == "slow" else 0.004) for name in calls}
    ms = measure.times(functions, measure.Captured(X, None))
    first = 3  # to warm, and to see who is hopeless
    assert calls["slow"] == first + measure.MIN_TURNS
    assert calls["fast"] > calls["slow"]
    assert 4 <= ms["fast"] < 12 <= ms["slow"]
    functions.pop("as fast")
    calls.update(fast=0)
    measure.times(functions, measure.Captured(X, None))
    assert calls["fast"] == first + measure.MIN_TURNS, "nobody is left to race with"


def test_layers_that_are_alike_are_measured_once(times):
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)), nn.Conv2d(16, 16, 1))
    pyops.prune.magnitude(model, 0.9)
    times.ms |= {"unstructured": 0.5}
    _, rows = swap(model, x=randn(1, 16, 8, 8), cache=False)
    assert times.calls == [["dense", "unstructured", "dense_channels_last"], ["dense", "unstructured"]] * 2
    assert [row.choice for row in rows.values()] == ["sparse_unstructured"] * 4
    assert all(row.sqnr_db > 100 for row in rows.values())


def test_the_other_format_is_measured_once_a_shape(times):
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)))
    times.ms |= {"unstructured": 0.5, "dense_channels_last": 0.2}
    for layer, sparsity in zip(model, (0.8, 0.9), strict=True):
        pyops.prune.magnitude(layer, sparsity)
    _, rows = swap(model, x=randn(1, 16, 8, 8))
    assert times.calls[2] == ["dense", "unstructured"]
    assert all("would take 0.2 ms dense here" in row.reason for row in rows.values())


def test_a_model_with_large_inputs_runs_several_times(times, monkeypatch):
    times.ms |= {"oc_block16": 0.5, "unstructured": 0.5}
    monkeypatch.setattr(measure, "HELD_BYTES", 1)
    model, runs = net().eval(), []
    y = model(X)
    model.register_forward_pre_hook(lambda *args: runs.append(1))
    _, rows = swap(model)
    assert 2 <= len(runs) <= 6
    shapes = [row.input_shape and row.input_shape[1] for row in rows.values()]
    assert shapes == [4, 32, None, 16, 8], "all but that of the depthwise layer"
    assert (rows["0"].choice, rows["2"].choice) == ("sparse_oc_block16", "sparse_unstructured")
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_the_report_says_what_runs_dense():
    ms, found = {DENSE: 1.0, "unstructured": 1.0}, structure_of(torch.ones(4, 4, 1, 1, dtype=torch.bool), 1, 0.25)
    assert "others run dense" in _why_dense(ms, found, "", pyops.Sparse(), None, "cuda")
    assert "others run dense" not in _why_dense(ms, found, "", pyops.Sparse(), None, "cpu")
