"""`pyops.prune.remove_dead_channels_`: results before and after in float64; what keeps its channels, and why."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from torch import nn
from torch.nn.utils import prune as torch_prune

import pyops
from pyops.prune import dead_channels, remove_dead_channels_

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def prepared(model, sparsity=0.5, dim=0):
    """In eval mode and float64, normalizations as after training, every layer but the last pruned by whole channels."""
    torch.manual_seed(0)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.2, 3)
    for layer in layers[:-1]:
        pyops.prune.channels(layer, sparsity, dim)
    return model.double().eval()


def check(model, x, **arguments):
    """{name: row}; the results stay what they are, and so they do with another batch."""
    xs = [x, torch.cat([x, x.flip(0)])]
    before = [model(x) for x in xs]
    rows = {row.name: row for row in remove_dead_channels_(model, x, **arguments)}
    for x, y in zip(xs, before, strict=True):
        torch.testing.assert_close(model(x), y, **EXACT)
    return rows


def conv_chain(norm=True, padding=0, last=5):
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(12)] if norm else [nn.Identity(), nn.Identity()]
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norms[0], nn.ReLU(inplace=True), nn.MaxPool2d(2, padding=1)),
        *(nn.Conv2d(8, 12, 3, padding=padding), norms[1], nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(48, 16), nn.Dropout(), nn.GELU(), nn.Linear(16, last)),
    )


class Functional(nn.Module):
    """The same chain as code."""

    def __init__(self, how="flatten"):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False)
        self.c = nn.Linear(6 if how == "mean" else 24, 4)
        self.how = how

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.adaptive_avg_pool2d(torch.tanh(self.b(x)), 2)
        if self.how == "flatten":
            return self.c(torch.flatten(x, 1))
        if self.how == "view":
            return self.c(x.view(x.size(0), -1))
        if self.how == "reshape":
            return self.c(x.relu().reshape(x.shape[0], -1))
        return self.c(x.mean((2, 3)))


class Residual(nn.Module):
    """Two blocks as in a ResNet, the second with a projection."""

    def __init__(self):
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.n2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 6, 1)
        self.d = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.n0(self.stem(x)))
        out = F.relu(self.n1(self.a(x)))
        out = self.n2(self.b(out))
        out += x
        x = F.relu(out)
        x = torch.add(self.c(x), self.d(x))
        return self.head(x.mean([-1, -2]))


# ------------------------------------------------------------------------------------------- what is removed


def test_a_chain_shrinks_from_end_to_end():
    model = prepared(conv_chain())
    state = {name: t.shape for name, t in model.state_dict().items()}
    rows = check(model, randn(2, 3, 12, 12).double())
    assert [(row.outputs, row.inputs) for row in rows.values()] == [(4, 3), (6, 4), (8, 24), (5, 8)]
    assert str(rows["4"]) == "output channels 12 -> 6, input channels 8 -> 4"
    assert (model[1].num_features, model[4].in_channels, model[9].in_features) == (4, 4, 24)
    assert model.state_dict().keys() == state.keys()
    assert model[4].weight_mask.shape == model[4].weight_orig.shape == (6, 4, 3, 3)
    assert torch_prune.is_pruned(model[4])
    y = model(randn(2, 3, 12, 12).double())
    y.sum().backward()
    assert model[4].weight_orig.grad.shape == (6, 4, 3, 3)
    pyops.prune.bake_(model)
    assert torch.equal(model(randn(2, 3, 12, 12).double()), y)


@pytest.mark.parametrize("how", ["flatten", "view", "reshape", "mean"])
def test_code_is_followed(how):
    rows = check(prepared(Functional(how)), randn(2, 3, 14, 14).double())
    assert [(row.outputs, row.inputs) for row in rows.values()][:2] == [(4, 3), (3, 4)]
    assert rows["c"].inputs * 2 == rows["c"].inputs_before


def test_zeros_without_a_mask():
    model = prepared(conv_chain())
    pyops.prune.bake_(model)
    rows = check(model, randn(2, 3, 12, 12).double())
    assert rows["4"].outputs == 6


def test_what_nothing_reads_is_removed():
    model = prepared(conv_chain(padding=1), dim=1)
    rows = check(model, randn(2, 3, 12, 12).double())
    assert [(row.outputs, row.inputs) for row in rows.values()] == [(4, 3), (12, 4), (16, 48), (5, 16)]
    assert not rows["0"].reason


def test_removal_goes_on_backwards():
    """The last layer reads half of the third's channels, so that the third reads less of the second's, and so on."""
    model = prepared(conv_chain(norm=False), sparsity=0.0)
    with torch.no_grad():
        model[12].weight[:, ::2] = 0  # reads the odd neurons
        model[9].weight_mask[1::2, :24] = 0  # they read the channels from 6 on
        model[4].weight_mask[6:, 3:] = 0  # and these the first three
    rows = check(model, randn(2, 3, 12, 12).double())
    assert [(row.outputs, row.inputs) for row in rows.values()] == [(3, 3), (6, 3), (8, 24), (5, 8)]


def test_a_residual_block_shrinks_where_all_agree():
    model = prepared(Residual(), sparsity=0.0)
    with torch.no_grad():
        for name, dead in {"stem": [0, 1, 2], "b": [1, 2, 3], "a": [4], "c": [0, 5], "d": [5]}.items():
            model.get_submodule(name).weight_orig[dead] = 0
            model.get_submodule(name).weight_mask[dead] = 0
        model.stem.bias[:3] = 0
        for norm in (model.n0, model.n2):
            norm.running_mean[:4] = norm.bias[:4] = 0
        model.n1.bias[4] = model.n1.running_mean[4] = 0
    rows = check(model, randn(2, 3, 6, 6).double())
    assert (rows["stem"].outputs, rows["b"].outputs, rows["a"].inputs, rows["c"].inputs) == (6, 6, 6, 6)
    assert (rows["a"].outputs, rows["b"].inputs) == (7, 7)
    assert (rows["c"].outputs, rows["d"].outputs, rows["head"].inputs) == (5, 5, 5), "a constant into a Linear"


@pytest.mark.parametrize("padding", [0, 1])
def test_depthwise_convolutions_shrink_with_their_channels(padding):
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=padding, groups=16), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 4, 1)),
    )
    model = prepared(model, sparsity=0.0)
    with torch.no_grad():
        model[0].weight_mask[:6] = 0
        model[3].weight_mask[4:8] = 0
    rows = check(model, randn(2, 3, 6, 6).double())
    # 4 and 5 are dead twice, 6 and 7 once; of 0 to 3 those are constants behind a border that ReLU6 makes a 0
    assert rows["0"].outputs == rows["3"].inputs == rows["3"].outputs == rows["6"].inputs == model[3].groups
    assert rows["0"].outputs == 8 if padding == 0 else 8 <= rows["0"].outputs < 12


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_other_layers(kind):
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), randn(2, 5, 6)
    else:
        model = nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(16, 4, 1))
        x = randn(2, 3, 11)
    rows = check(prepared(model), x.double())
    assert rows["0"].outputs == 8


def test_channels_last_weights_stay_so():
    model = prepared(conv_chain()).to(memory_format=torch.channels_last)
    check(model, randn(2, 3, 12, 12).double())
    assert model[4].weight_orig.is_contiguous(memory_format=torch.channels_last)


def test_one_channel_is_left():
    model = prepared(conv_chain(norm=False))
    with torch.no_grad():
        model[0].weight_mask.zero_()
        model[0].bias.zero_()
    assert check(model, randn(2, 3, 12, 12).double())["0"].outputs == 1


# ------------------------------------------------------------------------------------------- what is not, and why


def test_a_constant_does_not_pass_a_border():
    """Zeros are padded, not the constant: near the border its sum is another."""
    rows = check(prepared(conv_chain(padding=1)), randn(2, 3, 12, 12).double())
    assert 4 < rows["0"].outputs < 8, "where ReLU makes a 0 of the constant it can go"
    assert "as constants they go into a convolution that pads" in rows["0"].reason
    circular = prepared(conv_chain())
    circular[4].padding_mode, circular[4]._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert check(circular, randn(2, 3, 12, 12).double())["0"].outputs == 4


class Odd(nn.Module):
    """A chain with something in it that does not treat each channel alike."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(16 if how == "cat" else 8, 4, 1)
        self.act, self.how = nn.ReLU(), how
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        x = self.act(self.a(x))
        if self.how == "cat":
            x = torch.cat([x, x], 1)
        elif self.how == "softmax":
            x = x.softmax(1)
        elif self.how == "scale":
            x = x * self.scale
        elif self.how == "grouped":
            x = self.grouped(x)
        elif self.how == "size":
            x = x / x.size(1)
        elif self.how == "broadcast":
            x = x + x.mean((2, 3), keepdim=True)
        elif self.how == "weight":
            x = x * self.a.weight.sum()
        elif self.how == "twice":
            return self.b(x), self.b(x + 0)
        elif self.how == "in place":
            before = self.a(x[:, :3])
            return self.b(before.relu_() + before)
        elif self.how in ("training norm", "norm hook"):
            x = self.norm(x)
        y = self.b(x)
        return (x, y) if self.how == "output" else y


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("cat", "cat"),
        ("softmax", "softmax"),
        ("scale", "mul"),
        ("grouped", "grouped has groups"),
        ("size", "size"),
        ("broadcast", "add"),
        ("weight", "code reads a.weight"),
        ("twice", "called several times"),
        ("output", "the model's output"),
        ("training norm", "in training mode: call eval() first"),
        ("norm hook", "norm has hooks"),
        ("hook", "b must stay as it is (has hooks)"),
        ("act hook", "act has hooks"),
        ("tied", "its parameters are shared"),
        ("filter", "b must stay as it is (filter_fn)"),
        ("subclass", "has a forward of its own"),
        ("parametrized", "is parametrized by"),
    ],
)
def test_what_keeps_its_channels(how, why):
    model = prepared(Odd(how), sparsity=0.0)
    pyops.prune.bake_(model)
    with torch.no_grad():
        model.a.weight[:4] = model.a.bias[:4] = 0
    arguments = {}
    if how == "training norm":
        model.norm.train()
        model.norm.momentum = 0.0
    elif how == "filter":
        arguments["filter_fn"] = lambda module, name: name != "b"
    elif how == "tied":
        model.other = nn.Linear(1, 1)
        model.other.bias = model.a.bias
    elif how == "subclass":
        model.b.forward = lambda x: nn.Conv2d.forward(model.b, x)
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(model.b)
    elif "hook" in how:
        target = {"norm hook": model.norm, "hook": model.b, "act hook": model.act}[how]
        target.register_forward_hook(lambda *args: None)
    x = randn(2, 3, 5, 5).double()
    with torch.no_grad():
        before = model(x)
        state = copy.deepcopy(model.state_dict())
        rows = {row.name: row for row in remove_dead_channels_(model, x, **arguments)}
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert why in rows["a"].reason, rows["a"].reason
    assert not rows["a"].changed


def test_in_place_on_what_is_used_again():
    class InPlace(Odd):
        def forward(self, x):
            before = self.a(x)
            after = before.tanh_()
            return self.b(after + before)

    rows = check(prepared(InPlace("")), randn(2, 3, 5, 5).double())
    assert not rows["a"].changed


def test_without_a_trace_nothing_is_removed():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = conv_chain()

        def forward(self, x):
            return self.model(x) if x.sum() < torch.inf else x

    rows = check(prepared(Branches()), randn(2, 3, 12, 12).double())
    assert "the model cannot be traced (TraceError" in rows["model.0"].reason
    assert not any(row.changed for row in rows.values())
    lazy = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    assert [row.name for row in remove_dead_channels_(lazy, randn(2, 3))] == ["0"]
    assert isinstance(lazy[1], nn.LazyLinear)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_model_is_as_it_was(error, monkeypatch):
    model = prepared(conv_chain())
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    calls, shrink = [], dead_channels.shrink

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise error("stop")
        shrink(*args)

    monkeypatch.setattr(dead_channels, "shrink", failing)
    x = randn(2, 3, 12, 12).double()
    y = model(x)
    with pytest.raises(error):
        remove_dead_channels_(model, x)
    after = model.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in after.items()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(after[name], t) for name, (_, t) in before.items())
    assert model[0].out_channels == model[1].num_features == 8
    assert torch.equal(model(x), y)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        remove_dead_channels_(3, randn(1))
    with pytest.raises(TypeError, match="example_inputs"):
        remove_dead_channels_(nn.Linear(3, 3), None)
    with pytest.raises(TypeError, match="example_inputs must be"):
        remove_dead_channels_(nn.Linear(3, 3), [randn(1)])
