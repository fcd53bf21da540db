"""`pyops.nn.SparseConv2d`, `SparseConv1d`, `SparseLinear`: against torch's layers, in training, in PyTorch's tools."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import sparse_distributed_worker as worker
import torch
from cases import randn
from conftest import CHECKOUT
from torch import nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrize, prune

import pyops
from pyops.nn import SparseConv1d, SparseConv2d, SparseLinear
from pyops.nn.masks import find_mask
from pyops.ops.sparse_weight import PATTERNS

pytestmark = pytest.mark.usefixtures("poison")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pruned(kind=nn.Conv2d, *arguments, amount=0.6, two_of_four=False, **options):
    torch.manual_seed(0)
    layer = kind(*(arguments or (12, 10, 3)), **options)
    if two_of_four:
        pyops.prune.n_m(layer)
    else:
        prune.l1_unstructured(layer, "weight", amount=amount)
    return layer


def make(pattern="unstructured", **options):
    return SparseConv2d.from_dense(pruned(two_of_four=pattern == "2:4"), pattern=pattern, **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- against torch's layers


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_like_torch(pattern, mode):
    for options in (
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": 2, "bias": False},
        {"padding": "valid"},
        {"padding": 2, "groups": 2, "dtype": torch.float64},
    ):
        options |= {"padding_mode": mode}
        two_of_four = pattern == "2:4"
        conv2d = pruned(nn.Conv2d, 8, 10, (3, 2), **options, two_of_four=two_of_four)
        conv1d = pruned(nn.Conv1d, 8, 10, 3, **options, two_of_four=two_of_four)
        for dense, kind, x in (
            (conv2d, SparseConv2d, randn(2, 8, 9, 10, dtype=conv2d.weight.dtype)),
            (conv1d, SparseConv1d, randn(2, 8, 9, dtype=conv2d.weight.dtype)),
        ):
            layer = kind.from_dense(dense, pattern=pattern)
            close(layer(x), dense(x))
            close(layer(x[0]), dense(x[0]))
            close(layer.to_dense()(x), dense(x))
            assert type(layer.to_dense()) is type(dense)
            assert torch.equal(layer.weight, dense.weight_orig * dense.weight_mask)
            residual = torch.randn_like(layer(x))
            close(layer(x, residual), dense(x) + residual)
            close(layer(x[0], residual=residual[0]), dense(x[0]) + residual[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_like_torch(pattern):
    dense = pruned(nn.Linear, 16, 10, two_of_four=pattern == "2:4")
    layer = SparseLinear.from_dense(dense, pattern=pattern, activation="relu")
    for x in (randn(16), randn(3, 16), randn(2, 3, 16), randn(0, 16)):
        close(layer(x), dense(x).relu())
        close(layer.to_dense()(x), dense(x))
        close(layer(x, torch.ones_like(dense(x))), (dense(x) + 1).relu())


@pytest.mark.parametrize("activation", ["relu", "gelu", "hardswish"])
def test_activation(activation):
    layer, x = make(activation=activation), randn(2, 12, 7, 7)
    close(layer(x), pyops.ops.epilogue.ACTIVATIONS[activation](make()(x)))


def test_new_layer():
    layer = SparseConv2d(8, 10, 3, padding=1, pattern="oc_block4", dtype=torch.bfloat16)
    assert (layer.sparsity, layer.weight.shape, layer.bias.shape) == (0.0, (10, 8, 3, 3), (10,))
    bound = 72**-0.5
    assert bound / 3 < layer.weight.float().std() < layer.weight.abs().max() <= bound * 1.01
    assert not layer.values.view(-1, 4)[-1, 2:].any(), "padding is 0"
    assert layer(randn(2, 8, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert SparseLinear(8, 10, pattern="2:4").sparsity == 0.5
    assert SparseLinear(8, 10, False).bias is None
    layer.sparse_weight.validate()


def test_repr():
    text = "SparseConv2d(12, 10, kernel_size=(3, 3), stride=(1, 1), pattern='oc_block4', sparsity=0.6)"
    assert repr(make("oc_block4")) == text
    text = "SparseConv1d(4, 6, kernel_size=(3,), stride=(2,), padding='valid', groups=2, bias=False, "
    assert repr(SparseConv1d(4, 6, 3, 2, "valid", 1, 2, False)) == text + "pattern='unstructured', sparsity=0)"
    text = (
        "SparseLinear(in_features=4, out_features=3, bias=True, pattern='unstructured', sparsity=0, activation='relu')"
    )
    assert repr(SparseLinear(4, 3, activation="relu")) == text
    assert "sparsity" not in repr(SparseLinear(4, 3, device="meta"))


BAD = {
    "dtype": (TypeError, r"dtype is torch\.int8", {"dtype": torch.int8}),
    "pattern": (ValueError, "pattern='dense' is not one of", {"pattern": "dense"}),
    "activation": (ValueError, "activation='swish'", {"activation": "swish"}),
    "groups": (ValueError, "out_channels is 10; it must be divisible by groups=4", {"groups": 4}),
    "kernel": (ValueError, r"kernel_size is \(3, 3, 3\)", {"kernel_size": (3, 3, 3)}),
    "stride": (ValueError, "stride is 0", {"stride": 0}),
    "padding": (ValueError, "padding is -1", {"padding": -1}),
    "same": (ValueError, 'padding="same" needs stride=1', {"padding": "same", "stride": 2}),
    "mode": (ValueError, "padding_mode='wrap' is not one of", {"padding_mode": "wrap"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_construction(name):
    error, message, changes = BAD[name]
    with pytest.raises(error, match=message):
        SparseConv2d(**{"in_channels": 8, "out_channels": 10, "kernel_size": 3, **changes})


def test_bad_from_dense():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match=r"mask is \(3,\); the weight is \(3, 3\)"):
        SparseLinear.from_dense(nn.Linear(3, 3), mask=torch.ones(3))
    with pytest.raises(ValueError, match='pattern="2:4" allows'):
        SparseLinear.from_dense(nn.Linear(8, 3), pattern="2:4")
    with pytest.raises(ValueError, match="x has 3 channels"):
        make()(randn(2, 3, 5, 5))


# ------------------------------------------------------------------------------------------- where the mask comes from


def test_masks_of_every_library():
    kept = randn(10, 12, seed=3) > 0
    layers = {}
    for name in ("prune", "FakeSparsity", "ASP", "SparseML", "nncf", "zeros", "argument"):
        torch.manual_seed(0)
        layers[name] = layer = nn.Linear(12, 10)
        with torch.no_grad():
            layer.weight[0] = 0  # kept by the mask although 0
            if name not in ("prune", "FakeSparsity", "argument"):
                layer.weight *= kept
    prune.custom_from_mask(layers["prune"], "weight", kept)
    parametrize.register_parametrization(layers["FakeSparsity"], "weight", FakeSparsity(kept.float()))
    layers["ASP"].register_buffer("__weight_mma_mask", kept)
    layers["SparseML"].register_buffer("mask", kept)
    layers["nncf"].register_buffer("binary_mask", kept)
    layers["SparseML"].register_buffer("binary_mask", torch.ones(3) > 0)  # of something else
    x = randn(3, 12)
    for name, layer in layers.items():
        sparse = SparseLinear.from_dense(layer, mask=kept if name == "argument" else None)
        expected = kept.clone()
        if name == "zeros":
            expected[0] = False
        assert torch.equal(sparse.sparse_weight.mask()[:, :, 0, 0], expected), name
        reference = layer(x) if name != "argument" else nn.functional.linear(x, layer.weight * kept, layer.bias)
        close(sparse(x), reference)
    assert find_mask(layers["zeros"]) is None


def test_a_mask_of_something_else_drops_nothing():
    layer, x = nn.Linear(12, 10), randn(3, 12)
    layer.register_buffer("mask", torch.zeros(10, 12, dtype=torch.bool))
    close(SparseLinear.from_dense(layer)(x), layer(x))
    loaded = SparseLinear(12, 10)
    loaded.load_state_dict(layer.state_dict())
    close(loaded(x), layer(x))


def test_two_masks_keep_what_both_do():
    layer = nn.Linear(12, 10)
    prune.custom_from_mask(layer, "weight", randn(10, 12) > 0)
    layer.register_buffer("mask", randn(10, 12, seed=1) > 0)
    assert torch.equal(find_mask(layer), (randn(10, 12) > 0) & (randn(10, 12, seed=1) > 0))


def test_from_dense_keeps():
    dense = pruned(dtype=torch.bfloat16).eval()
    dense.bias.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        dense.weight_orig.mul_(2)  # .weight is stale from here on
    layer = SparseConv2d.from_dense(dense)
    assert torch.equal(layer.weight, 2 * before["weight_orig"] * before["weight_mask"])
    assert (layer.training, layer.bias.requires_grad, layer.values.requires_grad) == (False, False, True)
    assert layer.values.dtype == torch.bfloat16
    layer.bias.add_(1)
    assert torch.equal(dense.bias, before["bias"]), "the bias is a copy"
    frozen = pruned()
    frozen.weight_orig.requires_grad_(False)
    assert not SparseConv2d.from_dense(frozen).values.requires_grad


# ------------------------------------------------------------------------------------------- training

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "pyops.AdamW": lambda p: pyops.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "pyops.SGD": lambda p: pyops.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "oc_block8", "ic_block4", "block16"])
def test_zeros_stay_zeros_and_kept_weights_stay_kept(pattern, optimizer, threads):
    threads(1)
    layer = make(pattern)
    weight = layer.sparse_weight
    structure = (weight.crow_indices.clone(), weight.col_indices.clone())
    mask = weight.mask()
    with torch.no_grad():
        layer.values[0] = 0.0  # kept weights that begin at 0
    step, x, target = OPTIMIZERS[optimizer](layer.parameters()), randn(2, 12, 6, 6), randn(2, 10, 4, 4)
    first = None
    for _ in range(100):
        step.zero_grad()
        loss = (layer(x) - target).square().mean()
        first = first or loss.item()
        loss.backward()
        step.step()
    assert loss < 0.8 * first
    assert torch.equal(layer.weight != 0, mask), "the zeros are those of the mask, no more and no less"
    assert torch.equal(layer.sparse_weight.mask(), mask)
    assert torch.equal(layer.crow_indices, structure[0])
    assert torch.equal(layer.col_indices, structure[1])
    if layer.block_mask is not None:
        assert not layer.values[~layer.block_mask].any()
    layer.sparse_weight.validate()  # padding too


def test_trains_like_the_masked_dense_layer():
    dense, layer, x = (
        pruned(padding=1),
        SparseConv2d.from_dense(pruned(padding=1), pattern="oc_block4"),
        randn(2, 12, 6, 6),
    )
    for module in (dense, layer):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    close(layer.weight, dense.weight_orig * dense.weight_mask)
    close(layer.bias, dense.bias)


def test_eval_sees_every_step():
    """The packed weight of the CPU kernels must not outlive the values it was made of."""
    layer, x = make("oc_block4"), randn(2, 12, 6, 6)
    for name in OPTIMIZERS:
        step = OPTIMIZERS[name](layer.parameters())
        for _ in range(3):
            with torch.no_grad():
                layer(x)
            layer(x).square().mean().backward()
            step.step()
            with torch.no_grad():
                close(layer(x), layer.to_dense()(x))
    for change in (
        lambda: layer.values.data.mul_(2),  # leaves no trace; the training step before it does
        lambda: setattr(layer.values, "data", layer.values.data * 3),
        lambda: layer.load_state_dict(make("oc_block4").state_dict()),
        lambda: layer.load_state_dict(make("unstructured").state_dict()),
        lambda: layer.double().float(),
        lambda: setattr(layer, "values", nn.Parameter(layer.values.detach() * 2)),
    ):
        layer(x).sum().backward()
        change()
        with torch.no_grad():
            close(layer(x), layer.to_dense()(x))


# ------------------------------------------------------------------------------------------- paths that modules go


@pytest.mark.parametrize("pattern", ["unstructured", "oc_block4", "block16"])
def test_copies(pattern):
    layer, x = make(pattern), randn(2, 12, 6, 6)
    with torch.no_grad():
        y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert same(other.state_dict(), layer.state_dict())
        assert other.values.data_ptr() != layer.values.data_ptr()
        assert torch.equal(other(x).detach(), y)
        assert other._packed is not layer._packed


def test_conversions_keep_the_structure():
    layer = make("oc_block4")
    for change in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float16)):
        other = change(copy.deepcopy(layer))
        assert (other.crow_indices.dtype, other.col_indices.dtype) == (torch.int32, torch.int32)
        assert other.block_mask.dtype == torch.bool
        assert other.values.dtype == other.bias.dtype != torch.float32
        assert torch.equal(other.sparse_weight.mask(), layer.sparse_weight.mask())


def test_fake_tensors_of_cuda():
    meta = SparseConv2d(12, 10, 3, device="meta")
    state = meta.state_dict()
    with torch._subclasses.FakeTensorMode():
        tensors = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in state.items()}
        y = torch.func.functional_call(meta, tensors, (torch.empty(2, 12, 6, 6, device="cuda"),))
        assert (y.device.type, tuple(y.shape)) == ("cuda", (2, 10, 4, 4))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_meta(pattern):
    layer = SparseConv2d(12, 10, 3, device="meta", pattern=pattern).to_empty(device="cpu")
    layer.reset_parameters()
    layer.sparse_weight.validate()
    reference = SparseConv2d(12, 10, 3, pattern=pattern)
    assert torch.equal(layer.col_indices, reference.col_indices)
    layer = SparseConv2d(12, 10, 3, device="meta", pattern=pattern)
    layer.load_state_dict(make(pattern).state_dict(), assign=True)
    assert same(layer.state_dict(), make(pattern).state_dict())
    layer = make("oc_block4").to("meta").to_empty(device="cpu")  # its own structure is gone
    layer.reset_parameters()
    layer.sparse_weight.validate()


@pytest.mark.parametrize("pattern", ["unstructured", "oc_block4"])
def test_compile(fresh_compiler, pattern):
    layer, x = make(pattern, activation="silu"), randn(2, 12, 6, 6)
    compiled = torch.compile(layer, fullgraph=True)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    compiled(a).square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(b).square().sum().backward()
    close(a.grad, b.grad)
    for ours, theirs in zip(grads, (p.grad for p in layer.parameters()), strict=True):
        close(ours, theirs)
    with torch.no_grad():
        close(compiled(x), layer(x))
        other = make("ic_block4", activation="silu").state_dict()
        other["values"] *= 2
        layer.load_state_dict(other)
        close(compiled(x), layer(x))


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_export_with_a_dynamic_batch(fresh_compiler, kind):
    layer = make("oc_block4") if kind == "conv2d" else SparseLinear.from_dense(pruned(nn.Linear, 12, 10))
    shape = (12, 6, 6) if kind == "conv2d" else (12,)
    exported = torch.export.export(layer, (randn(3, *shape),), dynamic_shapes=({0: torch.export.Dim("N")}, None)[:1])
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for N in (2, 5):
        close(loaded(randn(N, *shape)), layer(randn(N, *shape)))


def test_functional_call_and_hooks():
    layer, source, x, seen = make(), make("oc_block4"), randn(2, 12, 6, 6), []
    source.values.data.mul_(3)
    close(
        torch.func.functional_call(layer, {"values": 2 * layer.values}, (x,)), 2 * layer(x) - layer.bias[:, None, None]
    )
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(x)
    assert seen == [(2, 10, 4, 4)]


def test_autocast_leaves_the_input_dtype():
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(2, 12, 6, 6)).dtype == torch.float32
        assert layer(randn(2, 12, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_train_as_one(tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = [
        subprocess.Popen([sys.executable, worker.__file__, str(rank), str(tmp_path)], env=env, cwd=CHECKOUT)
        for rank in range(worker.RANKS)
    ]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0] * worker.RANKS
    finally:
        for rank in ranks:
            rank.kill()
    net = worker.model()
    worker.train(net, worker.batch())
    for rank in range(worker.RANKS):
        state = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in net.state_dict().items():
            close(state[name], expected)
