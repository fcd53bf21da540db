"""`pyops.fold_batch_norm_`: outputs before and after in float64; what is refused and why, however it is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import randn
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import pyops
from pyops import prune

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randomized(model, dtype=torch.float64):
    """In eval mode, with statistics and affine parameters as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.to(dtype).eval()


def only(rows):
    (row,) = rows
    return row


def assert_refused(model, reason, **arguments):
    """One row, with this reason, and everything as before."""
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    row = only(pyops.fold_batch_norm_(model, **arguments))
    assert not row.folded
    assert reason in row.reason
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


class Opaque(nn.Module):
    """Runs a model behind a branch on data, which fx cannot trace."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() < torch.inf else None


# ------------------------------------------------------------------------------------------- one pair

PAIRS = {
    "conv2d": (lambda: (nn.Conv2d(5, 8, 3, 2, 1), nn.BatchNorm2d(8)), (2, 5, 9, 7)),
    "1x1, no bias": (lambda: (nn.Conv2d(5, 8, 1, bias=False), nn.BatchNorm2d(8)), (2, 5, 4, 4)),
    "groups, circular": (
        lambda: (nn.Conv2d(6, 9, 3, padding=1, groups=3, padding_mode="circular"), nn.BatchNorm2d(9, eps=0.1)),
        (2, 6, 5, 5),
    ),
    "depthwise, not affine": (
        lambda: (nn.Conv2d(7, 7, 3, groups=7, bias=False), nn.BatchNorm2d(7, affine=False)),
        (1, 7, 5, 5),
    ),
    "conv1d, same": (lambda: (nn.Conv1d(5, 8, 3, padding="same"), nn.BatchNorm1d(8)), (2, 5, 9)),
    "linear": (lambda: (nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=None)), (3, 5)),
    "linear, no bias": (lambda: (nn.Linear(5, 1, bias=False), nn.BatchNorm1d(1)), (3, 5)),
}


@pytest.mark.parametrize("how", ["fx", "run", "sequential"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_kind_of_pair(pair, how):
    make, shape = PAIRS[pair]
    torch.manual_seed(1)
    inner = nn.Sequential(*make(), nn.ReLU())
    model = randomized(inner if how == "fx" else Opaque(inner))
    layer, x = inner[0], randn(*shape, dtype=torch.float64)
    expected, parameters = model(x), dict(layer.named_parameters())
    row = only(pyops.fold_batch_norm_(model, x if how == "run" else None))
    prefix = "" if how == "fx" else "model."
    assert row == pyops.fold.Fold(f"{prefix}1", f"{prefix}0", True, "")
    assert type(inner[1]) is nn.Identity
    assert not inner[1].training
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert inner[0] is layer
    assert all(getattr(layer, name) is p for name, p in parameters.items()), "the same Parameters"
    assert layer.bias.requires_grad
    assert pyops.fold_batch_norm_(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding(dtype):
    """Not more than twice the error of the two layers."""
    model = randomized(nn.Sequential(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)), dtype)
    x = randn(2, 16, 8, 8, dtype=dtype)
    exact = copy.deepcopy(model).double()(x.double())
    error = (model(x).double() - exact).abs().max()
    assert only(pyops.fold_batch_norm_(model)).folded
    assert model[0].bias.dtype is model[0].weight.dtype is dtype
    assert (model(x).double() - exact).abs().max() <= 2 * error + torch.finfo(dtype).eps * exact.abs().max()


def test_a_layer_of_another_dtype_keeps_it():
    model = randomized(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)), torch.float32)
    model[0].bfloat16()
    expected = model(randn(1, 4, 5, 5, dtype=torch.bfloat16))
    assert only(pyops.fold_batch_norm_(model)).folded
    assert model[0].bias.dtype is torch.bfloat16
    torch.testing.assert_close(model(randn(1, 4, 5, 5, dtype=torch.bfloat16)), expected, rtol=0.05, atol=0.05)


def test_fold_into():
    layer, bn = randomized(nn.Linear(4, 6)), randomized(nn.BatchNorm1d(6))
    x = randn(3, 4, dtype=torch.float64)
    expected, state = bn(layer(x)), copy.deepcopy(bn.state_dict())
    assert pyops.fold_into(layer, bn) is None
    torch.testing.assert_close(layer(x), expected, **EXACT)
    assert all(torch.equal(a, b) for a, b in zip(bn.state_dict().values(), state.values(), strict=True))
    with pytest.raises(ValueError, match=r"cannot fold BatchNorm1d into Linear: in training mode: call eval\(\) first"):
        pyops.fold_into(layer, bn.train())
    with pytest.raises(ValueError, match="cannot fold Linear into Linear: Linear is not supported"):
        pyops.fold_into(layer, layer)


def test_frozen_layers_stay_frozen_and_strides_stay():
    model = randomized(nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)))
    model.to(memory_format=torch.channels_last).requires_grad_(False)
    strides = model[0].weight.stride()
    pyops.fold_batch_norm_(model)
    assert model[0].weight.stride() == strides
    assert not model[0].bias.requires_grad


# ------------------------------------------------------------------------------------------- pruned


@pytest.mark.parametrize("bias", [False, True])
def test_pruned_weights_keep_their_mask(bias):
    model = randomized(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)))
    prune.oc_block(model, 0.5, block=8)
    torch_prune.random_unstructured(model[0], "weight", 0.3)
    if bias:
        torch_prune.l1_unstructured(model[0], "bias", 0.5)
    mask, original = model[0].weight_mask.clone(), model[0].weight_orig
    with torch.no_grad():
        original.mul_(1.5)  # the plain attribute is stale now
    x = randn(1, 8, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(prune_free(model))(x)
    row = only(pyops.fold_batch_norm_(model))
    assert row.folded
    assert row.reason == ("its pruned bias is baked" if bias else "")
    assert model[0].weight_orig is original
    assert torch.equal(model[0].weight_mask, mask)
    assert torch.equal(model[0].weight, model[0].weight_orig * mask), "not stale"
    assert not hasattr(model[0], "bias_mask")
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert prune.bake_(model) == ["0.weight"]
    assert torch.equal(model[0].weight == 0, mask == 0)
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_a_run_of_pruned_layers():
    """Each forward of a pruned layer frees its `weight`, and the next tensor may be at the same address."""
    pairs = [layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))]
    model = randomized(Opaque(nn.Sequential(*pairs)))
    prune.magnitude(model, 0.5)
    x = randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    assert [row for row in pyops.fold_batch_norm_(model, x) if not row.folded] == []
    torch.testing.assert_close(model(x), expected, **EXACT)


def prune_free(model):
    """A copy without pruning: torch cannot copy a pruned model that holds a graph."""
    with torch.no_grad():
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
    model = copy.deepcopy(model)
    prune.bake_(model)
    return model


def test_zeros_stay_zeros():
    model = randomized(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    with torch.no_grad():
        model[0].weight[randn(8, 8) > 0] = 0
        model[1].weight[3] = 0
    zeros = model[0].weight == 0
    pyops.fold_batch_norm_(model)
    assert (model[0].weight == 0)[zeros].all()
    assert (model[0].weight[3] == 0).all()


# ------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A residual block with everything that folds; `wrong` names one way not to be foldable."""

    def __init__(self, wrong=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.saved, self.wrong, self.boxed = None, wrong, True

    def forward(self, x):
        y = self.conv1(x)
        form = y.shape[2:], y.dim(), y.dtype  # looking at it does no harm
        assert len(form) == 3
        if self.wrong == "in place":
            y.relu_()
        elif self.wrong == "a view":
            y = y.view(x.shape)
        z = self.bn1(y).relu()
        if self.wrong == "added":
            z = z + y
        elif self.wrong == "weight read":
            z = z + self.conv1.weight.mean()
        elif self.wrong == "norm read":
            z = z + self.bn1.running_mean.mean()
        elif self.wrong == "kept":
            self.saved = [y]
        elif self.wrong == "norm again":
            z = self.bn1(z)
        elif self.wrong == "conv again":
            z = self.conv1(z)
        elif self.wrong == "conv to conv":
            z = z + self.conv2(y)
        z = x + self.bn2(input=self.conv2(z.to(self.conv2.weight.dtype)))
        if self.wrong == "returned":
            return {"z": z, "y": Box(y) if self.boxed else y}
        return z if self.wrong != "skipped" else x


class Box:
    """An output that no one can look into."""

    def __init__(self, y):
        self.y = y


@pytest.mark.parametrize("how", ["fx", "run"])
def test_a_block_is_folded(how):
    block = Block()
    model = randomized(block if how == "fx" else Opaque(block))
    x = randn(2, 6, 5, 5, dtype=torch.float64)
    expected = model(x)
    rows = pyops.fold_batch_norm_(model, {"x": x} if how == "run" else None)
    assert [(row.layer[-5:], row.batch_norm[-3:], row.folded) for row in rows] == [
        ("conv1", "bn1", True),
        ("conv2", "bn2", True),
    ]
    assert type(block.bn1) is type(block.bn2) is nn.Identity
    torch.testing.assert_close(model(x), expected, **EXACT)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


REASONS = {
    "in place": ("the layer's output also goes to relu_", "the layer's output also goes to relu_"),
    "a view": ("its input comes from view", "its input comes from something else than a layer"),
    "added": ("the layer's output also goes to add", "the layer's output also goes to add"),
    "weight read": ("also used by code that reads conv1.weight", "also used by code that reads its tensors in mean"),
    "norm read": ("it is also used by code that reads bn1.running", "it is also used by code that reads its tensors"),
    "returned": ("the model's output", "also goes to the model's result"),
    "norm again": (
        "called on several outputs: conv1 (Conv2d), relu",
        "called on several outputs: model.conv1 (Conv2d)",
    ),
    "conv again": ("the layer's output also goes to", "the layer's output also goes to"),
    "conv to conv": ("also goes to conv2 (Conv2d)", "also goes to model.conv2 (Conv2d)"),
}


@pytest.mark.parametrize("how", ["fx", "run"])
@pytest.mark.parametrize("wrong", REASONS)
def test_what_is_not_safe_is_left_alone(wrong, how):
    block = Block(wrong)
    model = randomized(block if how == "fx" else Opaque(block))
    block.boxed = how == "run"
    x = randn(2, 6, 5, 5, dtype=torch.float64)
    expected = model(x) if wrong != "returned" else None
    rows = {row.batch_norm[-3:]: row for row in pyops.fold_batch_norm_(model, x if how == "run" else None)}
    assert not rows["bn1"].folded
    assert REASONS[wrong][how == "run"] in rows["bn1"].reason
    if wrong not in ("returned", "conv to conv"):
        assert rows["bn2"].folded
    if wrong != "returned":
        torch.testing.assert_close(model(x), expected, **EXACT)


def test_an_output_that_the_model_keeps():
    """fx cannot see it, a run can; the trace itself leaves nothing behind."""
    block = Block("kept")
    model = randomized(Opaque(block))
    rows = pyops.fold_batch_norm_(model, randn(2, 6, 5, 5, dtype=torch.float64))
    assert [row.folded for row in rows] == [False, True]
    assert "an attribute that keeps it" in rows[0].reason
    block = randomized(Block("kept"))
    pyops.fold_batch_norm_(block)
    assert block.saved is None


def test_what_the_forward_does_not_call():
    x = randn(2, 6, 5, 5, dtype=torch.float64)
    for make, reason in ((Opaque, "not called with these example_inputs"), (nn.Sequential, "never called by the mod")):
        block = Block()
        block.bn3 = nn.BatchNorm2d(6)
        rows = pyops.fold_batch_norm_(randomized(make(block)), x)
        assert [row.folded for row in rows] == [True, True, False]
        assert rows[2].layer is None
        assert rows[2].reason.startswith(reason)


def test_one_path_run_twice_is_folded():
    path = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for model in (nn.Sequential(path, path), Opaque(nn.Sequential(path, nn.Sequential(path)))):
        model = randomized(copy.deepcopy(model))
        x = randn(3, 4, dtype=torch.float64)
        expected = model(x)
        assert only(pyops.fold_batch_norm_(copy.deepcopy(model))).folded
        assert only(pyops.fold_batch_norm_(model, x)).folded
        torch.testing.assert_close(model(x), expected, **EXACT)


def test_norms_under_two_names():
    block = Block()
    block.alias = nn.ModuleList([block.bn1])
    assert [row.batch_norm for row in pyops.fold_batch_norm_(randomized(block))] == ["bn1", "bn2"]
    assert type(block.bn1) is nn.Identity
    assert block.bn1 is block.alias[0]


def test_a_patched_forward_is_not_traced_past():
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model.forward = lambda x: model[1](model[0](x)) + model[0](x)
    assert_refused(model, "its forward is patched")
    x = randn(2, 4, dtype=torch.float64)
    assert_refused(model, "the layer's output also goes to add", example_inputs=x)


@pytest.mark.parametrize("how", ["fx", "run", "sequential"])
def test_shared_layers_and_norms(how):
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    x = randn(2, 4, 3, 3, dtype=torch.float64)
    for inner in (nn.Sequential(conv, bn, conv, nn.BatchNorm2d(4)), nn.Sequential(conv, bn, nn.Conv2d(4, 4, 1), bn)):
        model = randomized(inner if how == "fx" else Opaque(inner))
        expected = model(x)
        rows = pyops.fold_batch_norm_(model, x if how == "run" else None)
        assert rows
        assert not any(row.folded for row in rows)
        assert all("several outputs" in row.reason or "also goes to" in row.reason for row in rows)
        torch.testing.assert_close(model(x), expected, **EXACT)


def test_neighbours_only_where_nothing_else_holds_them():
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    model = randomized(Opaque(inner))
    model.first = inner[0]
    rows = pyops.fold_batch_norm_(model)
    assert [row.folded for row in rows] == [False, False]
    assert rows[0].reason == "the layer is also used by a Opaque that holds it"
    assert rows[1].reason == "ReLU before it is not supported"
    loose = randomized(Opaque(nn.BatchNorm1d(3)))
    assert "the model cannot be traced (TraceError: " in only(pyops.fold_batch_norm_(loose)).reason
    assert "give example_inputs" in only(pyops.fold_batch_norm_(loose)).reason


def test_a_linear_over_sequences_is_seen_when_run():
    model = randomized(Opaque(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))))
    x = randn(2, 6, 4, dtype=torch.float64)  # BatchNorm1d takes dimension 1, the length
    assert_refused(model, "a Linear whose output of 3 dimensions", example_inputs=x)


def test_resnet_of_transformers():
    transformers = pytest.importorskip("transformers")
    for layer_type in ("basic", "bottleneck"):
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=3
        )
        model = randomized(transformers.ResNetForImageClassification(config))
        x = randn(2, 3, 32, 32, dtype=torch.float64)
        expected = model(x).logits
        rows = pyops.fold_batch_norm_(model, {"pixel_values": x})
        assert len(rows) > 7
        assert all(row.folded for row in rows)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        torch.testing.assert_close(model(x).logits, expected, **EXACT)


# ------------------------------------------------------------------------------------------- what is refused


class OwnForward(nn.Linear):
    """Computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm1d):
    """Normalizes and more."""

    def forward(self, x):
        return super().forward(x).relu()


def _tie(m):
    m.append(nn.Linear(4, 4)).double()
    m[2].weight = m[0].weight


def _small_variance(m):
    m.to(torch.float16)
    m[1].running_var.zero_()
    m[1].weight.data.fill_(1e4)
    m[1].eps = 1e-9


REFUSALS = {
    "training": (lambda m: m.train(), "in training mode: call eval() first"),
    "no statistics": (
        lambda m: m.__setitem__(1, nn.BatchNorm1d(4, track_running_stats=False).eval()),
        "no running statistics",
    ),
    "lazy": (lambda m: m.__setitem__(1, nn.LazyBatchNorm1d().eval()), "not initialized yet"),
    "own norm": (lambda m: m.__setitem__(1, OwnNorm(4).eval()), "OwnNorm has a forward of its own"),
    "3d": (lambda m: m.__setitem__(1, nn.BatchNorm3d(4).eval()), "BatchNorm3d is not supported"),
    "own layer": (lambda m: m.__setitem__(0, OwnForward(4, 4)), "OwnForward has a forward of its own"),
    "patched": (lambda m: setattr(m[0], "forward", lambda x: x), "Linear has a forward of its own"),
    "transposed": (lambda m: m.__setitem__(0, nn.ConvTranspose1d(4, 4, 1)), "ConvTranspose1d before it is not"),
    "other": (lambda m: m.__setitem__(0, nn.ReLU()), "ReLU before it is not supported"),
    "first": (lambda m: m.pop(0), "its input comes from the model's input input"),
    "channels": (lambda m: m.__setitem__(0, nn.Linear(4, 1)), "normalizes 4 channels, the layer gives 1"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m[0], "weight", nn.Tanh()),
        "the layer's weight is parametrized by Tanh",
    ),
    "weight norm": (lambda m: nn.utils.weight_norm(m[0]), "the layer's weight is under WeightNorm"),
    "plain attribute": (lambda m: (m[0]._parameters.pop("weight"), setattr(m[0], "weight", torch.eye(4))), "Parameter"),
    "parametrized norm": (
        lambda m: parametrize.register_parametrization(m[1], "weight", nn.Tanh()),
        "forward of its own",
    ),
    "layer hook": (lambda m: m[0].register_forward_hook(lambda *a: None), "the layer has hooks"),
    "norm hook": (lambda m: m[1].register_forward_pre_hook(lambda *a: None), "has hooks"),
    "tied": (_tie, "the layer's parameters are shared: 0.weight, 2.weight"),
    "not finite": (_small_variance, "would not be finite in torch.float16"),
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Lazy")
def test_refusals(what):
    change, reason = REFUSALS[what]
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    change(model)
    if what in ("lazy", "patched"):
        assert reason in only(pyops.fold_batch_norm_(model)).reason
    elif what == "parametrized norm":
        assert not only(pyops.fold_batch_norm_(model)).folded
    else:
        assert_refused(model, reason)


def test_the_others_are_folded():
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model[1].train()
    assert [row.folded for row in pyops.fold_batch_norm_(model)] == [False, True]


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model = randomized(Opaque(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(5, 5))))
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pyops.fold_batch_norm_(model, randn(2, 4, dtype=torch.float64))
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module"):
        pyops.fold_batch_norm_(torch.ones(3))
    with pytest.raises(TypeError, match="example_inputs must be"):
        pyops.fold_batch_norm_(nn.Linear(3, 3), [1])
    assert pyops.fold_batch_norm_(nn.Linear(3, 3)) == []
    assert not only(pyops.fold_batch_norm_(nn.BatchNorm1d(3).eval())).folded


def test_a_folded_model_is_pruned_and_swapped():
    model = randomized(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()), torch.float32)
    pyops.fold_batch_norm_(model)
    prune.ic_block(model, 0.5)
    report = pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=randn(4, 16))
    assert report.rows[0].sqnr_db > 25
