"""`pyops.swap_(model, pyops.Sparse())`: what is found, what is chosen by which times, and what stays untouched.

Times are faked wherever a choice depends on them.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from cases import randn
from sparse_swap_cases import BLOCKS, DENSITY, FakeTimes, X, net, swap
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import pyops
from pyops import measure
from pyops.nn import SparseConv1d, SparseConv2d, SparseLinear
from pyops.report import UNCHANGED
from pyops.structure import structure_of


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path, short_turns):
    monkeypatch.setenv("PYOPS_CACHE", str(tmp_path))


@pytest.fixture
def times(monkeypatch):
    """Fake times, which can be changed."""
    fake = FakeTimes()
    monkeypatch.setattr(measure, "times", fake)
    return fake


def snapshot(model):
    modules = [(name, id(m), m.training, dict(m.__dict__), dict(m._parameters)) for name, m in model.named_modules()]
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return modules, hooks, {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    after = snapshot(model)
    assert [entry[:3] for entry in before[0]] == [entry[:3] for entry in after[0]]
    for (*_, attributes, parameters), (*_, attributes_now, parameters_now) in zip(before[0], after[0], strict=True):
        assert {k: id(p) for k, p in parameters.items()} == {k: id(p) for k, p in parameters_now.items()}
        assert attributes.keys() == attributes_now.keys()
    assert before[1] == after[1]
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(t, after[2][k]) for k, t in before[2].items())


# ------------------------------------------------------------------------------------------- choosing


def test_the_fastest_takes_the_place(times):
    times.ms |= {"oc_block16": 0.6, "oc_block8": 0.5, "oc_block4": 0.7, "unstructured": 0.9}
    model = net().train()
    y, bias = model.eval()(X), model[0].bias
    model.train()
    model, rows = swap(model)
    assert (rows["0"].choice, rows["2"].choice) == ("sparse_oc_block8", "sparse_unstructured")
    assert isinstance(model[0], SparseConv2d)
    assert (model[0].pattern, model[2].pattern) == ("oc_block8", "unstructured")
    assert model[0].bias is bias
    assert model[0].training
    row = rows["0"]
    assert (row.ms_before, row.ms_after, row.sqnr_db > 100) == (1.0, 0.5, True)
    assert (row.structure, row.sparsity, row.input_shape) == ("oc_block16", 0.75, (2, 4, 9, 9))
    assert "oc_block16 0.6 ms, oc_block8 0.5 ms" in row.reason
    assert times.calls[0] == ["dense", *BLOCKS, "unstructured", "dense_channels_last"]
    torch.testing.assert_close(model.eval()(X), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ms", "swapped"), [(0.96, True), (0.98, False), (1.0, False), (5.0, False)])
def test_a_gain_has_to_be_more_than_noise(times, ms, swapped):
    times.ms |= {"oc_block16": ms}
    model = net()
    before = snapshot(model)
    _, rows = swap(model)
    assert rows["0"].swapped is swapped
    if not swapped:
        assert_unchanged(model, before)
        assert (rows["0"].choice, rows["0"].ms_before, rows["0"].ms_after) == (UNCHANGED, 1.0, 1.0)
        assert "not 3% faster sparse: dense 1 ms, oc_block16" in rows["0"].reason
    assert swap(net(), min_gain=0.01, cache=False)[1]["0"].swapped is (ms < 0.99)


def test_who_wins_has_to_win_twice(times):
    times.ms |= {"oc_block16": lambda call: 0.5 if call == 1 else 1.2, "oc_block4": 0.8}
    _, rows = swap(net(), lambda module, name: name == "0")
    assert rows["0"].choice == "sparse_oc_block4", "the second best won then"
    assert times.calls[1:] == [["dense", "oc_block16"], ["dense", "oc_block4"]]
    assert rows["0"].ms_after == 0.8


def test_of_equals_the_coarsest_is_taken(times):
    times.ms |= {"oc_block16": 0.505, "oc_block8": 0.5, "oc_block4": 0.6}
    assert swap()[1]["0"].choice == "sparse_oc_block16"


def test_real_times_leave_a_model_that_is_right():
    model = net().eval()
    y = model(X)
    model, rows = swap(model)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    assert all(row.ms_before >= row.ms_after > 0 for row in (rows["0"], rows["2"]))
    again = net().eval()
    _, cached = swap(again)
    assert [row.choice for row in cached.values()] == [row.choice for row in rows.values()]


def test_a_result_that_is_wrong_is_not_taken(times, monkeypatch):
    times.ms |= dict.fromkeys((*BLOCKS, "unstructured"), 0.1)
    monkeypatch.setattr(measure, "sqnr_db", lambda *args: 12.0)
    model = net()
    before = snapshot(model)
    rows = swap(model)[1]
    assert_unchanged(model, before)
    assert "oc_block16 gives another result (12.0 dB, below 30)" in rows["0"].reason

    def missing(self, x):
        raise NotImplementedError("no kernel for cpu")

    monkeypatch.setattr(SparseConv2d, "forward", missing)
    assert "oc_block16 has no kernel: no kernel for cpu" in swap(model)[1]["0"].reason


def test_a_layer_gets_its_input_in_the_format_of_the_model(times):
    times.ms |= {"dense_contiguous": 0.2, "oc_block16": 0.5}
    model = net().to(memory_format=torch.channels_last)
    _, rows = swap(model, x=X.contiguous(memory_format=torch.channels_last))
    x = times.captured[0].x
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    assert "dense_contiguous" in times.calls[0]
    assert rows["0"].swapped
    assert "memory_format=torch.contiguous_format would take 0.2 ms dense here" in rows["0"].reason


def test_what_follows_gets_the_same_format_and_dtype(times):
    """A dense convolution with a channels_last weight gives channels_last, whatever its input is."""
    times.ms |= {"oc_block16": 0.1}
    _, rows = swap(net().to(memory_format=torch.channels_last))
    assert not rows["0"].swapped
    assert "oc_block16 gives another memory format than dense" in rows["0"].reason

    class Autocast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    _, rows = swap(Autocast(*net()), cache=False)
    assert "oc_block16 gives torch.float32, dense torch.bfloat16" in rows["0"].reason


def test_a_layer_that_would_pay_later_says_when(times):
    # t = 0.8 + 4 · (1 - sparsity): dense 1.0 · 0.97 is reached at a density of 0.0425
    times.ms |= {"unstructured": 0.8 + 4 * DENSITY, "thinned": 0.8 + DENSITY, "blocked": 0.4}
    _, rows = swap(net(), lambda module, name: name == "2")
    assert rows["2"].sparsity == 1 - DENSITY
    assert rows["2"].pays_from == pytest.approx(0.9575)
    assert "unstructured would pay from a sparsity of about 96%" in rows["2"].reason
    assert "at this sparsity oc_block16 would pay: 0.4 ms" in rows["2"].reason
    times.ms |= {"thinned": 1.3}
    assert swap(cache=False)[1]["2"].pays_from is None


# ------------------------------------------------------------------------------------------- the cache


def test_a_second_swap_measures_nothing(times):
    times.ms |= {"oc_block16": 0.5}
    _, first = swap()
    count = len(times.calls)
    _, second = swap()
    assert len(times.calls) == count
    for name, row in second.items():
        assert (row.choice, row.ms_before, row.ms_after) == (first[name].choice, first[name].ms_before, row.ms_after)
    assert second["0"].sqnr_db > 100, "which is not from the cache"
    swap(cache=False)
    assert len(times.calls) > count


@pytest.mark.parametrize("other", ["input", "threads", "sparsity", "format", "bias"])
def test_other_circumstances_are_measured(times, other, threads):
    threads(1)
    swap()
    model, x, count = net(), X, len(times.calls)
    if other == "input":
        x = randn(3, 4, 9, 9)
    elif other == "threads":
        threads(2)
    elif other == "sparsity":
        pyops.prune.magnitude(model[2], 0.95)
    elif other == "format":
        x = X.contiguous(memory_format=torch.channels_last)
    else:
        model[0].bias = None
    swap(model, x=x)
    assert len(times.calls) > count


def test_the_cache_is_not_trusted(times, tmp_path):
    path = tmp_path / "mine.json"
    swap(cache=path)
    data = json.loads(path.read_text())
    count = len(times.calls)
    for entry in data["entries"].values():
        entry["block_of_lies"] = 0.001
    path.write_text(json.dumps(data))
    _, rows = swap(cache=path)
    assert len(times.calls) > count, "names that nobody asked for"
    path.write_text("{")
    with pytest.warns(UserWarning, match="is not used"):
        assert swap(cache=path)[1]["0"].choice == rows["0"].choice
    assert path.read_text() == "{"


def test_no_cache_writes_nothing(times, tmp_path):
    swap(cache=False)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- what is found


def dead(o=None, i=None):
    mask = torch.ones(32, 32, 3, 3, dtype=torch.bool)
    if o:
        mask[o] = False
    if i:
        mask[:, i] = False
    return mask


def blocks(bo, bc=1, density=0.3):
    keep = torch.rand(32 // bo, 32 // bc, 3, 3, generator=torch.Generator().manual_seed(1)) < density
    return keep.repeat_interleave(bo, 0).repeat_interleave(bc, 1)


def two_of_four():
    order = torch.rand(32, 8, 4, 3, 3, generator=torch.Generator().manual_seed(1)).argsort(2)
    return (order < 2).reshape(32, 32, 3, 3)


def noisy(mask, share):
    return mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) >= share)


STRUCTURES = {
    "oc_block16": (blocks(16), [*BLOCKS, "unstructured"]),
    "oc_block8": (blocks(8), ["oc_block8", "oc_block4", "unstructured"]),
    "oc_block4": (blocks(4), ["oc_block4", "unstructured"]),
    "ic_block4": (blocks(1, 4), ["ic_block4", "unstructured"]),
    "unstructured": (blocks(1), ["unstructured"]),
    "2:4": (two_of_four(), ["2:4"]),
    "oc_block16 with 11% fill-in": (noisy(blocks(16), 0.1), [*BLOCKS, "unstructured"]),
    "unstructured hardly": (noisy(dead(), 0.1), ["unstructured"]),
    "nearly blocks": (noisy(blocks(16), 0.4), ["unstructured"]),
    "16 of 32 output channels dead": (dead(o=range(16)), None),
    "8 of 32 input channels dead": (dead(i=range(0, 32, 4)), None),
    "16 of 32 output channels dead ": (dead(o=range(0, 32, 2)), ["unstructured"]),
    "32 of 32 output channels dead, 32 of 32 input channels dead": (dead(o=range(32)), None),
    "dense": (dead(), None),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name):
    mask, formats = STRUCTURES[name]
    found = structure_of(mask, 1, 0.25)
    assert formats is None or list(found.stored) == formats
    if name not in ("unstructured hardly", "nearly blocks"):
        assert str(found) == name.strip()
    assert found.sparsity == pytest.approx(1 - mask.float().mean().item(), abs=1e-6)
    assert all(stored >= (1 - found.sparsity) - 1e-9 for stored in found.stored.values())


def test_structure_of_groups_and_other_layers():
    mask = blocks(16)[:, :8]
    assert next(iter(structure_of(mask, 2, 0.25).stored)) == "oc_block16"
    assert next(iter(structure_of(mask, 4, 0.25).stored)) == "oc_block8", "a block does not reach over groups"
    assert next(iter(structure_of(blocks(16)[:, :, 0, 0], 1, 0.25).stored)) == "oc_block16"
    assert next(iter(structure_of(blocks(16)[:, :, 0], 1, 0.25).stored)) == "oc_block16"
    assert structure_of(torch.zeros(0, 3, dtype=torch.bool), 1, 0.25).sparsity == 0.0


def test_more_waste_is_allowed_if_asked_for(times):
    times.ms |= {"oc_block16": 0.5}
    model, other = net(), net()
    for layer in (model[0], other[0]):
        with torch.no_grad():
            layer.weight_mask.copy_(noisy(layer.weight_mask != 0, 0.4))
    assert swap(other, max_waste=0.5)[1]["0"].choice == "sparse_oc_block16"
    assert not swap(model)[1]["0"].swapped


@pytest.mark.parametrize("how", ["prune", "dense zeros", "parametrize", "buffer"])
def test_masks_of_any_source(times, how):
    times.ms |= {"oc_block16": 0.5}
    model = net().eval()
    mask = model[0].weight_mask != 0
    kept_zero = tuple(mask.nonzero()[0].tolist())
    if how != "prune":
        torch_prune.remove(model[0], "weight")
    with torch.no_grad():
        (model[0].weight_orig if how == "prune" else model[0].weight)[kept_zero] = 0
    if how == "parametrize":
        parametrize.register_parametrization(model[0], "weight", torch.ao.pruning.FakeSparsity(mask.float()))
    elif how == "buffer":
        model[0].register_buffer("mask", mask)
    y = model(X)
    model, rows = swap(model)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    assert rows["0"].choice == "sparse_oc_block16"
    assert bool(model[0].sparse_weight.mask()[kept_zero]) is (how != "dense zeros"), "a kept weight may be 0"
    assert not parametrize.is_parametrized(model[0])
    assert not model[0]._forward_pre_hooks


def test_conv1d_and_linear(times):
    times.ms |= {"oc_block16": 0.5}
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 7, 32)).eval()
    pyops.prune.oc_block(model, 0.5, 16)
    x = randn(3, 4, 9)
    y = model(x)
    swap(model, x=x)
    assert (type(model[0]), type(model[3])) == (SparseConv1d, SparseLinear)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- what stays, and why


class Standardized(nn.Conv2d):
    """Computes with another weight than it holds."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class Plain(nn.Conv2d):
    """A subclass that is used as a plain layer."""


def test_what_stays_has_a_reason(times):
    times.ms |= dict.fromkeys((*BLOCKS, "unstructured", "2:4"), 0.1)
    patched = nn.Conv2d(4, 4, 1)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "standardized": Standardized(4, 4, 1),
            "plain": Plain(4, 4, 1),
            "patched": patched,
            "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
            "transposed": nn.ConvTranspose2d(4, 4, 1),
            "dense": nn.Conv2d(4, 4, 1),
            "unapplied": nn.Conv2d(4, 4, 1),
            "attention": nn.MultiheadAttention(4, 2),
            "refused": nn.Conv2d(4, 4, 1),
            "never": nn.Conv2d(4, 4, 1),
            "lazy": nn.LazyConv2d(4, 1),
        }
    )
    for name in ("standardized", "plain", "depthwise", "refused", "never", "unapplied"):
        pyops.prune.magnitude(model[name], 0.5)
        torch_prune.remove(model[name], "weight")
    with torch.no_grad():
        model["unapplied"].weight.add_(1)
    model["unapplied"].register_buffer("mask", torch.zeros(4, 4, 1, 1, dtype=torch.bool))

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            for name in ("standardized", "plain", "depthwise", "dense", "unapplied", "refused"):
                self.layers[name](x)
            return x

    _, rows = swap(Calls(), lambda module, name: not name.endswith("refused"))
    rows = {name.removeprefix("layers."): row for name, row in rows.items()}
    assert {name: row.reason for name, row in rows.items() if not row.swapped} == {
        "standardized": "Standardized has a _conv_forward of its own",
        "patched": "Conv2d has a forward of its own",
        "depthwise": "depthwise: stays dense",
        "dense": "nothing is pruned",
        "unapplied": "weights outside of its mask are not zero: the mask is not applied",
        "attention.out_proj": "its parent (nn.MultiheadAttention) reads the weight instead of calling the layer",
        "refused": "filter_fn",
        "never": "not called with these example_inputs",
        "lazy": "not initialized yet: run the model once",
    }
    assert rows["plain"].swapped


@pytest.mark.parametrize("remove_channels", [False, True])
def test_a_model_on_meta(remove_channels):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    rows = swap(model, x=X.to("meta"), remove_channels=remove_channels)[1]
    assert {row.reason for row in rows.values()} == {"its weight has no values in which to look for zeros"}


def test_example_inputs_are_needed_to_measure():
    with pytest.raises(ValueError, match="chooses by measuring and needs swap_"):
        pyops.swap_(net(), pyops.Sparse())
    with pytest.raises(ValueError, match=r"model is itself a Conv2d.*SparseConv2d\.from_dense"):
        pyops.swap_(nn.Conv2d(1, 1, 1), pyops.Sparse(), example_inputs=X)


@pytest.mark.parametrize("x", [None, X])
def test_converting_without_measuring(x):
    model = net().eval()
    y = model(X)
    model, rows = swap(model, x=x, pattern="oc_block4", measure=False)
    assert [name for name, row in rows.items() if row.swapped] == ["0", "2"], "only what is pruned"
    assert model[2].pattern == "oc_block4"
    assert (rows["2"].ms_after is None) is (x is None)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    model = net()
    pyops.prune.bake_(model)
    with torch.no_grad():
        model[0].weight[0, :3] = 1
    reason = swap(model, x=x, pattern="2:4", measure=False)[1]["0"].reason
    assert reason == "its mask keeps more than 2 of 4 consecutive input channels"


def test_one_pattern_measured(times):
    times.ms |= {"oc_block4": 0.5, "oc_block16": 0.1}
    assert swap(pattern="oc_block4")[1]["0"].choice == "sparse_oc_block4"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "blocky"}, ValueError, "'blocky' is not one of auto, unstructured"),
        ({"max_waste": 1.0}, ValueError, "max_waste is 1.0; allowed"),
        ({"min_gain": -0.1}, ValueError, "min_gain is -0.1; allowed"),
        ({"min_gain": math.nan}, ValueError, "min_gain is nan"),
        ({"max_waste": "1"}, TypeError, "max_waste must be a number"),
        ({"measure": False}, ValueError, "measure=False needs a pattern"),
        ({"measure": 1}, TypeError, "measure must be True or False"),
        ({"remove_channels": None}, TypeError, "remove_channels must be True or False"),
        ({"cache": 3.0}, TypeError, "cache must be a path"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        pyops.Sparse(**arguments)


# ------------------------------------------------------------------------------------------- dead channels


def test_dead_channels_are_removed_first(times):
    times.ms |= {"oc_block16": 0.5, "oc_block8": 0.5, "oc_block4": 0.5}
    model = net().eval()
    model[0].weight_mask[:7] = 0
    model[2].weight_mask[:2] = 1  # reads all channels
    with torch.no_grad():
        model[0].bias[:7] = -1  # ReLU makes a 0 of it
    y = model(X)
    model, rows = swap(model, remove_channels=True)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    assert (rows["0"].choice, model[0].out_channels, model[2].in_channels) == ("sparse_oc_block4", 25, 25)
    assert rows["0"].shape == (32, 4, 3, 3), "before"
    assert "output channels 32 -> 25" in rows["0"].reason
    assert (rows["2"].choice, type(model[2])) == ("fewer_channels", nn.Conv2d)
    assert rows["2"].reason.startswith("input channels 32 -> 25; not 3% faster")
    assert rows["2"].bytes_after < rows["2"].bytes_before
    assert rows["8"].choice == UNCHANGED


def test_a_model_that_cannot_be_traced_says_so(times):
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() < torch.inf else x

    model = Branches(*net())
    model[0].weight_mask[:7] = 0
    rows = swap(model, remove_channels=True)[1]
    assert "dead channels stay: the model cannot be traced" in rows["0"].reason
    assert rows["0"].choice == rows["8"].choice == UNCHANGED


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ValueError])
@pytest.mark.parametrize("remove_channels", [False, True])
def test_after_an_exception_the_model_is_as_it_was(monkeypatch, error, remove_channels):
    model = net()
    model[2].register_forward_hook(lambda *args: None)
    model[4].eval()
    model[0].weight_mask[:7] = 0
    model[0].bias.data[:7] = 0
    y = model(X)  # now no attribute is stale
    before, state, count = snapshot(model), torch.get_rng_state(), []

    def interrupted(functions, captured):
        count.append(1)
        if len(count) == 2:
            raise error("stop")
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(measure, "times", interrupted)
    with pytest.raises(error, match="stop"):
        swap(model, remove_channels=remove_channels)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(X), y)


# ------------------------------------------------------------------------------------------- report and life


def test_the_report_shows_what_pruned_layers_have(times):
    times.ms |= {"oc_block16": 0.5}
    report = pyops.swap_(net(), pyops.Sparse(), example_inputs=X)
    head = str(report).splitlines()[0]
    assert "sparsity" in head
    assert "structure" in head
    assert "75.0%" in str(report)
    rows = json.loads(json.dumps(report.to_dict()))["rows"]
    assert rows[0]["structure"] == "oc_block16"
    assert rows[-1]["sparsity"] == 0
    plain = pyops.swap_(net(), pyops.Int8Dynamic())
    assert "structure" not in str(plain)
    assert not {"structure", "sparsity", "pays_from"} & set(plain.to_dict()["rows"][0])


def test_progress(times, capsys):
    pytest.importorskip("tqdm")
    pyops.swap_(net(), pyops.Sparse(), example_inputs=X)
    assert capsys.readouterr().err == "", "no terminal"
    pyops.swap_(net(), pyops.Sparse(), example_inputs=X, progress=True)
    assert "pyops.swap_" in capsys.readouterr().err


def test_a_swapped_model_goes_through_its_life(times):
    times.ms |= {"oc_block16": 0.5}
    model, _ = swap(net().eval())
    pyops.prune.bake_(model)
    y = model(X)
    assert torch.equal(copy.deepcopy(model)(X), y)
    fresh, _ = swap(net().eval())
    pyops.prune.bake_(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), y)
    model.train()(X).sum().backward()
    assert model[0].values.grad is not None
    assert swap(model)[1].keys() == {"2", "4", "5", "8"}
