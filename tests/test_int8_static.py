"""Int8Static and Int8Weight: what a swap makes with them, what calibration finds, and how good it is on real digits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import randn, without_address
from torch import nn

import pyops
from pyops.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("short_turns")


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [layer for k, n in itertools.pairwise(sizes) for layer in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def batches(K=70, n=3):
    return [randn(8, K, seed=i) for i in range(n)]


# ------------------------------------------------------------------------------------------- what is made


def test_weight_only():
    model, x = mlp(70, 64, 5), randn(6, 70)
    y = model(x)
    rows = pyops.swap_(model, pyops.Int8Weight(), example_inputs=x).rows
    assert [(row.name, row.choice) for row in rows] == [("0", "int8_weight"), ("2", "int8_weight")]
    assert all(row.sqnr_db > 40 for row in rows)
    assert [model[i].mode for i in (0, 2)] == ["weight_only"] * 2
    assert torch.allclose(model(x), y, atol=0.02)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_static(observer, smooth):
    model, x = mlp(70, 64, 5), randn(6, 70)
    y = model(x)
    config = pyops.Int8Static(batches(), observer=observer, smooth=smooth, percentile=99.9)
    rows = pyops.swap_(model, config, example_inputs=x).rows
    assert [(row.name, row.choice) for row in rows] == [("0", "int8_static"), ("2", "int8_static")]
    assert all(row.sqnr_db > 25 for row in rows)
    keys = {"weight", "weight_scale", "bias", "input_scale"} | ({"smooth"} if smooth else set())
    assert model[0].state_dict().keys() == keys
    assert (model(x) - y).square().sum() < 1e-2 * y.square().sum()


def test_smoothing_where_there_are_no_outputs():
    model = mlp(70, 0)
    pyops.swap_(model, pyops.Int8Static(batches(), smooth=0.5))
    assert model[0](randn(2, 70)).shape == (2, 0)


def test_the_scale_is_that_of_the_batches():
    model = mlp(70, 64, 5)
    hidden = [model[:2](x).detach() for x in batches()]
    pyops.swap_(model, pyops.Int8Static(batches()))
    assert model[0].input_scale == torch.cat(batches()).abs().max() / 127
    assert model[2].input_scale == pytest.approx(float(torch.cat(hidden).abs().max()) / 127, rel=1e-6)
    one = mlp(70, 64, 5)
    pyops.swap_(one, pyops.Int8Static(iter(batches()), batches=1))
    assert one[0].input_scale == batches()[0].abs().max() / 127


def test_the_scale_with_smoothing_is_that_of_the_smoothed_batches():
    x, linear = torch.cat(batches()), nn.Linear(70, 64)
    for observer in ("minmax", "percentile"):
        model = nn.Sequential(linear)
        pyops.swap_(model, pyops.Int8Static(batches(), smooth=0.5, observer=observer, percentile=100))
        expected = (x.abs().amax(0) / linear.weight.abs().amax(0)).sqrt()
        torch.testing.assert_close(model[0].smooth, expected.detach())
        assert float(model[0].input_scale) == pytest.approx(float((x / model[0].smooth).abs().max()) / 127, rel=1e-6)


def test_smoothing_helps_where_columns_have_outliers():
    torch.manual_seed(0)
    x = randn(64, 128)
    x[:, 5] *= 100
    errors = {}
    for smooth in (None, 0.5):
        model = nn.Sequential(nn.Linear(128, 64))
        y = model(x)
        pyops.swap_(model, pyops.Int8Static([x], smooth=smooth))
        errors[smooth] = (model(x) - y).square().mean()
    assert errors[0.5] < errors[None] / 10


def test_layers_that_no_batch_reaches_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.zero, self.c = (nn.Linear(70, 70) for _ in range(4))

        def forward(self, x):
            return self.a(x) + self.zero(x * 0)

    model = Model()
    report = pyops.swap_(model, pyops.Int8Static(batches()), filter_fn=lambda module, name: name != "c")
    reasons = {row.name: (row.choice, row.reason) for row in report.rows}
    assert reasons["a"][0] == "int8_static"
    assert reasons["b"] == ("unchanged", "not called in calibration")
    assert reasons["zero"] == ("unchanged", "saw only zeros in calibration")
    assert reasons["c"] == ("unchanged", "filter_fn")
    assert [type(m) for m in model.children()] == [Int8Linear, nn.Linear, nn.Linear, nn.Linear]


def test_a_layer_of_several_names_and_calls():
    shared = nn.Linear(70, 70)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    second = float(model[:2](torch.cat(batches())).detach().abs().max())
    pyops.swap_(model, pyops.Int8Static(batches()))
    assert model[0] is model[2]
    largest = max(second, float(torch.cat(batches()).abs().max()))
    assert float(model[0].input_scale) == pytest.approx(largest / 127, rel=1e-6)


def test_calibration_is_deterministic():
    scales = []
    for _ in range(2):
        model = mlp(70, 64, 64, 5)
        pyops.swap_(model, pyops.Int8Static(batches(), observer="mse", smooth=0.5))
        scales.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(scales[0].values(), scales[1].values(), strict=True))


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"calibration": torch.zeros(3)}, TypeError, "calibration must be an iterable of batches.*got Tensor"),
        ({"calibration": {"x": 1}}, TypeError, "got dict"),
        ({"calibration": 3}, TypeError, "got int"),
        ({"observer": "max"}, ValueError, "observer='max' is not one of minmax, percentile, mse"),
        ({"percentile": 0}, ValueError, "percentile is 0; it must be above 0"),
        ({"percentile": "99"}, TypeError, "percentile must be a number, got str"),
        ({"smooth": 1.5}, ValueError, "smooth is 1.5; it must be None or from 0 to 1"),
        ({"smooth": True}, TypeError, "smooth must be a number, got bool"),
        ({"batches": 0}, ValueError, "batches is 0; it must be at least 1"),
        ({"batches": 2.0}, TypeError, "batches must be an int or None"),
        ({"calibration": iter([]), "observer": "mse", "smooth": 0.5}, ValueError, "can be gone through once only"),
        ({"alpha": 0.5}, TypeError, "alpha"),
    ],
    ids=without_address,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pyops.Int8Static(**{"calibration": [], **arguments})


def test_calibration_is_needed():
    with pytest.raises(TypeError, match="calibration"):
        pyops.Int8Static()


BAD = {
    "no batch": ([], ValueError, "calibration holds no batch"),
    "NaN": ([randn(3, 70), torch.full((3, 70), torch.nan)], ValueError, "layer '0': its input holds NaN or Inf"),
    "another shape": ([randn(3, 7)], RuntimeError, "shapes cannot be multiplied"),
    "text": (["x"], TypeError, "a batch is a str"),
}


@pytest.mark.parametrize("name", BAD)
def test_after_an_exception_the_model_is_as_it_was(name):
    calibration, error, message = BAD[name]
    model = mlp(70, 64, 5).train()
    layers, state = list(model), {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        pyops.swap_(model, pyops.Int8Static(calibration))
    assert list(model) == layers
    assert all(m.training and not m._forward_pre_hooks for m in model)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_one_by_one():
    """All layers are calibrated before the first is replaced."""
    together, one_by_one = mlp(70, 64, 64, 5), mlp(70, 64, 64, 5)
    pyops.swap_(together, pyops.Int8Static(batches(), smooth=0.5))
    pyops.swap_(one_by_one, pyops.Int8Static(batches(), smooth=0.5), one_by_one=True)
    x = randn(4, 70)
    assert torch.equal(together(x), one_by_one(x))


def test_the_model_itself():
    with pytest.raises(ValueError, match=r"Int8Linear\.from_float\(model, mode='static', input_scale=\.\.\.\)"):
        pyops.swap_(nn.Linear(3, 3), pyops.Int8Static(batches(3)))
    scope = {"pyops": pyops, "model": nn.Linear(3, 3)}
    assert eval(pyops.Int8Weight().by_hand(scope["model"]), scope).mode == "weight_only"


def test_a_bar_only_where_it_is_wanted(capsys):
    for progress in (None, False, True):
        pyops.swap_(mlp(70, 5), pyops.Int8Static(batches()), progress=progress)
        assert ("calibration" in capsys.readouterr().err) == (progress is True)


# ------------------------------------------------------------------------------------------- the layer's modes


def test_modes_are_told_apart_on_loading():
    linear, smooth = nn.Linear(70, 33), torch.ones(70)
    kinds = {
        "dynamic": Int8Linear.from_float(linear),
        "static": Int8Linear.from_float(linear, mode="static", input_scale=0.1),
        "smooth": Int8Linear.from_float(linear, smooth=smooth),
        "both": Int8Linear.from_float(linear, mode="static", input_scale=0.1, smooth=smooth),
    }
    for a, b in itertools.permutations(kinds, 2):
        before = {key: t.clone() for key, t in kinds[b].state_dict().items()}
        with pytest.raises(RuntimeError, match=r"comes without|has no place"):
            kinds[b].load_state_dict(kinds[a].state_dict())
        assert all(torch.equal(t, before[key]) for key, t in kinds[b].state_dict().items())
    with pytest.raises(RuntimeError, match=r"input_scale has no place: the layer was made with another mode"):
        kinds["dynamic"].load_state_dict(kinds["static"].state_dict())
    weight_only = Int8Linear(70, 33, mode="weight_only")
    weight_only.load_state_dict(kinds["dynamic"].state_dict())
    assert torch.equal(weight_only.weight, kinds["dynamic"].weight)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"mode": "fast"}, ValueError, "mode='fast' is not one of dynamic, static, weight_only"),
        ({"mode": "static"}, ValueError, "input_scale is None; mode='static' needs one"),
        ({"input_scale": 0.1}, ValueError, "input_scale is 0.1; mode='dynamic' has none"),
        ({"mode": "static", "input_scale": 0.0}, ValueError, "input_scale is 0.0; it must be finite"),
        ({"mode": "static", "input_scale": torch.ones(2)}, (ValueError, RuntimeError), "shape"),
        ({"smooth": torch.ones(4)}, ValueError, r"smooth is \(4,\); in_features=3 needs a tensor of \(3,\)"),
        ({"smooth": 2.0}, ValueError, "smooth is float"),
        ({"smooth": torch.tensor([1.0, -1.0, 1.0])}, ValueError, r"smooth is -1\.0; it must be finite"),
        ({"mode": "weight_only", "smooth": torch.ones(3)}, ValueError, "smooth is of use where x is quantized"),
    ],
    ids=str,
)
def test_bad_from_float(how, error, message):
    with pytest.raises(error, match=message):
        Int8Linear.from_float(nn.Linear(3, 3), **how)


@pytest.mark.parametrize("name", ["input_scale", "smooth"])
def test_bad_scales_are_not_loaded(name):
    layer = Int8Linear.from_float(nn.Linear(7, 3), mode="static", input_scale=0.1, smooth=torch.ones(7))
    state = layer.state_dict()
    for value, message in ((0.0, "must be finite and at least"), (-1.0, "must be"), (torch.nan, "NaN or Inf")):
        with pytest.raises(RuntimeError, match=f"{name}.*{message}"):
            layer.load_state_dict(state | {name: torch.full_like(state[name], value)})


def test_repr():
    layer = Int8Linear(4, 3, False, mode="static", smooth=True)
    assert repr(layer) == "Int8Linear(in_features=4, out_features=3, bias=False, mode='static', smooth=True)"


# ------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def digits():
    """A small network trained on scikit-learn's digits; (model, calibration inputs, test inputs, test labels)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, t = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1200]), t[:1200]).backward()
        optimizer.step()
    return model.eval(), x[:1200], x[1200:], t[1200:]


def accuracy(model, x, t):
    with torch.no_grad():
        return (model(x).argmax(1) == t).float().mean().item()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_static_is_as_good_as_dynamic_on_digits(digits, observer, smooth):
    model, calibration, x, t = digits
    found = {}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(calibration), batch_size=100)
    for config in (pyops.Int8Dynamic(), pyops.Int8Weight(), pyops.Int8Static(loader, observer=observer, smooth=smooth)):
        swapped = copy.deepcopy(model)
        pyops.swap_(swapped, config)
        found[config.choice] = accuracy(swapped, x, t)
    assert accuracy(model, x, t) > 0.85
    assert found["int8_static"] >= found["int8_dynamic"] - 0.01
    assert found["int8_weight"] >= accuracy(model, x, t) - 0.01
