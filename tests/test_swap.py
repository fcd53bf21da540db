"""`pyops.swap_` and its report."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from cases import randn
from torch import nn
from torch.nn.utils import parametrize, prune

import pyops
from pyops import measure
from pyops.nn import Int8Linear
from pyops.report import UNCHANGED, Report, Row

pytestmark = pytest.mark.usefixtures("short_turns")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 40), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(40, 40), nn.GELU()), nn.Linear(40, 3)
    )


def snapshot(model):
    """What must be unchanged after a failure."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    hooks = [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]
    attributes = {
        name: dict(m.__dict__) for name, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)
    }
    return modules, hooks, [(k, v.clone()) for k, v in model.state_dict().items()], attributes


def unchanged(model, before):
    after = snapshot(model)
    states = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[2], after[2], strict=True))
    return before[:2] == after[:2] and states and before[3] == after[3]


def by_name(report):
    return {row.name: row for row in report.rows}


# ------------------------------------------------------------------------------------------- what is swapped


def test_every_linear_is_swapped_in_place():
    model = mlp().eval()
    x = randn(5, 20)
    before, biases = model(x), [p for n, p in model.named_parameters() if n.endswith("bias")]
    report = pyops.swap_(model, pyops.Int8Dynamic())
    assert [row.name for row in report.rows] == ["0", "2.0", "3"]
    assert all(isinstance(model.get_submodule(row.name), Int8Linear) for row in report.rows)
    assert all(row.choice == "int8_dynamic" and row.kind == "Linear" and row.reason for row in report.rows)
    assert [row.ms_before for row in report.rows] == [row.sqnr_db for row in report.rows] == [None] * 3
    assert (model(x) - before).abs().max() < 0.05 * before.abs().max()
    assert not any(module.training for module in model.modules())
    assert [id(p) for p in model.parameters()] == [id(p) for p in biases], "the bias is the same Parameter"


def test_filter():
    model, seen = mlp(), []

    def keep_last(module, name):
        seen.append((type(module).__name__, name))
        return name != "3"

    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic(), keep_last))
    assert seen == [("Linear", "0"), ("Linear", "2.0"), ("Linear", "3")]
    assert (rows["3"].choice, rows["3"].reason) == (UNCHANGED, "filter_fn")
    assert type(model[3]) is nn.Linear
    assert rows["0"].swapped


def test_training_flag_device_dtype_and_requires_grad_are_kept():
    model = mlp().to(torch.bfloat16)
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model[3] = nn.Linear(40, 3, bias=False, device="meta")
    pyops.swap_(model, pyops.Int8Dynamic())
    assert (model[0].training, model[2][0].training) == (False, True)
    assert (model[0].bias.requires_grad, model[2][0].bias.requires_grad) == (False, True)
    assert model[0].bias.dtype is torch.bfloat16
    assert model[3].bias is None
    assert model[3].weight.is_meta


def test_a_swapped_model_goes_through_its_life(fresh_compiler):
    model = mlp().eval()
    pyops.swap_(model, pyops.Int8Dynamic())
    x = randn(5, 20)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    fresh = mlp()
    pyops.swap_(fresh, pyops.Int8Dynamic())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), y)
    assert pyops.swap_(model, pyops.Int8Dynamic()).rows == []


def test_a_model_on_meta_takes_a_quantized_checkpoint():
    model = mlp()
    pyops.swap_(model, pyops.Int8Dynamic())
    with torch.device("meta"):
        empty = mlp()
    pyops.swap_(empty, pyops.Int8Dynamic(), example_inputs=torch.empty(5, 20, device="meta"))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(randn(5, 20)), model(randn(5, 20)))


# ------------------------------------------------------------------------------------------- what is not, and why


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class Plain(nn.Linear):
    """A subclass that is used as a plain layer."""


class Adapted(nn.Linear):
    """A subclass with a parameter of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.low_rank = nn.Parameter(torch.ones(3))


def test_subclasses_have_a_row_each():
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "scaled": Scaled(4, 4),
            "plain": Plain(4, 4),
            "adapted": Adapted(4, 4),
            "lazy": nn.LazyLinear(4),
            "fp64": nn.Linear(4, 4, dtype=torch.float64),
            "wide": nn.Linear(132105, 1),
            "patched": patched,
            "attention": nn.MultiheadAttention(4, 2),
            "bilinear": nn.Bilinear(2, 2, 2),
        }
    )
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic()))
    assert {name: row.reason for name, row in rows.items() if not row.swapped} == {
        "scaled": "Scaled has a forward of its own",
        "adapted": "holds more than a weight and a bias: low_rank",
        "lazy": "not initialized yet: run the model once",
        "fp64": "torch.float64 is not supported",
        "wide": "in_features above 132104 could overflow the int32 sum",
        "patched": "Linear has a forward of its own",
        "attention.out_proj": "its parent (nn.MultiheadAttention) reads the weight instead of calling the layer",
    }
    assert [name for name, row in rows.items() if row.swapped] == ["plain"]
    assert rows["plain"].kind == "Plain"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (pyops.Int8Dynamic(), "in_features above 132104 could overflow the int32 sum"),
        (pyops.Int8Static(calibration=()), "in_features above 132104 could overflow the int32 sum"),
        (pyops.Int8Weight(), "in_features above 132104 are more than an Int8Linear takes"),
        (pyops.Int4Weight(), "in_features above 1056832 could overflow the int32 sum of compute='int8'"),
        (pyops.Fp8Dynamic(), "in_features above 16777200 are more than an Fp8Linear takes"),
    ],
    ids=lambda value: getattr(value, "choice", ""),
)
def test_why_a_layer_is_too_wide(config, reason):
    """The limit is the layer's; only some of them add up in int32."""
    most = config.module.max_in_features
    assert config.refusal(nn.Linear(most + 1, 1, device="meta")) == reason
    assert config.refusal(nn.Linear(most, 1, device="meta")) is None


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    """Its own inference kernel would read the weights of the layers that were replaced."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = randn(2, 7, 32)
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        rows = by_name(pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=(x,)))
        after = model(x, src_key_padding_mask=padding)
    assert (after - before)[~padding].abs().max() < 0.1
    assert "inference kernel is switched off" in rows["layers.0.linear1"].reason
    assert sum(row.swapped for row in rows.values()) == 4
    assert all(row.sqnr_db > 25 for row in rows.values() if row.swapped)


# ------------------------------------------------------------------------------------------- shared, tied, pruned


def test_one_layer_under_two_names_is_replaced_once():
    model = mlp()
    model.append(model[0])
    model.alias = nn.ModuleList([model[0]])
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic()))
    assert list(rows) == ["0", "2.0", "3"]
    assert "the same layer as 4, alias.0" in rows["0"].reason
    assert model[0] is model[4] is model.alias[0]
    assert isinstance(model[0], Int8Linear)


def test_a_filter_has_to_take_every_name():
    model = mlp()
    model.append(model[0])
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic(), lambda module, name: name != "4"))
    assert not rows["0"].swapped
    assert "filter_fn refuses it as 4" in rows["0"].reason
    assert type(model[0]) is type(model[4]) is nn.Linear


def test_a_tied_weight_is_cut_and_the_row_says_so():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic()))
    assert "its weight was tied to embed.weight: the tie is cut" in rows["head"].reason
    assert isinstance(model["head"], Int8Linear)
    assert model["embed"].weight.dtype is torch.float32


@pytest.mark.parametrize("how", ["prune", "parametrize", "weight_norm"])
def test_effective_weights_are_converted(how):
    model = mlp().eval()
    if how == "prune":
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        with torch.no_grad():
            model[0].weight_orig.mul_(1.5)
    elif how == "parametrize":
        parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    else:
        nn.utils.weight_norm(model[0])
    x = randn(9, 20)
    before = model(x)
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=x))
    assert (model(x) - before).abs().max() < 0.05 * before.abs().max()
    assert rows["0"].kind == "Linear"
    assert "baked in" in rows["0"].reason
    assert rows["0"].sqnr_db > 25
    assert not model[0]._forward_pre_hooks
    if how == "prune":
        assert (model[0].weight == 0).sum() >= 400


def test_hooks_move_to_the_new_layer():
    model, calls = mlp(), []
    model[1] = nn.ReLU()  # a backward hook forbids to change the output in place
    first = model[0].register_forward_hook(lambda module, args, y: calls.append(type(module).__name__))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda module, grads, outs: calls.append("back"))
    pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=randn(2, 20))
    calls.clear()
    model(randn(2, 20).requires_grad_()).sum().backward()
    assert calls == ["pre", "Int8Linear", "back"]
    first.remove()
    calls.clear()
    model(randn(2, 20))
    assert calls == ["pre"], "the user's handle still removes it"


def test_a_pruned_bias_goes_on_to_be_trained():
    model = mlp()
    prune.l1_unstructured(model[0], "bias", amount=0.5)
    pyops.swap_(model, pyops.Int8Dynamic())
    assert model[0].bias.requires_grad
    assert (model[0].bias == 0).sum() == 20


def test_hooks_beside_a_pruning_hook_are_kept():
    model, calls = mlp(), []
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[0].register_forward_pre_hook(lambda module, args: calls.append("pre"))
    pyops.swap_(model, pyops.Int8Dynamic())
    model(randn(2, 20))
    assert calls == ["pre"]


def test_dropped_buffers_are_told():
    model = mlp()
    model[0].register_buffer("mask", torch.ones(3))
    assert "buffers dropped: mask" in by_name(pyops.swap_(model, pyops.Int8Dynamic()))["0"].reason


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("example", [False, True])
def test_a_bad_weight_leaves_the_model_as_it_was(example):
    model = nn.Sequential(*mlp(), nn.TransformerEncoderLayer(3, 1, 8), nn.Linear(3, 3))
    model[1].eval()
    model[0].register_forward_hook(lambda *a: None)
    with torch.no_grad():
        model[-1].weight[1, 1] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '5': w holds NaN or Inf"):
        pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=randn(4, 20) if example else None)
    assert len(before[3]) == 1
    assert before[:2] == snapshot(model)[:2]


@pytest.mark.parametrize("where", ["model", "filter", "inputs"])
def test_a_failing_call_leaves_the_model_as_it_was(where):
    model = mlp()
    model[2].eval()
    before, state = snapshot(model), torch.get_rng_state()

    def broken(*args):
        raise RuntimeError("broken")

    if where == "filter":
        with pytest.raises(RuntimeError, match="broken"):
            pyops.swap_(model, pyops.Int8Dynamic(), lambda module, name: name != "3" or broken())
    else:
        handle = model[3].register_forward_hook(broken) if where == "model" else None
        with pytest.raises(RuntimeError):
            pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=randn(4, 20 if where == "model" else 21))
        if handle:
            handle.remove()
    assert unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, pyops.Int8Dynamic()), TypeError, "model must be a torch.nn.Module, got NoneType"),
        ((nn.Linear(3, 3), pyops.Int8Dynamic()), ValueError, r"model is itself a Linear.*from_float\(model\)"),
        ((mlp(), pyops.Int8Dynamic), TypeError, r"got Int8Dynamic; write Int8Dynamic\(\)"),
        ((mlp(), "int8"), TypeError, "config must be an instance of a config such as .* got str"),
        ((mlp(), pyops.Int8Dynamic(), "fc"), TypeError, "filter_fn must be callable"),
    ],
    ids=["no model", "a layer", "a class", "text", "filter"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pyops.swap_(*arguments)


@pytest.mark.parametrize("inputs", [[randn(2, 20)], "x", 3])
def test_bad_example_inputs(inputs):
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        pyops.swap_(mlp(), pyops.Int8Dynamic(), example_inputs=inputs)


# ------------------------------------------------------------------------------------------- measuring


class Model(nn.Module):
    """Calls a layer by keyword, another twice, one not at all; changes an input in place; drops out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.never = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, scale=1.0):
        assert not self.training
        assert not torch.is_grad_enabled()
        y = self.a(input=x * scale)
        x.zero_()
        return self.drop(self.b(self.b(y)))


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_layers_are_measured_on_their_inputs(form):
    torch.manual_seed(0)
    model, x = Model(), randn(6, 20)
    state = torch.get_rng_state()
    inputs = {"tensor": x, "tuple": (x,), "dict": {"x": x, "scale": 3.0}}[form]
    rows = by_name(pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=inputs))
    for name in ("a", "b"):
        assert rows[name].ms_before > 0
        assert rows[name].ms_after > 0
        assert 25 < rows[name].sqnr_db < 80
        assert rows[name].input_shape == (6, 20)
    assert rows["never"].swapped
    assert (rows["never"].ms_after, rows["never"].sqnr_db) == (None, None)
    assert "not called with these example_inputs" in rows["never"].reason
    assert model.training
    assert model.drop.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_models_own_autocast_is_kept_while_measuring():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(20, 20)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(x.bfloat16())

    row = pyops.swap_(Mixed(), pyops.Int8Dynamic(), example_inputs=randn(3, 20)).rows[0]
    assert row.sqnr_db > 25


def test_users_hooks_do_not_see_the_measurements():
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=randn(2, 20))
    assert len(calls) == 1


def test_sqnr():
    y = torch.tensor([3.0, 4.0])
    assert measure.sqnr_db(y, y) == math.inf
    assert measure.sqnr_db(y, torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert measure.sqnr_db(torch.zeros(2), y) == -math.inf
    assert math.isnan(measure.sqnr_db(y, y * torch.nan))


# ------------------------------------------------------------------------------------------- report


def test_report_prints_an_aligned_table():
    model = mlp()
    report = pyops.swap_(model, pyops.Int8Dynamic(), lambda m, n: n != "3", example_inputs=randn(5, 20))
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "weight", "choice"]
    assert len(lines) == 3 + 3 + 1
    column = lines[0].index("reason")
    assert lines[4].endswith("filter_fn")
    assert lines[4].index("filter_fn") == column
    assert lines[-1].startswith("2 of 3 layers swapped, weights ")
    assert "timed" in lines[-1]
    assert "worst SQNR" in lines[-1]
    plain = str(pyops.swap_(mlp(), pyops.Int8Dynamic()))
    assert "ms" not in plain.splitlines()[0]
    assert "timed" not in plain
    assert str(Report([])) == "No layer that this config is for."


def test_report_to_dict_is_plain():
    report = pyops.swap_(mlp(), pyops.Int8Dynamic(), example_inputs=randn(5, 20))
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data) == {"rows", "totals"}
    required = {"name", "kind", "choice", "reason", "ms_before", "ms_after", "sqnr_db"}
    assert all(required <= set(row) for row in data["rows"])
    totals = data["totals"]
    assert (totals["layers"], totals["swapped"], totals["timed"]) == (3, 3, 3)
    assert totals["bytes_before"] == 4 * (20 * 40 + 40 + 40 * 40 + 40 + 40 * 3 + 3)
    assert totals["worst_sqnr_db"] == min(row["sqnr_db"] for row in data["rows"])


def test_worst_sqnr_is_nan_if_a_layer_gives_nan():
    rows = [Row("a", "Linear", "int8_dynamic", "", sqnr_db=v) for v in (30.0, math.nan, 20.0)]
    assert math.isnan(Report(rows).totals()["worst_sqnr_db"])
