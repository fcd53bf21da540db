"""`pyops.nn.Int4Linear`: what only it has. What all do is in test_linear_module.py and test_linear_state.py."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
import safetensors.torch
import torch
from cases import randn
from linear_cases import KINDS, call_int4, held_form_is_right, same
from torch import nn

from pyops import ops
from pyops.nn import Int4Linear

pytestmark = pytest.mark.usefixtures("poison")
INT4, SYMMETRIC, ORDERED = (kind for kind in KINDS if kind.module is Int4Linear)
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def order_of(k, seed=0):
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed)).int()


# ------------------------------------------------------------------------------------------- construction


def test_repr():
    text = "Int4Linear(in_features=64, out_features=3, bias=True, group_size=128, symmetric=False)"
    assert repr(Int4Linear(64, 3)) == text
    layer = Int4Linear(64, 3, False, group_size=32, symmetric=True, act_order=True, activation="relu", compute="float")
    assert repr(layer) == (
        "Int4Linear(in_features=64, out_features=3, bias=False, group_size=32, symmetric=True, act_order=True, "
        "activation='relu', compute='float')"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 100}, ValueError, "group_size is 100; allowed: 32, a multiple of 64, or -1"),
        ({"group_size": 64.0}, TypeError, "group_size must be an int, got float"),
        ({"scale_dtype": torch.float64}, TypeError, r"scale_dtype is torch\.float64; allowed: torch\.float32"),
        ({"compute": "int4"}, ValueError, "compute='int4' is not one of auto, int8, float"),
        ({"method": "mse"}, TypeError, "method"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Int4Linear(64, 3, device="meta", **options)


@pytest.mark.parametrize(
    ("options", "message"), [({"method": "gptq"}, "method='gptq' is not one of rtn, mse"), ({"group_size": 7}, "is 7")]
)
def test_bad_options_of_from_float(options, message):
    with pytest.raises(ValueError, match=message):
        Int4Linear.from_float(nn.Linear(64, 3), **options)


def test_a_weight_with_nan_is_refused():
    linear = nn.Linear(600, 300)  # quantized in several pieces
    with torch.no_grad():
        linear.weight[299, 599] = torch.nan
    with pytest.raises(ValueError, match="w holds NaN or Inf"):
        Int4Linear.from_float(linear)


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("G", [32, 128, -1])
@pytest.mark.parametrize(("N", "K"), [(33, 70), (1, 1), (32, 129), (300, 1000), (0, 70), (5, 0)])
def test_from_float_in_pieces_is_the_whole(N, K, G, symmetric, method, monkeypatch):
    """What is quantized and packed piece by piece is what `quantize_int4` makes of all."""
    monkeypatch.setattr("pyops.memory.CHUNK", 4096)
    linear = nn.Linear(K, N, False)
    options = {"group_size": G, "symmetric": symmetric, "method": method, "scale_dtype": torch.float32}
    layer = Int4Linear.from_float(linear, **options)
    held_form_is_right(layer)
    monkeypatch.undo()
    expected = ops.quantize_int4(linear.weight, **options)
    for a, b in zip((layer.weight, layer.weight_scale, layer.weight_zero), expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------- from_quantized


def quantized(kind=INT4, source=None, **changes):
    """Arguments of `from_quantized` that make a layer like `source`, with some of them changed."""
    state = (source or kind.make()).state_dict()
    arguments = {"weight_zero": None, **state, "in_features": 70, "group_size": kind.options["group_size"]}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def from_quantized(arguments):
    return Int4Linear.from_quantized(arguments.pop("weight"), arguments.pop("weight_scale"), **arguments)


@pytest.mark.parametrize("kind", [INT4, SYMMETRIC, ORDERED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bias", [True, False])
def test_from_quantized_holds_what_it_is_given(kind, bias):
    source = kind.make(bias=bias)
    layer = from_quantized(quantized(kind, source, activation="silu"))
    held_form_is_right(layer)
    assert same(layer.state_dict(), source.state_dict())
    assert (layer.symmetric, layer.act_order, layer.activation) == (kind is SYMMETRIC, kind is ORDERED, "silu")
    x = randn(4, 70)
    assert torch.equal(layer(x), call_int4(layer, x))


def set_to(value, at=-1):
    def change(t):
        t = t.clone()
        t.view(-1)[at] = value
        return t

    return change


BAD_QUANTIZED = {
    "no tensor": ({"weight": [1]}, TypeError, "weight must be a tensor, got list"),
    "int8 weight": (
        {"weight": lambda t: t.to(torch.int8)},
        TypeError,
        r"weight has dtype torch\.int8, expected torch\.uint8",
    ),
    "float weight": ({"weight": torch.ones(33, 70)}, TypeError, r"weight has dtype torch\.float32"),
    "no matrix": ({"weight": lambda t: t[0]}, ValueError, r"weight is \(35,\); expected \[out_features"),
    "wide": ({"weight": lambda t: t[:, :-1]}, ValueError, r"mismatch for weight: got \(33, 34\).*\(33, 35\)"),
    "other K": ({"in_features": 72}, ValueError, r"mismatch for weight: got \(33, 35\).*\(33, 36\)"),
    "other groups": ({"group_size": 64}, ValueError, r"mismatch for weight_scale: got \(33, 3\).*\(33, 2\)"),
    "bad group": ({"group_size": 33}, ValueError, "group_size is 33"),
    "no scale": ({"weight_scale": None}, TypeError, "weight_scale must be a tensor, got NoneType"),
    "double scale": ({"weight_scale": torch.Tensor.double}, TypeError, r"weight_scale has dtype torch\.float64"),
    "nan scale": ({"weight_scale": set_to(torch.nan)}, ValueError, "weight_scale holds NaN or Inf"),
    "inf scale": ({"weight_scale": set_to(-torch.inf)}, ValueError, "weight_scale holds NaN or Inf"),
    "int8 zero": ({"weight_zero": lambda t: t.to(torch.int8)}, TypeError, r"weight_zero has dtype torch\.int8"),
    "zero shape": ({"weight_zero": lambda t: t[:, :1]}, ValueError, "mismatch for weight_zero"),
    "zero of 17": ({"weight_zero": set_to(17)}, ValueError, "weight_zero holds 17; zero points are 0 to 16"),
    "short bias": ({"bias": lambda t: t[:1]}, ValueError, r"bias is \(1,\) on cpu; expected \(33,\)"),
    "int bias": ({"bias": torch.Tensor.int}, TypeError, r"bias has dtype torch\.int32"),
    "elsewhere": ({"weight_zero": lambda t: t.to("meta")}, ValueError, "weight_zero is on meta, weight on cpu"),
    "bias elsewhere": ({"bias": lambda t: t.to("meta")}, ValueError, "on meta"),
    "long order": ({"input_order": order_of(70).long()}, TypeError, r"input_order has dtype torch\.int64"),
    "short order": ({"input_order": order_of(69)}, ValueError, "mismatch for input_order"),
    "twice": ({"input_order": set_to(3)(order_of(70))}, ValueError, "input_order is no permutation"),
    "outside": ({"input_order": set_to(70)(order_of(70))}, ValueError, "input_order is no permutation"),
    "negative": ({"input_order": set_to(-1)(order_of(70))}, ValueError, "input_order is no permutation"),
    "activation": ({"activation": "swish"}, ValueError, "activation='swish'"),
}


@pytest.mark.parametrize("name", BAD_QUANTIZED)
def test_bad_from_quantized(name):
    changes, error, message = BAD_QUANTIZED[name]
    with pytest.raises(error, match=message):
        from_quantized(quantized(**changes))


# ------------------------------------------------------------------------------------------- forward


def test_order_is_the_order_of_the_inputs():
    layer, x = ORDERED.make(compute="float"), randn(3, 70)
    w = ops.dequantize_int4(layer.weight, layer.weight_scale, layer.weight_zero, 70, -1)
    dense = torch.zeros(33, 70).index_copy_(1, layer.input_order.long(), w)
    torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)


def test_order_is_looked_at_once(monkeypatch):
    layer, x, residual = ORDERED.make(), randn(3, 70), randn(3, 33)
    y = layer(x, residual)

    def never(*args):
        raise AssertionError("looked at again")

    for module in ("pyops.nn.int4_linear", "pyops.ops.int4_linear"):  # by import: the op's function has that name too
        monkeypatch.setattr(importlib.import_module(module), "check_order", never)
    assert torch.equal(layer(x, residual), y)


@pytest.mark.parametrize("compute", ["auto", "int8", "float"])
def test_compute(compute):
    layer, x = INT4.make(compute=compute), randn(3, 70)
    results = {name: call_int4(INT4.make(compute=name), x) for name in ("int8", "float")}
    assert not torch.equal(results["int8"], results["float"])
    assert torch.equal(layer(x), results["int8" if compute == "auto" else compute])


def test_auto_is_float_elsewhere(monkeypatch):
    seen = []
    monkeypatch.setattr("pyops.nn.int4_linear.dispatch", lambda *args: seen.append(args[-1]))
    for device in ("cpu", "meta"):
        layer = Int4Linear(64, 3, device=device)
        layer(torch.empty(2, 64, device=device))
    assert seen == ["int8", "float"]


@pytest.mark.parametrize("K", [65, 66, 127, 128])
def test_a_packed_weight_does_not_take_what_fits_its_padding(K):
    with pytest.raises(ValueError, match=f"x has K={K}; in_features is 70"):
        INT4.make()(torch.ones(2, K))


# ------------------------------------------------------------------------------------------- state


def test_attributes_that_a_layer_has_not():
    layer = SYMMETRIC.make()
    assert (layer.weight_zero, layer.input_order) == (None, None)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    with pytest.raises(ValueError, match="weight_zero cannot be set: the layer was made with symmetric=True"):
        layer.weight_zero = torch.zeros(33, 2, dtype=torch.uint8)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("of", SCALES, ids=str)
@pytest.mark.parametrize("into", SCALES, ids=str)
def test_scales_are_loaded_as_they_are(of, into, assign):
    """What one dtype holds another may round: 2⁻¹² + 2⁻¹⁹ is no bf16, 2⁻⁹⁰ no fp16."""
    source = Int4Linear(70, 33, group_size=32, scale_dtype=of)
    source.weight_scale = torch.full((33, 3), 2**-12 + 2**-19 if of is torch.float16 else 2.0**-90, dtype=of)
    layer = Int4Linear(70, 33, group_size=32, scale_dtype=into)
    layer.load_state_dict(source.state_dict(), assign=assign)
    held_form_is_right(layer)
    assert same(layer.state_dict(), source.state_dict())
    assert layer.weight_scale.dtype is of
    layer.load_state_dict(Int4Linear(70, 33, group_size=32, scale_dtype=into).state_dict(), assign=assign)
    assert layer.weight_scale.dtype is into


def test_loading_does_not_hold_what_it_was_given():
    source = Int4Linear(70, 33, group_size=32, scale_dtype=torch.float32)
    layer = Int4Linear(70, 33, group_size=32)
    state = source.state_dict()
    before = {name: t.clone() for name, t in state.items()}
    layer.load_state_dict(state)
    for t in state.values():
        t.zero_()
    assert same(layer.state_dict(), before)


BAD_STATES = {
    "zero of 17": (INT4, {"weight_zero": set_to(17)}, r"0\.weight_zero holds 17; zero points are 0 to 16"),
    "zero of 255": (INT4, {"weight_zero": set_to(255, 0)}, r"0\.weight_zero holds 255"),
    "no zero": (INT4, {"weight_zero": None}, r"0\.weight comes without 0\.weight_zero"),
    "int8 zero": (INT4, {"weight_zero": lambda t: t.to(torch.int8)}, r"0\.weight_zero has dtype torch\.int8"),
    "group too few": (
        INT4,
        {"weight_scale": lambda t: t[:, :2], "weight_zero": lambda t: t[:, :2]},
        r"(?s)mismatch for 0\.weight_scale.*mismatch for 0\.weight_zero",
    ),
    "zero of a symmetric": (
        SYMMETRIC,
        {"weight_zero": torch.zeros(33, 2, dtype=torch.uint8)},
        r"0\.weight_zero has no place: the layer was made with symmetric=True",
    ),
    "unordered": (INT4, {"input_order": order_of(70)}, r"0\.input_order has no place: .* with act_order=False"),
    "no order": (ORDERED, {"input_order": None}, r"0\.weight comes without 0\.input_order"),
    "order twice": (ORDERED, {"input_order": set_to(0)(torch.arange(70).int())}, r"0\.input_order is no permutation"),
    "order outside": (ORDERED, {"input_order": set_to(70)}, r"0\.input_order is no permutation"),
    "long order": (ORDERED, {"input_order": torch.Tensor.long}, r"0\.input_order has dtype torch\.int64"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict_is_refused_whole(name, assign, strict):
    kind, changes, message = BAD_STATES[name]
    model = nn.Sequential(kind.new())
    before = copy.deepcopy(model.state_dict())
    state = dict(kind.make().state_dict())
    for key, change in changes.items():
        state[key] = change(state[key]) if callable(change) else change
    state = {f"0.{key}": value for key, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign, strict=strict)
    assert same(model.state_dict(), before)


def test_a_zero_of_16_is_right():
    """GPTQ's first format can hold it."""
    layer, source = INT4.new(), INT4.make()
    state = source.state_dict() | {"weight_zero": set_to(16)(source.weight_zero)}
    layer.load_state_dict(state)
    assert layer.weight_zero.max() == 16
    assert torch.equal(layer(randn(2, 70)), call_int4(layer, randn(2, 70)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_sharded_files(kind, tmp_path):
    """Tensors of one layer may lie in different files, found by an index as Hugging Face writes it."""
    model = nn.Sequential(kind.make(), nn.ReLU(), kind.make(70, 33))
    shards = [{}, {}]
    for i, (name, t) in enumerate(model.state_dict().items()):
        shards[i % 2][name] = t
    index = {}
    for i, shard in enumerate(shards):
        safetensors.torch.save_file(shard, tmp_path / f"{i}.safetensors")
        index |= dict.fromkeys(shard, f"{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    state = {}
    for file in sorted(set(files.values())):
        state |= safetensors.torch.load_file(tmp_path / file)
    with torch.device("meta"):
        new = nn.Sequential(kind.new(), nn.ReLU(), kind.new(33, 70))
    new.load_state_dict(state, assign=True)
    assert same(new.state_dict(), model.state_dict())
    assert torch.equal(new(randn(3, 70)), model(randn(3, 70)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_saved_state_is_no_view(kind):
    """safetensors refuses tensors that share memory."""
    layer = kind.make(32, 64)
    state = layer.state_dict()
    held = {t.untyped_storage().data_ptr() for name, t in layer.named_buffers() if name.startswith("_")}
    pointers = [t.untyped_storage().data_ptr() for t in state.values()]
    assert len(set(pointers)) == len(pointers)
    if layer._buffers["_weight"].dim() == 3:
        assert not held & set(pointers)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
