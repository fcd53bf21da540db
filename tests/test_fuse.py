"""`pyops.fuse_activations_` and `fuse_residuals_`: the same outputs and gradients, and what is left alone and why."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from torch import nn

import pyops
from pyops import fuse
from pyops.nn import Int4Linear, Int8Linear, SparseConv1d, SparseConv2d, SparseLinear
from pyops.nn.linear import QuantLinear

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
}
LAYERS = {
    "conv2d": (lambda: SparseConv2d(3, 8, 3, padding=1), (2, 3, 5, 7)),
    "conv1d": (lambda: SparseConv1d(3, 8, 3), (2, 3, 7)),
    "linear": (lambda: SparseLinear(5, 8, pattern="oc_block8"), (3, 5)),
    "int8": (lambda: Int8Linear(5, 8), (3, 5)),
    "int4": (lambda: Int4Linear(5, 8), (3, 5)),
}


def sparse_(model):
    """Every Conv2d and Linear made sparse, in float64 and eval mode, normalizations folded."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            pyops.prune.magnitude(module, 0.5)
    pyops.fold_batch_norm_(model, randn(2, 3, 16, 16, dtype=torch.float64))
    pyops.swap_(model, pyops.Sparse(pattern="unstructured", measure=False))
    return model


def only(rows):
    (row,) = rows
    return row


def run(model, x):
    """The output, and the gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y = getattr(y, "logits", y)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(before, after, **tolerance):
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a, **(tolerance or EXACT))


class Opaque(nn.Module):
    """Runs a model behind a branch on data, which fx cannot trace."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() < torch.inf else None


# ------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("how", ["fx", "run", "sequential"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer, how):
    make, shape = LAYERS[layer]
    torch.manual_seed(1)
    inner = nn.Sequential(make(), nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.0))
    model = inner if how == "fx" else Opaque(inner)
    dtype = torch.float32 if layer in ("int8", "int4") else torch.float64
    model.to(dtype).train()
    x, act = randn(*shape, dtype=dtype), inner[2]
    before = run(model, x)
    prefix = "" if how == "fx" else "model."
    row = only(pyops.fuse_activations_(model, x if how == "run" else None))
    assert row == pyops.Fused(f"{prefix}0", "relu", True, f"in place of {prefix}2 (ReLU)")
    assert (inner[0].activation, type(inner[2]), inner[2].training) == ("relu", nn.Identity, act.training)
    assert_same(before, run(model, x), **({"rtol": 1e-5, "atol": 1e-6} if layer in ("int8", "int4") else EXACT))
    again = only(pyops.fuse_activations_(model))
    assert again == pyops.Fused(f"{prefix}0", "relu", False, "it already applies relu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    for make, shape in LAYERS.values():
        model = nn.Sequential(make(), ACTIVATIONS[name]())
        dtype = torch.float32 if isinstance(model[0], QuantLinear) else torch.float64
        model, x = model.to(dtype), randn(*shape, dtype=dtype) * 3
        before = run(model, x)
        assert only(pyops.fuse_activations_(model)).fused
        assert model[0].activation == name
        assert_same(before, run(model, x), **({"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else EXACT))


def test_activations_of_transformers():
    activations = pytest.importorskip("transformers.activations")
    names = ("gelu", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu", "gelu_10")
    for name in names:
        model = nn.Sequential(SparseLinear(5, 8), activations.ACT2FN[name]).double()
        x = randn(3, 5, dtype=torch.float64)
        before, row = run(model, x), only(pyops.fuse_activations_(model))
        assert row.fused is (name not in ("quick_gelu", "gelu_10"))
        assert_same(before, run(model, x))


class Shared(nn.Module):
    """One ReLU in several places; after `last` too."""

    def __init__(self, last):
        super().__init__()
        self.relu = self.again = nn.ReLU()
        self.a, self.b, self.last = SparseLinear(4, 4), SparseLinear(4, 4), last

    def forward(self, x):
        return self.relu(self.last(self.again(self.b(self.relu(self.a(x))))))


@pytest.mark.parametrize("how", ["fx", "run"])
def test_a_shared_activation_goes_only_if_every_use_can(how):
    x = randn(2, 4, dtype=torch.float64)
    for last, fused in ((SparseLinear(4, 4), True), (nn.Linear(4, 4), False)):
        shared = Shared(last).double()
        model = shared if how == "fx" else Opaque(shared)
        before = run(model, x)
        rows = pyops.fuse_activations_(model, x)
        assert {row.fused for row in rows} == {fused}
        assert (type(shared.relu) is type(shared.again) is nn.Identity) is fused
        assert_same(before, run(model, x))
        if not fused:
            source = "last (Linear)" if how == "fx" else "something else than a layer"
            assert all(row.activation == "relu" for row in rows)
            assert all(row.reason.endswith(f"relu (ReLU) also follows {source}") for row in rows)


class Own(SparseLinear):
    """Computes something else."""

    def forward(self, x, residual=None):
        return super().forward(x) * 2


class OwnReLU(nn.ReLU):
    """Computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


class Calls(nn.Sequential):
    """A layer, an activation, and what `use` does with both."""

    def __init__(self, use):
        super().__init__(SparseLinear(4, 4), nn.ReLU())
        self.use = use

    def forward(self, x):
        y = self[0](x)
        return self.use(self, y, self[1](y))


def _watched_container(m):
    m[0] = nn.Sequential(m[0])
    m[0].register_forward_hook(lambda module, args, y: None)


LEFT_ALONE = {
    "layer hook": (lambda m: m[0].register_forward_hook(lambda *a: None), "the layer has hooks that see its output"),
    "gradient hook": (lambda m: m[0].register_full_backward_hook(lambda *a: None), "the layer has hooks"),
    "act hook": (lambda m: m[1].register_forward_pre_hook(lambda *a: None), "1 (ReLU) has hooks, which nn.Identity"),
    "hook around": (_watched_container, "its output also goes to hooks of a Sequential"),
    "own layer": (lambda m: m.__setitem__(0, Own(4, 4)), "Own has a forward of its own"),
    "own act": (lambda m: m.__setitem__(1, OwnReLU()), "its output goes to relu"),
    "other act": (lambda m: m.__setitem__(1, nn.LeakyReLU()), "its output goes to 1 (LeakyReLU)"),
    "patched": (lambda m: setattr(m[1], "forward", torch.tanh), "its output goes to 1 (ReLU)"),
    "no act": (lambda m: m.pop(1), "its output goes to the model's output"),
    "output too": (lambda m: Calls(lambda m, y, z: (y, z)), "its output also goes to the model's output"),
    "used too": (lambda m: Calls(lambda m, y, z: y + z), "its output also goes to add"),
    "in a leaf": (
        lambda m: Calls(lambda m, y, z: m[2](z)).append(nn.TransformerEncoderLayer(4, 1, 4, activation=nn.ReLU())),
        None,
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_what_is_left_alone(what):
    change, reason = LEFT_ALONE[what]
    model = nn.Sequential(SparseLinear(4, 4), nn.ReLU())
    changed = change(model)
    model = changed if isinstance(changed, Calls) else model
    if what == "in a leaf":
        model[2].activation = model[1]
        reason = "1 (ReLU) is also used by a TransformerEncoderLayer that holds it"
    modules = dict(model.named_modules())
    row = only(pyops.fuse_activations_(model))
    assert not row.fused
    assert reason in row.reason
    assert dict(model.named_modules()) == modules
    assert model.get_submodule(row.layer).activation == "none"


def test_what_a_run_sees():
    x = randn(2, 4)
    kept = []
    model = Opaque(Calls(lambda m, y, z: kept.append(y) or z))
    assert "an attribute that keeps it" in only(pyops.fuse_activations_(model, x)).reason
    model = Opaque(Calls(lambda m, y, z: z))
    model.never = SparseLinear(4, 4)
    assert [row.fused for row in pyops.fuse_activations_(model, x)] == [True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "give example_inputs" in pyops.fuse_activations_(model)[1].reason


def test_a_residual_that_is_there_is_activated_too():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = SparseLinear(4, 4), nn.SiLU()

        def forward(self, x):
            return self.act(self.layer(x, x))

    model, x = Adds().double(), randn(2, 4, dtype=torch.float64)
    before = run(model, x)
    assert only(pyops.fuse_activations_(model)).fused
    assert_same(before, run(model, x))


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model = Opaque(nn.Sequential(SparseLinear(4, 4), nn.ReLU(), nn.Linear(5, 5)))
    modules = dict(model.named_modules())
    for function in (pyops.fuse_activations_, pyops.fuse_residuals_):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            function(model, randn(2, 4))
    assert dict(model.named_modules()) == modules
    assert model.model[0].activation == "none"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_arguments():
    for function in (pyops.fuse_activations_, pyops.fuse_residuals_):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module"):
            function(torch.ones(3), torch.ones(3))
        with pytest.raises(TypeError, match="example_inputs must be"):
            function(nn.Linear(3, 3), [1])
        assert function(nn.Linear(3, 3), torch.ones(3)) == []
    with pytest.raises(TypeError, match="example_inputs is None"):
        pyops.fuse_residuals_(nn.Linear(3, 3), None)


# ------------------------------------------------------------------------------------------- swap_


def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    pyops.prune.magnitude(model, 0.5)
    return model.eval()


def test_swap_fuses():
    config = pyops.Sparse(pattern="unstructured", measure=False, fuse_activations=True)
    for x in (None, randn(2, 3, 5, 5)):
        model = pruned()
        y = model(randn(2, 3, 5, 5))
        model[3].register_forward_hook(lambda *args: None)
        rows = pyops.swap_(model, config, example_inputs=x).rows
        assert rows[0].reason.endswith("activation relu fused")
        assert "activation relu not fused: 3 (ReLU) has hooks" in rows[1].reason
        assert "activation" not in rows[2].reason
        assert type(model[1]) is nn.Identity
        torch.testing.assert_close(model(randn(2, 3, 5, 5)), y, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="fuse_activations must be True or False"):
        pyops.Sparse(fuse_activations=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_model_is_as_it_was(monkeypatch, error):
    model = nn.Sequential(*pruned(), SparseLinear(2, 2), nn.ReLU())
    modules, attributes = dict(model.named_modules()), {m: dict(m.__dict__) for m in model.modules()}
    commit = fuse._commit

    def interrupted(*args):
        commit(*args)
        assert model[6].activation == "relu"
        raise error("stop")

    monkeypatch.setattr(fuse, "_commit", interrupted)
    with pytest.raises(error, match="stop"):
        pyops.swap_(model, pyops.Sparse(pattern="unstructured", measure=False, fuse_activations=True))
    assert dict(model.named_modules()) == modules
    assert all(m.__dict__ == attributes[m] for m in model.modules())


# ------------------------------------------------------------------------------------------- residuals


def conv(i, o, k, stride=1):
    return nn.Conv2d(i, o, k, stride, k // 2, bias=False)


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(i, o, 3, stride), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.downsample = conv(o, o, 3), nn.BatchNorm2d(o), None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """torchvision's Bottleneck."""

    def __init__(self, i, o, stride=1):
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(i, o // 4, 1), nn.BatchNorm2d(o // 4), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(o // 4, o // 4, 3, stride), nn.BatchNorm2d(o // 4)
        self.conv3, self.bn3, self.downsample = conv(o // 4, o, 1), nn.BatchNorm2d(o), None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet(block):
    body = (block(8, 8), block(8, 16, 2), block(16, 16))
    return sparse_(nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *body, nn.Flatten(2), nn.Linear(64, 3)))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("block", [Basic, Bottleneck])
def test_resnets_of_torchvision(block, opaque):
    model = resnet(block)
    x = randn(2, 3, 16, 16, dtype=torch.float64)
    before, state = run(model, x), model.state_dict().keys()
    rows = pyops.fuse_residuals_(Opaque(model) if opaque else model, x)
    reasons = {row.layer.removeprefix("model."): row.reason for row in rows}
    prefix = "model." if opaque else ""
    last = "conv2" if block is Basic else "conv3"
    assert reasons["0"] == f"in place of {prefix}2 (ReLU)"
    assert reasons["3.conv1"] == f"activation relu in place of code in {prefix}3 ({block.__name__})"
    assert reasons[f"3.{last}"].startswith("the residual and activation relu in place of code in")
    assert reasons["4.downsample.0"].startswith("the residual and activation relu in place of")
    left = {row.layer.removeprefix("model.") for row in rows if not row.fused}
    assert left == {f"4.{last}", "7"}, "one of two that are added up, and the classifier"
    assert "relu" not in model[3].forward.__code__.co_names
    assert isinstance(model[3], block)
    assert model.state_dict().keys() == state
    assert_same(before, run(model, x))
    assert_same(before, run(copy.deepcopy(model), x))
    assert_same(run(model.train(), x), before)
    assert not any(row.fused for row in pyops.fuse_residuals_(model, x))
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(model)


def test_resnet_of_transformers():
    transformers = pytest.importorskip("transformers")
    for layer_type in ("basic", "bottleneck"):
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type=layer_type, **sizes))
        model = sparse_(model)
        x = randn(2, 3, 16, 16, dtype=torch.float64)
        before = run(model, x)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        rows = pyops.fuse_residuals_(model, {"pixel_values": x})
        fused = {row.layer.removeprefix("resnet.encoder.stages.") for row in rows if row.fused}
        last = "1" if layer_type == "basic" else "2"
        assert "resnet.embedder.embedder.convolution" in fused
        assert f"1.layers.1.layer.{last}.convolution" in fused
        assert "1.layers.0.shortcut.convolution" in fused
        assert_same(before, run(model, x))


class Adds(nn.Module):
    """y = act(layer(x) + r), said in several ways."""

    def __init__(self, add):
        super().__init__()
        self.layer, self.other, self.act, self.add = SparseLinear(4, 4), SparseLinear(4, 4), nn.ReLU(), add

    def forward(self, x):
        return self.add(self, x)


def _iadd(m, x):
    r = x * 2
    r += m.layer(x)
    return r, r


def _writes(m, x):
    z = x * 2
    y = m.layer(z)
    z.relu_()
    return y + z


def _sets(m, x):
    m.saved = x
    return m.layer(x) + x


def _twice(m, x):
    return m.layer(m.layer(x) + x)


WAYS = {
    "add": (lambda m, x: m.layer(x) + x, "none"),
    "radd": (lambda m, x: x + m.layer(x), "none"),
    "torch.add": (lambda m, x: m.act(torch.add(x, m.layer(x))), "relu"),
    "method": (lambda m, x: m.layer(x).add_(x).sigmoid(), "sigmoid"),
    "function": (lambda m, x: F.silu(m.layer(x) + x), "silu"),
    "no residual": (lambda m, x: F.hardswish(m.layer(x)) + x, "hardswish"),
    "chain": (lambda m, x: F.gelu(x.abs() + m.layer(x)) + m.other(x) + x, "gelu"),
    "sum of three": (lambda m, x: F.relu(x + m.layer(x) + m.other(x)), "none"),
    "between": (lambda m, x: torch.add(m.layer(x), m.act(m.other(x))), "none"),
    "gelu tanh": (lambda m, x: F.gelu(m.layer(x) + x, approximate="tanh"), "none"),
}
WAYS_NOT = {
    "twice": lambda m, x: m.layer(x) + m.layer(x.abs()),
    "itself": lambda m, x: m.act(m.layer(x).mul(2)),
    "scaled": lambda m, x: torch.add(m.layer(x), x, alpha=2),
    "a number": lambda m, x: m.layer(x) + 1.0,
    "broadcast": lambda m, x: m.layer(x) + x[:1],
    "double": lambda m, x: m.layer(x.float()) + x.double(),
    "into the other": _iadd,
    "written in between": _writes,
    "sets attributes": _sets,
    "called twice": _twice,
    "mode": lambda m, x: F.dropout(m.layer(x) + x, 0.5, m.training),
    "values": lambda m, x: m.layer(x) + x if x.sum() < torch.inf else x,
    "a choice by type": lambda m, x: m.layer(x) + x if isinstance(x, torch.Tensor) else m.act(m.layer(x)),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_add(way):
    add, activation = WAYS[way]
    model, x = Adds(add).double(), randn(3, 4, dtype=torch.float64)
    before, kept = run(model, x), x.clone()
    rows = {row.layer: row for row in pyops.fuse_residuals_(model, x)}
    assert rows["layer"].fused or way == "gelu tanh"
    assert model.layer.activation == activation
    assert rows["other"].fused is (way in ("chain", "sum of three", "between"))
    assert_same(before, run(model, x))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("way", WAYS_NOT)
def test_what_cannot_be_added(way):
    model = Adds(WAYS_NOT[way]).double()
    x = randn(3, 4, dtype=torch.float64)
    if way == "double":
        model.float()
    y = model.eval()(x)
    rows = pyops.fuse_residuals_(model, x)
    assert not any(row.fused for row in rows), rows
    assert type(model) is Adds
    assert model.layer.activation == "none"
    torch.testing.assert_close(model(x), y)
    if way == "values":
        assert "the model cannot be traced (TraceError" in rows[0].reason


def test_a_block_under_hooks_or_used_otherwise():
    x = randn(2, 4, dtype=torch.float64)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Adds(WAYS["add"][0])

        def forward(self, x):
            return self.block(x) * self.block.layer(x)

    assert not any(row.fused for row in pyops.fuse_residuals_(Outer().double(), x)), "the layer is called outside too"
    model = Adds(lambda m, x: m.layer(x) + x).double()
    seen = []
    model.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert pyops.fuse_residuals_(model, x)[0].fused, "its own hooks still see the same"
    model(x)
    assert len(seen) == 3, "two runs to look, and this one"
    model = Adds(lambda m, x: m.wrap(x) + x).double()
    model.wrap = nn.Sequential(model.layer)
    model.wrap.register_forward_hook(lambda module, args, y: None)
    assert not pyops.fuse_residuals_(model, x)[0].fused
