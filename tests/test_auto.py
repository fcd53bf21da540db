"""`pyops.Auto`: what is chosen for a layer and on the whole, what is put back, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch
from auto_clock import held, nothing_changed
from torch import nn

import pyops
from pyops import auto_layer, measure

ROOT = str(Path(pyops.__file__).parent)
EXACT = pyops.Auto(min_sqnr_db=30)
"""int4 is not exact enough for it."""
FAST = {"int8_dynamic": 0.3, "int8_weight": 0.5, "int4_weight_g32": 0.25, "int4_weight_g128": 0.2}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PYOPS_CACHE", str(tmp_path))


def mlp(*sizes):
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def chain(count):
    """The noise of its layers adds up."""
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(count))).eval()


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def choices(report):
    return {row.name: row.choice for row in report.rows}


# ------------------------------------------------------------------------------------------- one layer


def test_the_fastest_form_is_taken(clock):
    clock(FAST | {"int4_weight_g128": 0.9})
    model = mlp(64, 96, 10)
    x = torch.randn(8, 64)
    y = model(x)
    report = pyops.swap_(model, pyops.Auto(min_sqnr_db=10), example_inputs=x)
    assert choices(report) == {"0": "int4_weight_g32", "2": "int4_weight_g32"}
    assert isinstance(model[0], pyops.nn.Int4Linear)
    assert model[0].group_size == 32
    row = report.rows[0]
    assert (row.ms_before, row.ms_after, row.input_shape) == (1.0, 0.25, (8, 64))
    assert "int8_dynamic 0.3 ms" in row.reason
    swapped = model[0](x)
    assert report.whole.ms_before == 1.0
    assert report.whole.ms_after == 0.5
    assert report.whole.sqnr_db == pytest.approx(measure.sqnr_db(y, model(x)))
    report.revert_(model)
    assert row.sqnr_db == pytest.approx(measure.sqnr_db(model[0](x), swapped))


def test_a_form_that_is_not_exact_enough_is_not_taken(clock):
    clock(FAST)
    report = pyops.swap_(mlp(64, 96), EXACT, example_inputs=torch.randn(8, 64))
    assert choices(report) == {"0": "int8_dynamic"}
    assert report.rows[0].sqnr_db >= 30
    assert "int4_weight_g128 0.2 ms at " in report.rows[0].reason


def test_of_several_as_fast_the_most_exact(clock):
    clock(dict.fromkeys(FAST, 0.2))
    report = pyops.swap_(mlp(64, 96), pyops.Auto(min_sqnr_db=10), example_inputs=torch.randn(8, 64))
    assert choices(report) == {"0": "int8_weight"}


@pytest.mark.parametrize(("allow", "choice"), [(("int8",), "int8_dynamic"), (("int4",), "int4_weight_g128")])
def test_allow(clock, allow, choice):
    clock(FAST)
    report = pyops.swap_(mlp(64, 96), pyops.Auto(min_sqnr_db=5, allow=allow), example_inputs=torch.randn(8, 64))
    assert choices(report) == {"0": choice}


def test_what_nothing_is_for(clock):
    report = pyops.swap_(mlp(64, 96), pyops.Auto(allow=("fp8",)), example_inputs=torch.randn(8, 64))
    assert choices(report) == {"0": "unchanged"}
    assert "fp8 was not tried: it needs an NVIDIA GPU" in report.whole.notes[0]
    clock(FAST)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8).double()).eval()
    model[1].forward = lambda x: x[:, :8]
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert report.rows[1].reason == "Linear has a forward of its own"


def test_a_layer_that_nothing_makes_faster_stays(clock):
    clock(dict.fromkeys(FAST, 0.98))
    model = mlp(64, 96)
    layer = model[0]
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert model[0] is layer
    assert report.rows[0].ms_before == report.rows[0].ms_after == 1.0
    assert report.rows[0].reason.startswith("nothing is 3% faster and exact enough: ")
    assert report.whole.ms_before == report.whole.ms_after


def test_pruned_layers(clock):
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 32)).eval()
    pyops.prune.oc_block(model, 0.9, filter_fn=lambda layer, name: True)
    clock({"oc_block16": 0.2, "sparse_oc_block16": 0.2, "int8_dynamic": 0.4})
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(1, 32, 8, 8))
    assert choices(report) == {"0": "sparse_oc_block16", "3": "sparse_oc_block16"}
    assert isinstance(model[0], pyops.nn.SparseConv2d)
    assert report.rows[1].sparsity == pytest.approx(0.9, abs=0.02)
    clock({"oc_block16": 0.4, "sparse_oc_block16": 0.4, "int8_dynamic": 0.2})
    report.revert_(model)
    report = pyops.swap_(model, pyops.Auto(cache=False), example_inputs=torch.randn(1, 32, 8, 8))
    assert choices(report) == {"0": "sparse_oc_block16", "3": "int8_dynamic"}
    report.revert_(model)
    report = pyops.swap_(model, pyops.Auto(allow=("int4",)), example_inputs=torch.randn(1, 32, 8, 8))
    assert "has nothing for a Conv2d" in report.rows[0].reason


def test_times_come_from_the_cache(clock):
    clock(FAST)
    x = torch.randn(8, 64)
    first = pyops.swap_(mlp(64, 96, 96, 10), pyops.Auto(min_sqnr_db=5), example_inputs=x)
    clock.raced.clear()
    again = pyops.swap_(mlp(64, 96, 96, 10), pyops.Auto(min_sqnr_db=5), example_inputs=x)
    assert set(clock.raced) == {"before", "after"}
    assert choices(again) == choices(first)
    clock.raced.clear()
    pyops.swap_(mlp(64, 96, 96, 10), pyops.Auto(min_sqnr_db=5, cache=False), example_inputs=x)
    assert "dense" in clock.raced


def test_cached_times_do_not_take_what_is_not_exact(clock):
    clock(FAST)
    x = torch.randn(8, 64)
    model = mlp(64, 96)
    assert choices(pyops.swap_(model, pyops.Auto(min_sqnr_db=5), example_inputs=x)) == {"0": "int4_weight_g128"}
    report = pyops.swap_(mlp(64, 96), pyops.Auto(min_sqnr_db=30), example_inputs=x)
    assert choices(report) == {"0": "int8_dynamic"}


def test_weights_with_nan(clock):
    clock(FAST)
    model = mlp(64, 96, 10)
    model[2].weight.data[0, 0] = torch.nan
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert report.rows[1].choice == "unchanged"
    assert "its weight holds NaN or Inf" in report.rows[1].reason


# ------------------------------------------------------------------------------------------- the whole model


def test_layers_are_chosen_again_until_the_model_is_exact_enough(clock):
    clock(FAST)
    model, x = chain(11), torch.randn(32, 64)
    y = model(x)
    loose = pyops.swap_(model, pyops.Auto(min_sqnr_db=5), example_inputs=x)
    assert set(choices(loose).values()) == {"int4_weight_g128"}
    worst_layer = min(row.sqnr_db for row in loose.rows)
    assert loose.whole.sqnr_db < worst_layer, "noise adds up"
    loose.revert_(model)
    bar = (loose.whole.sqnr_db + worst_layer) / 2
    report = pyops.swap_(model, pyops.Auto(min_sqnr_db=bar), example_inputs=x)
    assert measure.sqnr_db(y, model(x)) >= bar
    assert report.whole.sqnr_db >= bar
    assert report.totals()["swapped"] == 11
    assert {"int8_dynamic"} <= set(choices(report).values())
    changed = next(row for row in report.rows if row.choice == "int8_dynamic")
    assert "as int4_weight_g128 the whole model was at" in changed.reason


def test_a_model_that_nothing_is_exact_enough_for(clock):
    clock({"int8_dynamic": 0.3})
    model, x = chain(5), torch.randn(32, 64)
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(min_sqnr_db=37), example_inputs=x)
    assert report.totals()["swapped"] == 0
    assert report.whole.sqnr_db == float("inf")
    assert all("as int8_dynamic the whole model was at" in row.reason for row in report.rows)


def test_a_swap_that_does_not_pay_is_rolled_back(clock):
    clock(FAST)
    clock.whole = lambda name: 1.0
    model = mlp(64, 96, 10)
    with nothing_changed(model):
        report = pyops.swap_(model, EXACT, example_inputs=torch.randn(8, 64))
    assert report.totals()["swapped"] == 0
    assert all("rolled back: as int8_dynamic, with" in row.reason for row in report.rows), report
    assert report.rows[0].bytes_after == report.rows[0].bytes_before
    assert report.whole.ms_before == report.whole.ms_after == 1.0


def test_the_layers_that_gain_least_go_back_first(clock):
    model = mlp(64, 96, 10)

    def whole(name):
        both = isinstance(model[0], pyops.nn.Int8Linear) and isinstance(model[2], pyops.nn.Int8Linear)
        one = isinstance(model[0], pyops.nn.Int8Linear) or isinstance(model[2], pyops.nn.Int8Linear)
        return 2.0 if both else 0.6 if one else 1.0

    clock({"int8_dynamic": 0.3})
    clock.whole = whole
    report = pyops.swap_(model, pyops.Auto(allow=("int8",)), example_inputs=torch.randn(8, 64))
    assert report.totals()["swapped"] == 1
    assert (report.whole.ms_before, report.whole.ms_after) == (1.0, 0.6)


def test_normalizations_are_folded_and_the_format_changed(clock):
    model, x = convnet(), torch.randn(2, 3, 12, 12)
    model[1].running_mean.uniform_(-1, 1)
    y = model(x)
    report = pyops.swap_(model, pyops.Auto(), example_inputs=x)
    assert isinstance(model[1], nn.Identity)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert report.whole.notes[1] == "2 batch normalizations folded: 1 -> 0.5 ms"
    assert report.whole.notes[2] == "channels_last: 1 -> 0.5 ms"
    assert report.rows[0].reason.startswith("1 folded in; nothing is pruned")
    assert torch.allclose(model(x), y, atol=1e-5)
    report.revert_(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert model[0].weight.is_contiguous()
    assert torch.equal(model(x), y)


def test_neither_if_they_do_not_pay_or_are_not_wanted(clock):
    model, x = convnet(), torch.randn(2, 3, 12, 12)
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(fold_batch_norm=False, channels_last=False), example_inputs=x)
    assert [note for note in report.whole.notes if "fp8" not in note] == []
    clock.whole = lambda name: 1.0
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(), example_inputs=x)
    assert "undone, it does not pay (1 -> 1 ms)" in report.whole.notes[1]
    assert "channels_last: undone, it does not pay" in report.whole.notes[2]


def test_filter_fn_is_asked_for_everything(clock):
    clock(FAST)
    model = convnet()
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(), lambda module, name: False, example_inputs=torch.randn(2, 3, 12, 12))
    assert {row.reason for row in report.rows if row.kind != "BatchNorm2d"} == {"filter_fn"}


def test_normalizations_in_training_mode_stay(clock):
    model = convnet().train()
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(channels_last=False), example_inputs=torch.randn(2, 3, 12, 12))
    assert not any("folded" in note for note in report.whole.notes)


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x).view(len(x), -1)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    ("kind", "why"), [(Viewing, "not possible: RuntimeError"), (Image, "would have other strides")]
)
def test_channels_last_that_would_be_seen(clock, kind, why):
    model = kind().eval()
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(2, 3, 8, 8))
    assert any(why in note for note in report.whole.notes), report.whole.notes


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    label: torch.Tensor


class Wrapped(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.layer, self.result = nn.Linear(64, 32), result

    def forward(self, x):
        return self.result(self.layer(x))


@pytest.mark.parametrize(
    "result",
    [lambda y: Output(y, y.argmax(1)), lambda y: {"a": [y, None], "n": 3}, lambda y: (y, y.to(torch.int8))],
    ids=["dataclass", "dict", "tuple"],
)
def test_outputs_of_any_form(clock, result):
    clock(FAST)
    report = pyops.swap_(Wrapped(result).eval(), pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert 20 <= report.whole.sqnr_db < 60


def test_a_model_without_floating_point_outputs(clock):
    clock(FAST)
    report = pyops.swap_(Wrapped(lambda y: y.argmax(1)).eval(), pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert report.whole.sqnr_db is None
    assert any("gives no floating-point tensor" in note for note in report.whole.notes)
    assert report.totals()["swapped"] == 1


def test_random_numbers_in_the_forward(clock):
    clock(FAST)
    model = Wrapped(lambda y: nn.functional.dropout(y, 0.5)).eval()
    rng = torch.random.get_rng_state()
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(8, 64, generator=torch.Generator()))
    assert report.whole.sqnr_db > 20, "both runs drop the same"
    assert torch.equal(torch.random.get_rng_state(), rng)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def test_buffers_that_the_forward_writes_are_put_back(clock):
    clock(FAST)
    model = Counting().eval()
    report = pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(8, 64))
    assert report.totals()["swapped"] == 1
    assert model.calls == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(clock, dtype):
    clock(FAST)
    model, x = mlp(64, 96, 10).to(dtype), torch.randn(8, 64, dtype=dtype)
    report = pyops.swap_(model, EXACT, example_inputs=x)
    assert set(choices(report).values()) == {"int8_dynamic"}
    assert model(x).dtype == dtype


# ------------------------------------------------------------------------------------------- dry run, going back


def test_dry_run(clock):
    clock(FAST)
    model = convnet()
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Auto(allow=("int8",)), example_inputs=torch.randn(2, 3, 12, 12), dry_run=True)
    assert report.dry_run
    assert choices(report)["8"] == "int8_dynamic"
    assert report.whole.ms_after == 0.5
    with pytest.raises(ValueError, match="this was a dry run"):
        report.revert_(model)
    model = mlp(64, 96)
    with nothing_changed(model):
        report = pyops.swap_(model, pyops.Int8Dynamic(), dry_run=True)
    assert choices(report) == {"0": "int8_dynamic"}


def test_revert(clock):
    clock(FAST)
    model, x = convnet(), torch.randn(2, 3, 12, 12)
    y, before = model(x), held(model)
    report = pyops.swap_(model, pyops.Auto(allow=("int8",)), example_inputs=x)
    assert isinstance(model[8], pyops.nn.Int8Linear)
    model.train()
    report.revert_(model)
    assert model[1].training
    assert model[8].training
    assert held(model.eval()) == before
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="was reverted"):
        report.revert_(model)


def test_what_cannot_be_reverted(clock):
    clock(FAST)
    model, x = mlp(64, 96, 10), torch.randn(8, 64)
    report = pyops.swap_(model, EXACT, example_inputs=x)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        report.revert_("model")
    with pytest.raises(ValueError, match="model is not the one that was swapped"):
        report.revert_(mlp(64, 96, 10))
    model[2] = nn.Linear(96, 10)
    with pytest.raises(ValueError, match="the model was changed since the swap: _modules of a Sequential"):
        report.revert_(model)
    assert isinstance(model[0], pyops.nn.Int8Linear)
    report = pyops.swap_(mlp(64, 96), pyops.Int8Dynamic())
    with pytest.raises(ValueError, match="revertible=True"):
        report.revert_(model)
    report = pyops.swap_(model, EXACT, example_inputs=x, revertible=False)
    assert report.edit is None


@pytest.mark.parametrize(
    "config",
    [
        pyops.Int8Dynamic(),
        pyops.Int4Weight(group_size=32),
        pyops.Sparse(pattern="unstructured", measure=False, fuse_activations=True, remove_channels=True),
    ],
    ids=["int8", "int4", "sparse"],
)
def test_every_config_can_be_reverted(config):
    model, x = convnet(), torch.randn(2, 3, 12, 12)
    pyops.prune.magnitude(model, 0.5)
    pyops.prune.bake_(model)
    model[3].weight.data[:4] = 0
    y, before = model(x), held(model)
    report = pyops.swap_(model, config, example_inputs=x, revertible=True)
    assert report.totals()["swapped"]
    assert held(model) != before
    report.revert_(model)
    assert held(model) == before
    assert torch.equal(model(x), y)


def test_revert_a_transformer_encoder(clock):
    clock(FAST)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 64)
    before = held(model)
    report = pyops.swap_(model, pyops.Auto(), example_inputs=x)
    assert report.totals()["swapped"] == 4
    assert not model.use_nested_tensor
    assert any("there is no kernel for a MultiheadAttention" in row.reason for row in report.rows)
    report.revert_(model)
    assert held(model) == before


# ------------------------------------------------------------------------------------------- models of every form


class Odd(nn.Module):
    """A shared layer, ModuleList, ModuleDict, a wrapper in a wrapper, hooks, layers of other kinds and one of ours."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.list = nn.ModuleList([nn.Linear(64, 64), self.shared])
        self.dict = nn.ModuleDict({"a": nn.Linear(64, 64), "inner": nn.Sequential(nn.Sequential(nn.Linear(64, 64)))})
        self.ours = pyops.nn.Int8Linear(64, 64)
        self.rnn = nn.GRU(64, 64, batch_first=True)
        self.embedding = nn.Embedding(10, 64)
        self.unused = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64, 64))

    def forward(self, x, index):
        x = self.shared(x) + self.embedding(index) @ self.scale
        for layer in self.list:
            x = layer(x)
        x = self.ours(self.dict["inner"](self.dict["a"](x)))
        return self.rnn(x[None])[0][0]


def test_a_model_of_every_form(clock):
    clock(FAST)
    model = Odd().eval()
    seen = []
    model.dict["a"].register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    inputs = (torch.randn(8, 64), torch.arange(8))
    report = pyops.swap_(model, EXACT, example_inputs=inputs)
    rows = {row.name: row for row in report.rows}
    assert model.shared is model.list[1]
    assert rows["shared"].choice == "int8_dynamic"
    assert "the same layer as list.1" in rows["shared"].reason
    assert rows["dict.inner.0.0"].choice == "int8_dynamic"
    assert rows["ours"].reason == "a Int8Linear of pyops already"
    assert rows["rnn"].reason == "there is no kernel for a GRU"
    assert rows["embedding"].reason == "there is no kernel for a Embedding"
    assert rows["unused"].reason == "not called with these example_inputs"
    assert rows[""].reason == "there is no kernel for a Odd"
    seen.clear()
    model(*inputs)
    assert seen == ["Int8Linear"]
    again = pyops.swap_(model, EXACT, example_inputs=inputs)
    assert again.totals()["swapped"] == 0
    assert {row.reason for row in again.rows if row.kind == "Int8Linear"} == {"a Int8Linear of pyops already"}


def test_nothing_in_it(clock):
    report = pyops.swap_(nn.Sequential(nn.ReLU()), pyops.Auto(), example_inputs=torch.randn(3))
    assert report.rows == []
    assert report.whole.ms_before == report.whole.ms_after
    report = pyops.swap_(mlp(64, 10), pyops.Auto(), example_inputs=torch.randn(0, 64))
    assert len(report.rows) == 1


def test_a_real_clock(short_turns):
    model, x = mlp(256, 512, 10), torch.randn(16, 256)
    y = model(x)
    report = pyops.swap_(model, pyops.Auto(), example_inputs=x)
    assert all(row.ms_before > 0 and row.ms_after > 0 for row in report.rows)
    assert measure.sqnr_db(y, model(x)) >= 20
    assert "whole model" in str(report)


# ------------------------------------------------------------------------------------------- interrupts


class Interrupter:
    """A trace function that raises KeyboardInterrupt at the n-th line of code of pyops; counts the lines."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(ROOT):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def swap_interrupted(at, dry_run):
    model = convnet()
    pyops.prune.oc_block(model[3], 0.9)
    inputs = torch.randn(2, 3, 12, 12)
    interrupter = Interrupter(at)
    before = sys.gettrace()
    with nothing_changed(model) if at is not None else _no_check():
        rng, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
        sys.settrace(interrupter)
        try:
            pyops.swap_(model, pyops.Auto(cache=False), example_inputs=inputs, dry_run=dry_run)
            raised = False
        except KeyboardInterrupt:
            raised = True
        finally:
            sys.settrace(before)
        assert torch.is_grad_enabled() == grad
        assert raised == (at is not None)
        assert torch.equal(torch.random.get_rng_state(), rng)
    return interrupter.lines


class _no_check:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(clock, dry_run):
    clock(FAST | {"oc_block16": 0.2})
    swap_interrupted(None, dry_run)
    lines = swap_interrupted(None, dry_run)
    assert lines > 5000
    points = {1, 2, 3, *range(7, lines, lines // 80), *range(lines - 120, lines + 1)}
    for at in sorted(points):
        swap_interrupted(at, dry_run)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_sqnr_db": "20"}, TypeError, "min_sqnr_db must be a number, got str"),
        ({"min_sqnr_db": float("nan")}, ValueError, "min_sqnr_db is nan"),
        ({"min_gain": 1.0}, ValueError, "min_gain is 1.0; allowed: 0 to below 1"),
        ({"min_gain": True}, TypeError, "min_gain must be a number, got bool"),
        ({"allow": "int8"}, TypeError, "allow must be a tuple of names"),
        ({"allow": (8,)}, TypeError, "allow must be a tuple of names"),
        ({"allow": None}, TypeError, "allow must be a tuple of names"),
        ({"allow": ("int8", "int2")}, ValueError, "allow names 'int2'; there are int8, int4, sparse, fp8"),
        ({"fold_batch_norm": 1}, TypeError, "fold_batch_norm must be True or False, got 1"),
        ({"channels_last": "yes"}, TypeError, "channels_last must be True or False, got 'yes'"),
        ({"cache": 3}, TypeError, "cache must be a path, None or False, got int"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        pyops.Auto(**arguments)


def test_bad_calls(clock):
    model = mlp(64, 10)
    with pytest.raises(ValueError, match=r"Auto\(\) chooses by measuring and needs swap_\(..., example_inputs=...\)"):
        pyops.swap_(model, pyops.Auto())
    with pytest.raises(TypeError, match=r"must be an instance of a config such as Int8Dynamic\(\), got Auto"):
        pyops.swap_(model, pyops.Auto, example_inputs=torch.randn(2, 64))
    with pytest.raises(ValueError, match="one_by_one=True cannot be done for Auto"):
        pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(2, 64), one_by_one=True)
    with pytest.raises(ValueError, match="which revertible=True needs"):
        pyops.swap_(model, pyops.Int8Dynamic(), one_by_one=True, revertible=True)
    with pytest.raises(TypeError, match="dry_run must be True or False, got 1"):
        pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(2, 64), dry_run=1)
    with pytest.raises(ValueError, match="model is itself a Linear"):
        pyops.swap_(nn.Linear(3, 4), pyops.Auto(), example_inputs=torch.randn(2, 3))
    with nothing_changed(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pyops.swap_(model, pyops.Auto(), example_inputs=torch.randn(2, 63))


def test_fp8_is_asked_of_the_device():
    assert not auto_layer.has_fp8(torch.device("cpu"))
