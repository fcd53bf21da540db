"""The quantized linear layers: their state on every path that a module goes, and their place in PyTorch."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from cases import randn
from linear_cases import FROM_FLOAT, KINDS, equal, held_form_is_right, same
from torch import nn
from torch.nn.utils import parametrize, prune

from pyops import backend
from pyops.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture(params=FROM_FLOAT, ids=lambda kind: kind.name)
def from_float(request):
    return request.param


# ------------------------------------------------------------------------------------------- construction


def test_like_nn_linear(kind):
    a, b = nn.Linear(70, 33, True, "cpu", torch.bfloat16), kind.new(70, 33, True, "cpu", torch.bfloat16)
    assert (b.in_features, b.out_features, b.bias.shape, b.bias.dtype) == (70, 33, a.bias.shape, torch.bfloat16)
    assert kind.new(4, 3, False).bias is None
    assert b(randn(2, 70, dtype=torch.bfloat16)).shape == (2, 33)
    held_form_is_right(b)
    bound = 70**-0.5
    w = b(torch.eye(70)) - b.bias.float()
    assert w.abs().max() <= bound * 1.08  # half a step of int4
    assert w.std() > bound / 3


def test_repr_of_int8():
    assert repr(Int8Linear(4, 3)) == "Int8Linear(in_features=4, out_features=3, bias=True)"
    text = "Int8Linear(in_features=4, out_features=3, bias=False, activation='gelu')"
    assert repr(Int8Linear(4, 3, False, activation="gelu")) == text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float64}, TypeError, r"dtype is torch\.float64; allowed: torch\.float32"),
        ({"dtype": torch.int8}, TypeError, r"dtype is torch\.int8"),
        ({"activation": "swish"}, ValueError, "activation='swish' is not one of"),
        ({"in_features": -1}, ValueError, "in_features is -1"),
    ],
    ids=str,
)
def test_bad_construction(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind.module(**{"in_features": 4, "out_features": 3, "device": "meta", **kind.options, **arguments})


def test_too_many_inputs(kind):
    most = kind.module.max_in_features
    with pytest.raises(ValueError, match=f"in_features is {most + 1}; allowed: 0 to {most}"):
        kind.new(most + 1, 1, device="meta")
    assert kind.new(most, 1, device="meta").in_features == most


@pytest.mark.parametrize("activation", cases.ACTIVATION_NAMES)
def test_from_float_is_the_op(from_float, activation):
    linear = nn.Linear(70, 33)
    layer = from_float.module.from_float(linear, activation=activation, **from_float.arguments(linear.in_features))
    assert holds(layer, from_float.quantize(linear.weight))
    x, residual = randn(2, 3, 70), randn(2, 3, 33)
    assert torch.equal(layer(x), from_float.call(layer, x))
    y = from_float.call(layer, x, residual)
    assert not torch.equal(y, layer(x))
    assert torch.equal(layer(x, residual), y)
    assert torch.equal(layer(x, residual=residual), y)


def holds(layer, canonical):
    """True if the layer's tensors are these."""
    held = [getattr(layer, name) for name in layer.layout()]
    expected = [t for t in canonical if t is not None]
    return all(equal(a, b) for a, b in zip(held, expected, strict=True))


def test_from_float_keeps(from_float):
    linear = nn.Linear(70, 33, dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    layer = from_float.module.from_float(linear, **from_float.arguments(linear.in_features))
    assert (layer.training, layer.bias.requires_grad, layer.bias.dtype) == (False, False, torch.bfloat16)
    layer.bias.add_(1)
    assert not torch.equal(layer.bias, linear.bias), "the bias is a copy"


@pytest.mark.parametrize("name", ["prune", "container", "bias", "parametrize", "weight_norm", "spectral_norm"])
def test_from_float_reads_the_effective_weight(from_float, name):
    linear = nn.Linear(70, 33)
    if name in ("prune", "container", "bias"):
        prune.l1_unstructured(linear, "bias" if name == "bias" else "weight", amount=0.5)
        if name == "container":
            prune.random_unstructured(linear, "weight", amount=0.3)
        with torch.no_grad():  # what .weight shows is stale from here on
            (linear.bias_orig if name == "bias" else linear.weight_orig).mul_(2)
    elif name == "parametrize":
        parametrize.register_parametrization(linear, "weight", nn.Tanh())
    else:
        getattr(nn.utils, name)(linear)
        with torch.no_grad():
            (linear.weight_g if name == "weight_norm" else linear.weight_orig).mul_(2)
    before = copy.deepcopy(linear.state_dict())
    linear.eval()
    layer = from_float.module.from_float(linear, **from_float.arguments(linear.in_features))
    assert same(before, linear.state_dict()), "from_float changes nothing"
    linear(randn(5, 70))  # from here on .weight is what it computes with
    assert holds(layer, from_float.quantize(linear.weight))
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.requires_grad


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Conv1d(3, 3, 1), TypeError, "linear must be a torch.nn.Linear, got Conv1d"),
        (nn.Linear(3, 3, dtype=torch.float64), TypeError, r"linear has dtype torch\.float64"),
    ],
    ids=["conv", "fp64"],
)
def test_bad_from_float(from_float, linear, error, message):
    with pytest.raises(error, match=message):
        from_float.module.from_float(linear, **from_float.arguments(3))


# ------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("leading", cases.LEADING, ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_leading_dimensions(kind, leading, dtype):
    layer, x = kind.make(), randn(*leading, 70, dtype=dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*leading, 33), dtype)


@pytest.mark.parametrize("shape", [*cases.SHAPES, *cases.EMPTY_SHAPES], ids=str)
def test_any_size(kind, shape):
    M, N, K = shape
    layer = kind.new(K, N)
    held_form_is_right(layer)
    x = randn(M, K)
    assert torch.equal(layer(x), kind.call(layer, x))


@pytest.mark.parametrize(
    ("x", "residual", "error", "message"),
    [
        ([1.0], None, TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 70).double(), None, TypeError, r"x has dtype torch\.float64; allowed"),
        (torch.ones(2, 70).long(), None, TypeError, r"x has dtype torch\.int64"),
        (torch.ones(2, 71), None, ValueError, "K=71"),
        (torch.ones(()), None, ValueError, "0-dim"),
        (torch.ones(2, 70, device="meta"), None, ValueError, "on meta"),
        (torch.ones(2, 70), torch.ones(33), ValueError, r"residual is \(33,\); expected \(2, 33\)"),
        (torch.ones(2, 70), torch.ones(2, 33).half(), TypeError, r"residual has dtype torch\.float16"),
        (torch.ones(2, 70), 1.0, TypeError, "residual must be a tensor, got float"),
    ],
    ids=str,
)
def test_bad_inputs(kind, x, residual, error, message):
    with pytest.raises(error, match=message):
        kind.make()(x, residual)


def test_gradients_reach_input_bias_and_residual(kind):
    layer, x, residual = kind.make(activation="silu"), randn(5, 70).requires_grad_(), randn(5, 33).requires_grad_()
    layer(x, residual).square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, residual, layer.bias))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_small_gradients_do_not_vanish_in_half_precision(kind):
    """Times a scale of the weight, these are nothing in fp16."""
    layer, x, dy = kind.make(), randn(5, 70).half(), torch.full((5, 33), 4e-5).half()
    grads = [torch.autograd.grad(layer(t.requires_grad_()), t, dy.to(t.dtype))[0] for t in (x, x.float())]
    torch.testing.assert_close(grads[0].float(), grads[1], rtol=1e-2, atol=2**-22)
    assert grads[1].abs().max() > 2**-18


def test_autocast_computes_in_the_dtype_of_x(kind):
    layer = kind.make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(2, 70)).dtype is torch.float32
        assert layer(randn(2, 70, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_eight_threads_at_once(kind):
    layer = kind.make(130, 515)
    inputs = [randn(m, 515, seed=m) for m in (1, 2, 3, 17, 40)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda i: _without_grad(layer, inputs[i % 5]), range(400)))
    assert all(torch.equal(y, expected[i % 5]) for i, y in enumerate(results))


def _without_grad(layer, x):
    with torch.no_grad():
        return layer(x)


# ------------------------------------------------------------------------------------------- moving and copying


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "to", "type", "share_memory", "cpu"])
def test_dtype_moves_the_bias_only(kind, move):
    layer = kind.make()
    before = layer.state_dict()
    moved = {
        "to": lambda: layer.to(torch.float16),
        "type": lambda: layer.type(torch.float16),
        **{name: getattr(layer, name) for name in (move,) if name not in ("to", "type")},
    }[move]()
    assert moved is layer
    after = layer.state_dict()
    quantized = {name: (before[name], after[name]) for name in kind.layout}
    assert all(equal(a, b) for a, b in quantized.values())
    wanted = {"half": torch.float16, "to": torch.float16, "type": torch.float16, "bfloat16": torch.bfloat16}
    assert layer.bias.dtype is {**wanted, "double": torch.float64}.get(move, torch.float32)
    held_form_is_right(layer)
    if move == "share_memory":
        assert all(b.is_shared() for b in layer.buffers())


def test_meta_and_back(kind):
    source = kind.make()
    layer = copy.deepcopy(source).to("meta")
    held_form_is_right(layer)
    assert layer(torch.empty(2, 70, device="meta")).shape == (2, 33)
    layer.to_empty(device="cpu")
    held_form_is_right(layer)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(randn(2, 70)), source(randn(2, 70)))
    assert layer.bias.requires_grad


def test_construct_on_meta_then_assign(kind):
    source = kind.make()
    with torch.device("meta"):
        layer = kind.new(70, 33)
    state = source.state_dict()
    layer.load_state_dict(state, assign=True)
    held_form_is_right(layer)
    assert torch.equal(layer(randn(2, 70)), source(randn(2, 70)))
    kept = [name for name in kind.layout if not backend.native or name not in layer.packs]
    assert all(getattr(layer, name).data_ptr() == state[name].data_ptr() for name in kept)
    assert isinstance(layer.bias, nn.Parameter)


def test_load_into_meta_without_assign_warns_and_does_nothing(kind):
    layer = kind.new(70, 33, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.load_state_dict(kind.make().state_dict())
    assert any("weight: copying to a meta tensor" in str(w.message) for w in caught)
    assert layer.weight.is_meta


def test_deepcopy_is_independent(kind):
    layer = nn.Sequential(kind.make(), kind.make())
    layer[1] = layer[0]
    new = copy.deepcopy(layer)
    assert new[0] is new[1]
    held_form_is_right(new[0])
    before = layer.state_dict()
    new[0].load_state_dict(kind.new(70, 33).state_dict())
    assert same(layer.state_dict(), before)


def test_copy_and_pickle_of_a_compiled_layer(kind):
    layer, x = kind.new(8, 4), torch.randn(2, 8)
    layer.compile(backend="eager")
    y = layer(x)
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.bias += 100
        assert torch.allclose(new(x), y + 100)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)


def test_pickle_is_canonical(kind, monkeypatch):
    layer = kind.make()
    data = pickle.dumps(layer)
    assert layer.__getstate__()["_buffers"]["_weight"].shape == kind.layout["weight"][0]
    new = pickle.loads(data)
    held_form_is_right(new)
    assert same(new.state_dict(), layer.state_dict())
    # A machine whose kernels read the canonical form:
    monkeypatch.setattr(kind.module, "_wants_packed", lambda layer, device: False)
    other = pickle.loads(data)
    assert other._buffers["_weight"].dim() == 2
    assert torch.equal(other(randn(2, 70)), layer(randn(2, 70)))
    file = io.BytesIO()
    torch.save(other, file)
    monkeypatch.undo()
    file.seek(0)
    held_form_is_right(torch.load(file, weights_only=False))


# ------------------------------------------------------------------------------------------- PyTorch


def test_compile_in_full(kind, fresh_compiler):
    model = nn.Sequential(kind.make(activation="gelu"), nn.LayerNorm(33), kind.make(17, 33, bias=False))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for shape in ((5, 70), (9, 70)):
        x = randn(*shape)
        torch.testing.assert_close(compiled(x), model(x), rtol=0.02, atol=0.02)  # LayerNorm's rounding moves integers
    layer = kind.make()
    compiled = torch.compile(layer, fullgraph=True)
    x, residual = randn(5, 70).requires_grad_(), randn(5, 33)
    assert torch.equal(compiled(x, residual), layer(x, residual))
    compiled(x).sum().backward()
    assert x.grad is not None
    layer.load_state_dict(kind.new(70, 33).state_dict())
    assert torch.equal(compiled(x), layer(x)), "a compiled layer sees what is loaded later"


def test_export_with_a_dynamic_batch(kind, fresh_compiler):
    layer = kind.make(activation="relu")
    exported = torch.export.export(layer, (randn(5, 70),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for M in (2, 19):
        x = randn(M, 70)
        assert torch.equal(exported.module()(x), layer(x))
        assert torch.equal(loaded(x), layer(x))


def test_fake_tensors_of_cuda(kind):
    with torch._subclasses.FakeTensorMode():
        layer = kind.new(70, 33, False, device="meta").to_empty(device="cuda")
        y = layer(torch.empty(4, 70, dtype=torch.bfloat16, device="cuda"))
        assert (y.device.type, tuple(y.shape), y.dtype) == ("cuda", (4, 33), torch.bfloat16)
        held_form_is_right(layer)
        held_form_is_right(layer.cpu())
        layer.load_state_dict(layer.state_dict())


def test_ddp(kind, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = kind.make()
        wrapped = nn.parallel.DistributedDataParallel(layer)
        x = randn(5, 70)
        wrapped(x).sum().backward()
        assert layer.bias.grad is not None
        with torch.no_grad():
            assert torch.equal(wrapped(x), layer(x))
    finally:
        wrapped = None
        cases.end_process_group()


def test_pruned_bias_is_used(kind):
    layer = kind.make()
    prune.l1_unstructured(layer, "bias", amount=1.0)
    assert torch.equal(layer(torch.zeros(1, 70)), torch.zeros(1, 33))


def test_hooks_run(kind):
    layer, seen = kind.make(), []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    layer(randn(2, 70))
    assert seen == [(2, 33)]
