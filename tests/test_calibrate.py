"""Observers and the calibration run, alone: against numpy, over any split of the values, with what they refuse."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from cases import FLOATS, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyops import calibrate
from pyops.calibrate import (
    ChannelMax,
    Histogram,
    MeanSquaredError,
    MinMax,
    Percentile,
    model_inputs,
    observe,
    smoothing,
)

ALL = {"minmax": MinMax, "percentile": lambda: Percentile(99.0), "mse": MeanSquaredError}


@pytest.fixture(params=ALL)
def observer(request):
    return ALL[request.param]()


def heavy_tailed(n=20000):
    x = randn(n) * randn(n, seed=1).exp()
    x[7] = 300.0
    return x


# ------------------------------------------------------------------------------------------- observers


def test_minmax_is_the_largest_magnitude():
    observer = MinMax()
    for x in (torch.tensor([1.0, -3.0]), torch.tensor([2.5], dtype=torch.bfloat16), torch.empty(0, 4)):
        observer.update(x)
    assert observer.amax() == 3.0


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_percentile_is_numpys(percentile, scale):
    x = heavy_tailed() * scale
    observer = Percentile(percentile)
    for piece in x.split(777):
        observer.update(piece)
    exact = float(np.percentile(x.abs().double().numpy(), percentile, method="inverted_cdf"))
    largest = float(x.abs().max())
    assert exact <= observer.amax() <= min(largest, exact + largest / 2048)


def test_mse_is_the_best_of_its_thresholds():
    x = randn(200_000)
    x[7] = 30.0
    observer = MeanSquaredError()
    observer.update(x)
    amax = observer.amax()
    assert amax < 20, "the outlier is cut off"

    def error(amax):
        s = amax / 127
        return float((((x.double() / s).round().clamp(-127, 127) * s - x.double()) ** 2).sum())

    best = min(error(30.0 * i / 128) for i in range(1, 129))
    assert error(amax) <= 1.02 * best


def test_mse_keeps_a_flat_range():
    observer = MeanSquaredError()
    observer.update(torch.linspace(-1, 1, 10001))
    assert observer.amax() == pytest.approx(1.0, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.integers(1, 60))
def test_counts_do_not_depend_on_the_split(values, size):
    """A range that grows as values come gives the counts of one that was right from the start."""
    x = torch.tensor(values)
    whole, split = Histogram(), Histogram()
    whole.update(x)
    for piece in x.split(size):
        split.update(piece)
    assert split.range == whole.range
    assert torch.equal(split.counts, whole.counts)
    assert int(whole.counts.sum()) == len(values)


def test_large_inputs_are_counted_in_pieces(monkeypatch):
    x, whole, pieces = randn(1000), Histogram(), Histogram()
    whole.update(x)
    monkeypatch.setattr(calibrate, "PIECE", 64)
    pieces.update(x)
    assert torch.equal(whole.counts, pieces.counts)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype(observer, dtype):
    observer.update(randn(3, 4, 50, dtype=dtype))
    assert 0 < observer.amax() <= float(randn(3, 4, 50, dtype=dtype).abs().max())


def test_zeros_and_nothing(observer):
    assert observer.amax() == 0
    observer.update(torch.empty(0))
    observer.update(torch.zeros(5))
    assert observer.amax() == 0
    observer.update(torch.ones(995))
    assert observer.amax() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(observer, value):
    for each in (observer, ChannelMax()):
        with pytest.raises(ValueError, match="holds NaN or Inf"):
            each.update(torch.tensor([[1.0, value]]))


def test_channel_max():
    observer = ChannelMax()
    xs = [randn(2, 3, 5), randn(4, 5, seed=3), randn(5, seed=4), torch.empty(0, 5)]
    for x in xs:
        observer.update(x)
    assert torch.equal(observer.largest, torch.cat([x.reshape(-1, 5) for x in xs]).abs().amax(0))


def test_smoothing_is_the_papers_formula():
    inputs, w = torch.tensor([4.0, 100.0, 0.0, 1.0]), torch.tensor([[1.0, -0.25, 3.0, 0.0], [0.5, 0.1, 1.0, 0.0]])
    expected = [4.0**0.5 / 1.0**0.5, 100.0**0.5 / 0.25**0.5, 1.0, 1.0]
    assert smoothing(inputs, w, 0.5).tolist() == pytest.approx(expected)
    assert smoothing(inputs, w, 1.0).tolist() == pytest.approx([4.0, 100.0, 1.0, 1.0])
    assert smoothing(inputs, w, 0.0).tolist() == pytest.approx([1.0, 4.0, 1.0, 1.0])
    assert smoothing(torch.tensor([1e38]), torch.tensor([[1e-38]]), 0.5).item() == 2.0**30


# ------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, None),
        ((1, 2), (1, 2)),
        ({"x": 1}, {"x": 1}),
        ([1, 5], 1),
        ([[1, 2], 5], (1, 2)),
        ([{"x": 1}, 5], {"x": 1}),
    ],
    ids=str,
)
def test_batches(batch, expected):
    def tensors(value):
        if isinstance(value, int):
            return torch.tensor(value)
        if isinstance(value, dict):
            return {key: tensors(v) for key, v in value.items()}
        return type(value)(tensors(v) for v in value)

    def numbers(value):
        if isinstance(value, torch.Tensor):
            return value.item()
        if isinstance(value, dict):
            return {key: numbers(v) for key, v in value.items()}
        return type(value)(numbers(v) for v in value)

    assert numbers(model_inputs(tensors(batch))) == (batch if expected is None else expected)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a batch is a str; it must be"),
        ([], "a batch is an empty list"),
        ([3.0, 1], "a batch is a list of float; it must be"),
        (None, "a batch is a NoneType"),
    ],
    ids=str,
)
def test_bad_batches(batch, message):
    with pytest.raises(TypeError, match=message):
        model_inputs(batch)


def test_a_data_loader_gives_its_inputs():
    data = torch.utils.data.TensorDataset(randn(10, 4), torch.arange(10))
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    observe(model, {model[0]: "0"}, lambda layer, x: seen.append(x), loader, 2)
    assert torch.equal(torch.cat(seen), randn(10, 4)[:8])


def test_the_run_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).train()
    model[1].eval()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    random = torch.get_rng_state()

    def fail(layer, x):
        raise ValueError("no")

    for see in (lambda layer, x: torch.rand(3), fail):
        fails = pytest.raises(ValueError, match=r"^layer 'first': no$") if see is fail else contextlib.nullcontext()
        with fails:
            observe(model, {model[0]: "first"}, see, [randn(5, 4)])
        assert [m.training for m in model] == [True, False, True]
        assert not model[0]._forward_pre_hooks
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
    assert model[0].weight.requires_grad


def test_no_batch():
    with pytest.raises(ValueError, match="calibration holds no batch"):
        observe(nn.Sequential(), {}, lambda layer, x: None, [])
