"""`pyops.prune`: masks against brute force in float64, torch's own pruning beside ours, training, schedules, errors."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from cases import randn, without_address
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import pyops
from pyops import optim, prune

quick = settings(max_examples=40, deadline=None)
METHODS = {
    "magnitude": prune.magnitude,
    "oc_block": functools.partial(prune.oc_block, block=4),
    "ic_block": functools.partial(prune.ic_block, block=4),
    "channels 0": functools.partial(prune.channels, dim=0),
    "channels 1": functools.partial(prune.channels, dim=1),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 20, 3),
        nn.BatchNorm2d(20),
        nn.Conv2d(20, 20, 3, groups=20, bias=False),
        nn.ModuleDict({"conv": nn.Conv1d(20, 9, 1), "fc": nn.Linear(11, 7)}),
    )


def layer_with(weight):
    """A layer of weight [O, I], [O, I, R] or [O, I, R, S]."""
    kind = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[weight.dim()]
    layer = kind(weight.shape[1], weight.shape[0], *[weight.shape[2:]] * (weight.dim() > 2), dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def hooks(layer):
    return [h for h in layer._forward_pre_hooks.values() if isinstance(h, torch_prune.BasePruningMethod)]


def snapshot(model):
    state = [(key, value.clone()) for key, value in model.state_dict().items()]
    return state, [(name, id(m), list(m._forward_pre_hooks), list(m.__dict__)) for name, m in model.named_modules()]


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1] == before[1]
    for (key, a), (other, b) in zip(after[0], before[0], strict=True):
        assert key == other
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


# ------------------------------------------------------------------------------------------- masks


def brute_force(w, unit, sparsity, p=2.0):
    """Mask of w [O, I, T] by the definition: units by their mean, first to last, until the sum is nearest."""
    corners = itertools.product(*(range(0, n, u) for n, u in zip(w.shape, unit, strict=True)))
    places = [tuple(slice(c, c + u) for c, u in zip(corner, unit, strict=True)) for corner in corners]
    scores = [w[place].abs().max() if p == math.inf else (w[place].abs() ** p).mean() for place in places]
    mask, zeros, target = torch.ones_like(w, dtype=torch.bool), 0, sparsity * w.numel()
    for i in sorted(range(len(places)), key=lambda i: float(scores[i]))[:-1]:
        size = w[places[i]].numel()
        if abs(zeros + size - target) >= abs(zeros - target):
            break
        mask[places[i]] = False
        zeros += size
    return mask


@quick
@given(
    st.tuples(st.integers(1, 21), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from(["oc", "ic", "c0", "c1"]),
    st.integers(1, 18),
    st.sampled_from([0.0, 0.3, 0.51, 0.77, 0.999]),
    st.sampled_from([1.0, 2.0, math.inf]),
)
def test_blocks_and_channels(shape, kind, block, sparsity, p):
    w = randn(*shape, dtype=torch.float64)
    layer, (o, i, t) = layer_with(w), (shape[0], shape[1], shape[2] * shape[3])
    call, unit = {
        "oc": (functools.partial(prune.oc_block, block=block), (min(block, o), 1, 1)),
        "ic": (functools.partial(prune.ic_block, block=block), (1, min(block, i), 1)),
        "c0": (functools.partial(prune.channels, dim=0), (1, i, t)),
        "c1": (functools.partial(prune.channels, dim=1), (o, 1, t)),
    }[kind]
    (row,) = call(layer, sparsity, norm=p)
    units = math.prod(-(-n // u) for n, u in zip((o, i, t), unit, strict=True))
    expected = brute_force(w.reshape(o, i, t), unit, sparsity, p)
    # A half is rounded to even, as torch does; brute force rounds it down.
    if (sparsity * units) % 1 != 0.5:
        assert torch.equal(layer.weight_mask.reshape(o, i, t) != 0, expected)
    assert torch.equal(layer.weight, w * layer.weight_mask)
    assert (row.name, row.kept, row.total) == ("", int(layer.weight_mask.sum()), w.numel())
    assert row.kept > 0


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 3, 5), (9, 4, 3, 3), (16, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.95])
def test_single_layers_are_pruned_as_torch_does(shape, sparsity):
    for ours, theirs in (
        (prune.magnitude, torch_prune.l1_unstructured),
        (functools.partial(prune.channels, dim=0), functools.partial(torch_prune.ln_structured, n=2, dim=0)),
    ):
        a, b = layer_with(randn(*shape)), layer_with(randn(*shape))
        ours(a, sparsity)
        if round(sparsity * (shape[0] if "n" in getattr(theirs, "keywords", {}) else a.weight.numel())):
            theirs(b, "weight", amount=sparsity)
        else:
            torch_prune.identity(b, "weight")
        if (b.weight_mask != 0).any():  # torch rounds up to all of them
            assert torch.equal(a.weight_mask, b.weight_mask)
        assert a.weight_mask.dtype == a.weight_orig.dtype
        assert a.state_dict().keys() == b.state_dict().keys()
        x = randn(2, shape[1], *[5] * (len(shape) - 2))
        if (b.weight_mask != 0).any() and len(shape) > 2:
            a.bias = b.bias
            assert torch.equal(a(x), b(x))


@quick
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 19), st.integers(1, 3)),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 1),
)
def test_n_m(shape, n, more, pruned_before):
    m, w = n + more, randn(*shape, dtype=torch.float64)
    layer, old = layer_with(w), randn(*shape, seed=3) > 0
    if pruned_before:
        torch_prune.custom_from_mask(layer, "weight", old)
    else:
        old = torch.ones(shape, dtype=torch.bool)
    prune.n_m(layer, n, m)
    expected = torch.zeros(shape, dtype=torch.bool)
    for o, t in itertools.product(range(shape[0]), range(shape[2])):
        for i in range(0, shape[1], m):
            group = [j for j in range(i, min(i + m, shape[1])) if old[o, j, t]]
            for j in sorted(group, key=lambda j: -float(w[o, j, t].abs()))[:n]:
                expected[o, j, t] = True
    assert torch.equal(layer.weight_mask != 0, expected)


def test_a_short_last_block_is_not_pruned_for_being_short():
    layer = layer_with(torch.ones(20, 4))
    with torch.no_grad():
        layer.weight[:16, :2] *= 0.9
    assert prune.oc_block(layer, 0.4) == [prune.Pruned("", 48, 80)]
    assert torch.equal(layer.weight_mask[:, :2], torch.cat([torch.zeros(16, 2), torch.ones(4, 2)]))
    assert (layer.weight_mask[:, 2:] == 1).all()


def test_ties_go_in_order_and_equal_weights_are_pruned_to_the_number():
    layer = layer_with(torch.ones(4, 10))
    prune.magnitude(layer, 0.3)
    assert torch.equal(layer.weight_mask.flatten(), (torch.arange(40) >= 12).float())
    prune.n_m(layer)
    assert layer.weight_mask[3].tolist() == [1, 1, 0, 0] * 2 + [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_method
def test_dtypes_and_strides(method, dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 24, 3, dtype=dtype).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer).to(torch.float64, memory_format=torch.contiguous_format)
    method(layer, 0.5)
    method(twin, 0.5)
    assert torch.equal(layer.weight_mask, twin.weight_mask.to(dtype))
    assert layer.weight_mask.stride() == layer.weight_orig.stride()
    assert layer.weight.dtype == dtype


def test_depthwise_layers_are_their_own_layout():
    layer = nn.Conv2d(8, 8, 3, groups=8)
    assert prune.n_m(layer)[0].sparsity == 0
    assert prune.oc_block(layer, 0.5, block=8)[0].kept in (32, 40)
    taps = layer.weight_mask.flatten(1)
    assert (taps == taps[0]).all(), "blocks of 8 channels x 1 tap"
    assert prune.channels(layer, 0.5, dim=1)[0].kept > 0, "the only input channel stays"


def test_tiny_weights_do_not_underflow():
    layer = layer_with(randn(16, 4, scale=1e-30))
    prune.oc_block(layer, 0.5, block=4)
    twin = layer_with(randn(16, 4, scale=1e-30).double())
    prune.oc_block(twin, 0.5, block=4)
    assert torch.equal(layer.weight_mask.double(), twin.weight_mask)


def test_empty_weights():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(0, 3)
    assert prune.magnitude(layer, 0.5) == prune.n_m(layer) == prune.oc_block(layer, 0.5) == [prune.Pruned("", 0, 0)]
    assert prune.Pruned("", 0, 0).sparsity == 0


# ------------------------------------------------------------------------------------------- models


def test_a_model_and_its_rows():
    model = net()
    rows = prune.magnitude(model, 0.5)
    assert [row.name for row in rows] == ["0", "2", "3.conv", "3.fc"]
    assert [row.total for row in rows] == [1080, 180, 180, 77]
    assert [row.kept for row in rows] == [540, 90, 90, 77 - 38]
    assert not hasattr(model[1], "weight_mask")
    assert prune.magnitude(model, 0.5, filter_fn=lambda m, name: name.startswith("3"))[0].name == "3.conv"
    assert [row.name for row in prune.magnitude(model, 0.5, name="bias")] == ["0", "3.conv", "3.fc"]
    assert int(model[0].bias_mask.sum()) == 10


def test_global_magnitude_is_that_of_torch():
    a, b, c = net(), net(), net()
    with torch.no_grad():
        for model in (a, b, c):
            model[0].weight *= 3
    prune.magnitude(a, 0.6, scope="global")
    for model, method in ((b, torch_prune.L1Unstructured), (c, prune.Magnitude)):
        parameters = [(m, "weight") for m in (model[0], model[2], model[3]["conv"], model[3]["fc"])]
        key = {"amount": 0.6} if model is b else {"sparsity": 0.6}
        torch_prune.global_unstructured(parameters, pruning_method=method, **key)
    masks = [[v for k, v in m.state_dict().items() if k.endswith("mask")] for m in (a, b, c)]
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*masks, strict=True))
    assert len({float(mask.mean()) for mask in masks[0]}) > 1


@every_method
def test_global_scope_meets_the_total(method):
    model = net()
    with torch.no_grad():
        model[3]["fc"].weight *= 1e-3
    for sparsity in (0.3, 0.6, 0.9):
        rows = method(model, sparsity, scope="global")
        pruned = sum(row.total - row.kept for row in rows)
        assert abs(pruned / sum(row.total for row in rows) - sparsity) < 0.06
    assert rows[-1].kept == 0, "a layer may go as a whole"


def test_global_scope_ranks_blocks_of_all_layers():
    model = nn.Sequential(layer_with(randn(8, 6)), layer_with(randn(6, 4, seed=1) * 2))
    prune.oc_block(model, 0.5, block=4, scope="global")
    w = [m.weight_orig.detach() for m in model]
    scores = [block.square().mean(0) for t in w for block in t.split(4)]  # a row of blocks each
    sizes = [block.shape[0] for t in w for block in t.split(4)]
    flat = sorted((s.item(), n) for row, n in zip(scores, sizes, strict=True) for s in row)
    total, zeros = sum(n for _, n in flat), 0
    while zeros + flat[0][1] / 2 < 0.5 * total:
        threshold, n = flat.pop(0)
        zeros += n
    kept = [mask for m in model for mask in m.weight_mask.split(4)]
    assert all(torch.equal(mask[0] != 0, s > threshold) for mask, s in zip(kept, scores, strict=True))


def test_layers_under_two_names_and_attention():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["b"] = model["a"]
    assert [row.name for row in prune.magnitude(model, 0.5)] == ["a"]
    with pytest.raises(ValueError, match="filter_fn takes none of the 1 layers"):
        prune.magnitude(model, 0.5, filter_fn=lambda m, name: name != "b")
    assert not torch_prune.is_pruned(model["attention"])


def test_importance_scores():
    layer, scores = nn.Linear(4, 6), randn(6, 4, seed=9)
    prune.magnitude(layer, 0.5, importance_scores=scores)
    assert torch.equal(layer.weight_mask != 0, scores.abs() > scores.abs().flatten().kthvalue(12).values)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    torch.manual_seed(0)
    model[1].load_state_dict(model[0].state_dict())
    prune.oc_block(model, 0.5, 2, importance_scores={(model[1], "weight"): scores})
    by_scores = layer_with(scores)
    prune.oc_block(by_scores, 0.5, 2)
    assert torch.equal(model[1].weight_mask, by_scores.weight_mask)
    assert not torch.equal(model[0].weight_mask, by_scores.weight_mask)
    prune.IcBlock.apply(model[0], "weight", 0.5, block=2, importance_scores=scores)
    assert len(hooks(model[0])) == 1


# ------------------------------------------------------------------------------------------- again, and with torch


@every_method
def test_pruning_again_means_the_total_and_keeps_one_hook(method):
    model = net()
    method(model, 0.25)
    buffers = {id(m.weight_mask) for m in model.modules() if hasattr(m, "weight_mask")}
    for sparsity in (0.5, 0.5, 0.8, 0.3):
        before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("mask")}
        with torch.no_grad():
            for m in model.modules():
                if hasattr(m, "weight_orig"):
                    m.weight_orig.copy_(randn(*m.weight_orig.shape, seed=int(sparsity * 100)))
        rows = method(model, sparsity)
        for key, mask in model.state_dict().items():
            if key.endswith("mask"):
                assert not (mask.bool() & ~before[key].bool()).any(), "what was pruned stays so"
                if sparsity in (0.3, 0.5) and before[key].mean() <= 1 - sparsity:
                    assert torch.equal(mask, before[key]), "nothing more to do"
        fresh = {row.name: row.kept for row in method(net(), max(sparsity, 0.8 if sparsity == 0.3 else 0))}
        assert all(abs(row.kept - fresh[row.name]) <= 4 for row in rows), "as in one go, but for a block"
    layers = [m for m in model.modules() if hasattr(m, "weight_mask")]
    assert all(len(hooks(m)) == 1 and not isinstance(hooks(m)[0], torch_prune.PruningContainer) for m in layers)
    assert {id(m.weight_mask) for m in layers} == buffers, "the same buffers"
    assert all(torch.equal(m.weight, m.weight_orig * m.weight_mask) for m in layers), "and a fresh weight"


def test_blocks_over_single_weights_are_as_many_as_asked_for():
    layer = layer_with(randn(32, 8))
    prune.magnitude(layer, 0.5)
    prune.oc_block(layer, 0.5)
    dead = (layer.weight_mask.view(2, 16, 8) == 0).all(1)
    assert dead.sum() == 8
    assert layer.weight_mask.mean() < 0.5


def test_everything_pruned_stays_so():
    layer = nn.Linear(4, 6)
    torch_prune.random_unstructured(layer, "weight", 1.0)
    for method in METHODS.values():
        assert method(layer, 0.5)[0].kept == 0
    assert prune.n_m(layer)[0].kept == 0


def test_containers_of_torch_and_ours():
    layer = nn.Conv2d(8, 16, 3)
    handle_order = []
    layer.register_forward_pre_hook(lambda m, args: handle_order.append(float(m.weight.count_nonzero())))
    torch_prune.l1_unstructured(layer, "weight", 0.25)
    first = layer.weight_mask.clone()
    for sparsity in (0.3, 0.4, 0.5):
        prune.ic_block(layer, sparsity)
        prune.channels(layer, sparsity / 2)
    container = hooks(layer)[0]
    assert [type(m).__name__ for m in container] == ["L1Unstructured", "IcBlock", "Channels"]
    assert not (layer.weight_mask.bool() & ~first.bool()).any()
    torch_prune.ln_structured(layer, "weight", 0.5, n=2, dim=1)  # torch's, on top of ours
    assert len(container) == 4
    layer(randn(1, 8, 5, 5))
    assert handle_order
    weight = layer.weight.clone()
    assert torch_prune.is_pruned(layer)
    torch_prune.remove(layer, "weight")
    assert torch.equal(layer.weight, weight)
    assert not torch_prune.is_pruned(layer)


def test_methods_under_torchs_own_protocol():
    w = randn(16, 8)
    mine = layer_with(w)
    method = prune.OcBlock.apply(mine, "weight", 0.5, block=8)
    assert isinstance(method, prune.OcBlock)
    assert torch.equal(prune.OcBlock(0.5, 8).prune(w), mine.weight)
    container = torch_prune.PruningContainer()
    container._tensor_name = (second := prune.NM(1, 2))._tensor_name = "weight"
    container.add_pruning_method(second)
    combined = container.compute_mask(w, mine.weight_mask)
    prune.NM.apply(mine, "weight", n=1, m=2)
    assert torch.equal(combined, mine.weight_mask)
    layer = layer_with(w)
    torch_prune.global_unstructured([(layer, "weight")], pruning_method=prune.Magnitude, sparsity=0.5)
    torch_prune.global_unstructured([(layer, "weight")], pruning_method=prune.Magnitude, sparsity=0.5)
    assert layer.weight_mask.sum() == 32, "a share of what is left, as torch's own"
    with pytest.raises(TypeError, match="unstructured"):
        torch_prune.global_unstructured([(layer, "weight")], pruning_method=prune.OcBlock, sparsity=0.5)
    with pytest.raises(TypeError, match="blok"):
        prune.OcBlock.apply(layer, "weight", 0.5, blok=8)


def test_a_state_dict_carries_the_masks():
    model, fresh = net(), net()
    prune.oc_block(model, 0.5)
    assert {"0.weight_orig", "0.weight_mask", "2.weight_mask"} <= model.state_dict().keys()
    prune.magnitude(fresh, 0.0)
    fresh.load_state_dict(model.state_dict())
    x = randn(2, 6, 9, 9)
    assert torch.equal(fresh[0](x), model[0](x))
    rows = prune.oc_block(fresh, 0.5)
    assert [row.kept for row in rows] == [row.kept for row in prune.oc_block(model, 0.5)]


def test_bake():
    model = net()
    parameters = {id(p) for p in model.parameters()}
    prune.oc_block(model, 0.5, block=4)
    prune.n_m(model)
    torch_prune.l1_unstructured(model[1], "bias", 0.5)
    model[0].register_forward_pre_hook(lambda m, args: None)
    weights = [m.weight.clone() for m in (model[0], model[2])]
    baked = prune.bake_(model)
    assert baked == ["0.weight", "1.bias", "2.weight", "3.conv.weight", "3.fc.weight"]
    assert [torch.equal(m.weight, w) for m, w in zip((model[0], model[2]), weights, strict=True)] == [True, True]
    assert {id(p) for p in model.parameters()} == parameters
    assert model.state_dict().keys() == net().state_dict().keys()
    assert len(model[0]._forward_pre_hooks) == 1
    assert prune.bake_(model) == []
    layer = nn.Linear(3, 3)
    prune.magnitude(layer, 0.5)
    assert prune.bake_(layer) == ["weight"]
    with pytest.raises(TypeError, match="model must be"):
        prune.bake_(None)


# ------------------------------------------------------------------------------------------- training

OPTIMIZERS = {
    "torch SGD": lambda model, p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "torch AdamW": lambda model, p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "pyops SGD": lambda model, p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, masks=model),
    "pyops AdamW": lambda model, p: optim.AdamW(p, lr=0.01, weight_decay=0.1, masks=model),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_keeps_the_zeros(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 3))
    parameters = list(model.parameters())
    prune.oc_block(model, 0.0)
    optimizer = OPTIMIZERS[kind](model, parameters)  # they stay the same objects
    x, y = randn(16, 4, 5, 5), torch.arange(16) % 3
    schedule = prune.GradualSchedule(model, prune.oc_block, 0.75, interval=10, count=5)
    losses, zeros = [], [torch.zeros(())] * 2
    for step in range(1, 101):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        rows = schedule.step()
        losses.append(loss.item())
        assert bool(rows) == (step == 1 or (step % 10 == 0 and step <= 50))
        if step >= 50:
            for i, layer in enumerate((model[0], model[3])):
                effective = layer.weight_orig * layer.weight_mask
                zeros[i] = (effective == 0) if step == 50 else zeros[i]
                assert torch.equal(effective == 0, zeros[i])
                assert torch.equal(layer.weight_mask == 0, zeros[i])
        if "pyops" in kind and not rows:
            assert all(not layer.weight_orig[layer.weight_mask == 0].any() for layer in (model[0], model[3]))
    assert schedule.finished
    assert losses[-1] < 0.5 * losses[0]
    assert [round(1 - float(m.weight_mask.mean()), 2) for m in (model[0], model[3])] == [0.75, 0.75]
    assert optim.masks_of(model).keys() == {model[0].weight_orig, model[3].weight_orig}
    before = model(x)
    prune.bake_(model)
    assert torch.equal(model(x), before)
    assert float((model[0].weight == 0).float().mean()) == 0.75


def test_a_pruned_model_can_be_swapped():
    model = nn.Sequential(nn.Linear(16, 8))
    prune.ic_block(model, 0.5)
    report = pyops.swap_(model, pyops.Int8Dynamic())
    assert "pruned" in report.rows[0].reason


# ------------------------------------------------------------------------------------------- schedule


def test_schedule_follows_the_equation():
    asked = []
    schedule = prune.GradualSchedule(
        net(), lambda m, s: asked.append(s) or [s], 0.9, initial=0.2, start=7, interval=5, count=4
    )
    done = [schedule.step() for _ in range(40)]
    assert [i + 1 for i, report in enumerate(done) if report] == [7, 12, 17, 22, 27]
    assert asked == pytest.approx([0.9 + (0.2 - 0.9) * (1 - k / 4) ** 3 for k in range(5)])
    assert asked[-1] == 0.9
    assert [schedule.sparsity_at(t) for t in (0, 6, 7, 11, 12, 10**9)] == [0, 0, asked[0], asked[0], asked[1], 0.9]
    assert schedule.finished
    assert schedule.sparsity == 0.9
    fresh = prune.GradualSchedule(net(), prune.magnitude, 0.9, initial=0.5)
    assert (fresh.sparsity, fresh.finished) == (0, False)
    fresh.step()
    assert fresh.sparsity == 0.5


def test_schedule_resumes():
    def make(model):
        return prune.GradualSchedule(model, prune.magnitude, 0.8, interval=3, count=4)

    def disturb(model, step):
        with torch.no_grad():
            model[0].weight_orig += randn(*model[0].weight_orig.shape, seed=step) * 0.1

    whole = net()
    schedule = make(whole)
    for step in range(14):
        schedule.step()
        disturb(whole, step)
        if step == 6:
            state, weights = schedule.state_dict(), copy.deepcopy(whole.state_dict())
    resumed = net()
    prune.magnitude(resumed, 0.0)
    resumed.load_state_dict(weights)
    schedule = make(resumed)
    schedule.load_state_dict(state)
    for step in range(7, 14):
        schedule.step()
        disturb(resumed, step)
    assert schedule.finished
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_step_that_fails_does_not_count():
    model = net()
    schedule = prune.GradualSchedule(model, prune.magnitude, 0.8)
    bias = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    with pytest.raises(ValueError, match="layer '0': weight holds NaN"):
        schedule.step()
    assert schedule.state_dict()["step"] == 0
    with torch.no_grad():
        model[0].weight.copy_(bias)
    assert schedule.step()


SCHEDULE_ERRORS = [
    ({"model": 3}, TypeError, "model must be"),
    ({"method": "magnitude"}, TypeError, "method must be callable .* got str"),
    ({"method": prune.Magnitude}, TypeError, "method must be callable .* got Magnitude"),
    ({"method": prune.n_m}, TypeError, "method is n_m"),
    ({"method": functools.partial(prune.n_m, n=1)}, TypeError, "method is n_m"),
    ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\)"),
    ({"initial": -0.1}, ValueError, r"initial must be in \[0, 1\)"),
    ({"initial": 0.9}, ValueError, "initial must be at most sparsity"),
    ({"initial": 0}, TypeError, "initial must be a float"),
    ({"start": -1}, ValueError, "start must be 0 or more"),
    ({"start": 1.5}, TypeError, "start must be an int"),
    ({"interval": 0}, ValueError, "interval must be above 0"),
    ({"count": True}, TypeError, "count must be an int"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), SCHEDULE_ERRORS, ids=[without_address(e[0]) for e in SCHEDULE_ERRORS]
)
def test_schedule_errors(change, error, message):
    arguments = {"model": net(), "method": prune.magnitude, "sparsity": 0.5, **change}
    with pytest.raises(error, match=message):
        prune.GradualSchedule(**arguments)


def test_schedule_state_errors():
    schedule = prune.GradualSchedule(net(), prune.magnitude, 0.5)
    state = schedule.state_dict()
    for bad, error, message in (
        (None, TypeError, "must be a mapping"),
        ({}, ValueError, "must have an int 'step'"),
        ({**state, "step": -1}, ValueError, "must have an int 'step'"),
        ({**state, "interval": 7}, ValueError, "with interval=7, this one has 100"),
        ({**state, "epoch": 7}, ValueError, "keys that no schedule has: epoch"),
    ):
        with pytest.raises(error, match=message):
            schedule.load_state_dict(bad)
    schedule.load_state_dict({"step": 500})
    assert schedule.state_dict() == {**state, "step": 500}


# ------------------------------------------------------------------------------------------- errors


def broken(kind):
    """A model whose last layer cannot be pruned."""
    model = net()
    if kind == "NaN":
        with torch.no_grad():
            model[3]["fc"].weight[1, 1] = torch.nan
    elif kind == "lazy":
        model[3]["fc"] = nn.LazyLinear(4)
    elif kind == "parametrized":
        parametrize.register_parametrization(model[3]["fc"], "weight", nn.Tanh())
    elif kind == "weight_norm":
        nn.utils.weight_norm(model[3]["fc"])
    elif kind == "meta":
        model[3]["fc"] = nn.Linear(3, 3, device="meta")
    else:
        model[3]["fc"].weight = nn.Parameter(torch.ones(7, 11, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("NaN", ValueError, "weight holds NaN"),
        ("lazy", ValueError, "the module is not initialized yet"),
        ("parametrized", ValueError, "weight is parametrized by Tanh"),
        ("weight_norm", ValueError, "weight is under WeightNorm"),
        ("meta", ValueError, "weight is on the meta device"),
        ("int", TypeError, "weight is torch.int8; allowed: floating point"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Lazy")
def test_a_layer_that_cannot_be_pruned_leaves_all_as_they_were(kind, error, message):
    model = broken(kind)
    before = snapshot(model) if kind not in ("lazy", "meta") else None
    for call in (
        *(functools.partial(method, sparsity=0.5) for method in METHODS.values()),
        prune.n_m,
        functools.partial(prune.magnitude, sparsity=0.5, scope="global"),
    ):
        with pytest.raises(error, match=f"layer '3.fc': {message}"):
            call(model)
    assert not torch_prune.is_pruned(model[0])
    assert before is None or assert_unchanged(model, before) is None
    with pytest.raises(error, match=message):
        prune.Magnitude.apply(model[3]["fc"], "weight", 0.5)
    prune.magnitude(model, 0.5, filter_fn=lambda m, name: name != "3.fc")


ERRORS = [
    (lambda m: prune.magnitude(m, 1.0), ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
    (lambda m: prune.magnitude(m, -0.1), ValueError, "sparsity must be in"),
    (lambda m: prune.magnitude(m, math.nan), ValueError, "sparsity must be in"),
    (lambda m: prune.magnitude(m, 1), TypeError, "sparsity must be a float .* got int 1"),
    (lambda m: prune.magnitude(m, "0.5"), TypeError, "sparsity must be a float .* got str"),
    (lambda m: prune.magnitude(m, True), TypeError, "sparsity must be a float"),
    (lambda m: prune.magnitude(m, 0.5, scope="model"), ValueError, "scope must be 'layer' or 'global', got 'model'"),
    (lambda m: prune.magnitude(m, 0.5, name="wieght"), ValueError, "nothing to prune: .* parameter 'wieght'"),
    (lambda m: prune.magnitude(m[0], 0.5, name="wieght"), ValueError, "Conv2d has no parameter 'wieght'"),
    (lambda m: prune.magnitude(m[2], 0.5, name="bias"), ValueError, "Conv2d has no parameter 'bias'"),
    (lambda m: prune.magnitude(m, 0.5, name=3), TypeError, "name must be the name"),
    (lambda m: prune.magnitude(m, 0.5, filter_fn="fc"), TypeError, "filter_fn must be callable"),
    (lambda m: prune.magnitude(m[1], 0.5), TypeError, "module is a BatchNorm2d; allowed: Conv1d, Conv2d, Linear"),
    (lambda m: prune.magnitude(nn.ConvTranspose2d(3, 3, 3), 0.5), TypeError, "module is a ConvTranspose2d"),
    (lambda m: prune.magnitude(nn.Sequential(nn.ReLU()), 0.5), ValueError, "module has nothing to prune"),
    (lambda m: prune.magnitude(m[0].weight, 0.5), TypeError, "module must be a torch.nn.Module, got Parameter"),
    (lambda m: prune.Magnitude.apply(m, "weight", 0.5), TypeError, "module is a Sequential"),
    (lambda m: prune.oc_block(m, 0.5, 0), ValueError, "block must be above 0, got 0"),
    (lambda m: prune.ic_block(m, 0.5, 2.0), TypeError, "block must be an int, got float"),
    (lambda m: prune.oc_block(m, 0.5, norm=0), ValueError, "norm must be above 0, got 0"),
    (lambda m: prune.oc_block(m, 0.5, norm="fro"), TypeError, "norm must be a number above 0 or inf"),
    (lambda m: prune.channels(m, 0.5, 2), ValueError, "dim must be 0 .* got 2"),
    (lambda m: prune.channels(m, 0.5, "in"), TypeError, "dim must be 0 or 1, got str"),
    (lambda m: prune.n_m(m, 5, 4), ValueError, "n must be at most m, got n=5, m=4"),
    (lambda m: prune.n_m(m, 0), ValueError, "n must be above 0"),
    (lambda m: prune.n_m(m, 0.5), TypeError, "n must be an int"),
    (lambda m: prune.magnitude(m, 0.5, importance_scores=m[0].weight), TypeError, "one tensor for 4 layers"),
    (lambda m: prune.magnitude(m[0], 0.5, importance_scores=[1]), TypeError, "importance_scores must be a tensor or"),
    (
        lambda m: prune.magnitude(m[0], 0.5, importance_scores=randn(3, 3)),
        ValueError,
        r"importance_scores is \(3, 3\), the parameter that it ranks \(20, 6, 3, 3\)",
    ),
    (
        lambda m: prune.magnitude(m[0], 0.5, importance_scores=m[0].weight * torch.nan),
        ValueError,
        "importance_scores holds NaN",
    ),
    (
        lambda m: prune.magnitude(m, 0.5, importance_scores={(m[1], "weight"): m[1].weight}),
        ValueError,
        "importance_scores has a key",
    ),
    (
        lambda m: prune.magnitude(m, 0.5, importance_scores={(m[0], "weight"): m[0].weight.int()}),
        TypeError,
        "layer '0': importance_scores must be a tensor of floating point, got torch.int32",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_bad_arguments_touch_nothing(call, error, message):
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, before)
