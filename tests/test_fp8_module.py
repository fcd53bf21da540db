"""What only `pyops.nn.Fp8Linear` has, and `pyops.Fp8Dynamic`; test_linear_module.py and _state.py hold the rest."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from cases import randn
from fp8_cases import GRANULARITIES
from linear_cases import KINDS, equal, same
from torch import nn

import pyops
from pyops import ops
from pyops.nn import Fp8Linear
from pyops.ops.fp8_linear import FP8

pytestmark = pytest.mark.usefixtures("poison")
N, K = 150, 140
"""Two blocks each way, the last ones partial."""
STATIC = next(kind for kind in KINDS if kind.name == "fp8_static")


# ------------------------------------------------------------------------------------------- construction


def test_repr():
    assert repr(Fp8Linear(4, 3)) == "Fp8Linear(in_features=4, out_features=3, bias=True, granularity='row')"
    layer = Fp8Linear(4, 3, False, static=True, activation="gelu")
    text = "in_features=4, out_features=3, bias=False, granularity='row', static=True, activation='gelu'"
    assert repr(layer) == f"Fp8Linear({text})"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": FP8}, TypeError, r"dtype is torch\.float8_e4m3fn"),
        ({"granularity": "tensor"}, ValueError, "granularity='tensor' is not one of row, block"),
        ({"granularity": "block", "static": True}, ValueError, "static goes with granularity 'row', not 'block'"),
    ],
    ids=str,
)
def test_bad_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        Fp8Linear(**{"in_features": 4, "out_features": 3, "device": "meta", **arguments})


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_from_quantized_takes_what_checkpoints_have(dtype):
    """A scale by channel [N], [N, 1], one of the whole weight, or by block, in the dtype of the checkpoint."""
    codes = ops.quantize_fp8(randn(N, K))[0]
    x, bias = randn(3, K), randn(N)
    rows, one, blocks = ((randn(*shape).abs() * 0.01).to(dtype) for shape in ((N,), (1,), (2, 2)))
    for scale, canonical in (
        (rows, rows),
        (rows[:, None], rows),
        (one, one.expand(N)),
        (one[0], one.expand(N)),
        (blocks, blocks),
    ):
        layer = Fp8Linear.from_quantized(codes, scale, bias)
        assert layer.granularity == ("block" if scale is blocks else "row")
        assert layer.weight.data_ptr() == codes.data_ptr()
        assert torch.equal(layer(x), ops.fp8_linear(x, codes, canonical.float().contiguous(), bias))
    layer = Fp8Linear.from_quantized(codes, rows, input_scale=torch.tensor(0.125, dtype=dtype), activation="relu")
    assert layer.static
    y = ops.fp8_linear(x, codes, rows.float(), activation="relu", x_scale=0.125)
    assert torch.equal(layer(x), y)


BAD_QUANTIZED = {
    "weight is float": (TypeError, r"weight has dtype torch\.float32", {"weight": torch.ones(5, 7)}),
    "weight is None": (TypeError, "weight must be a tensor, got NoneType", {"weight": None}),
    "weight is 1-D": (ValueError, r"weight is \(7,\)", {"weight": torch.ones(7).to(FP8)}),
    "weight holds NaN": (ValueError, "weight holds NaN", {"weight": torch.full((5, 7), torch.nan).to(FP8)}),
    "scale is int": (TypeError, r"weight_scale has dtype torch\.int8", {"weight_scale": torch.ones(5).char()}),
    "scale is short": (ValueError, r"size mismatch for weight_scale: got \(4,\)", {"weight_scale": torch.ones(4)}),
    "scale is NaN": (ValueError, "weight_scale holds NaN or Inf", {"weight_scale": torch.full((5,), torch.nan)}),
    "scale elsewhere": (ValueError, "weight_scale is on meta", {"weight_scale": torch.ones(5, device="meta")}),
    "bias is short": (ValueError, r"bias is \(4,\) on cpu; expected \(5,\)", {"bias": torch.ones(4)}),
    "bias is int": (TypeError, r"bias has dtype torch\.int64", {"bias": torch.ones(5).long()}),
    "input_scale of two": (ValueError, "input_scale has 2 elements; expected one", {"input_scale": torch.ones(2)}),
    "input_scale is zero": (ValueError, r"input_scale is 0\.0; it must be", {"input_scale": torch.zeros(1)}),
    "input_scale is Inf": (ValueError, "input_scale holds NaN or Inf", {"input_scale": torch.tensor(torch.inf)}),
    "static by block": (
        ValueError,
        "static goes with granularity 'row'",
        {
            "input_scale": torch.ones(1),
            "weight": torch.ones(300, 7).to(FP8),
            "weight_scale": torch.ones(3, 1),
            "bias": None,
        },
    ),
}


@pytest.mark.parametrize("name", BAD_QUANTIZED)
def test_bad_from_quantized(name):
    error, message, changes = BAD_QUANTIZED[name]
    arguments = {"weight": torch.ones(5, 7).to(FP8), "weight_scale": torch.ones(5), "bias": torch.ones(5), **changes}
    with pytest.raises(error, match=message):
        Fp8Linear.from_quantized(**arguments)


# ------------------------------------------------------------------------------------------- state


def test_layers_of_several_blocks():
    linear = nn.Linear(K, N)
    layer, new = Fp8Linear.from_float(linear, granularity="block"), Fp8Linear(K, N, granularity="block")
    state = layer.state_dict()
    assert tuple(state["weight_scale"].shape) == (2, 2)
    new.load_state_dict(state)
    assert same(new.state_dict(), state)
    x = randn(3, K)
    assert torch.equal(new(x), ops.fp8_linear(x, *ops.quantize_fp8(linear.weight, "block"), linear.bias))


def test_the_buffer_holds_bytes_in_the_memory_of_the_weight():
    for kind in KINDS[-3:]:
        layer = kind.make()
        for held in (layer, copy.deepcopy(layer), kind.new(), kind.new(device="meta").to_empty(device="cpu")):
            assert held._buffers["_weight"].dtype is torch.uint8
            assert held.weight.dtype is held.state_dict()["weight"].dtype is FP8
            assert held.weight.data_ptr() == held._buffers["_weight"].data_ptr()


NAN_WEIGHT = torch.full((33, 70), torch.nan).to(FP8)
BAD_STATES = {
    "no input scale": ({"input_scale": None}, r'Missing key\(s\).*"input_scale"'),
    "e5m2 weight": ({"weight": NAN_WEIGHT.to(torch.float8_e5m2)}, r"weight has dtype torch\.float8_e5m2"),
    "bytes": ({"weight": NAN_WEIGHT.view(torch.uint8)}, r"weight has dtype torch\.uint8"),
    "weight of NaN": ({"weight": NAN_WEIGHT}, r"weight holds NaN"),
    "weight of -NaN": ({"weight": (NAN_WEIGHT.view(torch.uint8) | 0x80).view(FP8)}, r"weight holds NaN"),
    "half scale": ({"weight_scale": torch.ones(33).half()}, r"weight_scale has dtype torch\.float16"),
    "scale by block": ({"weight_scale": torch.ones(1, 1)}, r"size mismatch for weight_scale: got \(1, 1\)"),
    "zero input scale": ({"input_scale": torch.zeros(1)}, r"input_scale is 0\.0; it must be at least"),
    "NaN input scale": ({"input_scale": torch.full((1,), torch.nan)}, r"input_scale holds NaN or Inf"),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict_is_refused_whole(name, assign):
    changes, message = BAD_STATES[name]
    state = {key: value for key, value in {**STATIC.make().state_dict(), **changes}.items() if value is not None}
    layer = STATIC.new()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    assert same(layer.state_dict(), before)


def test_a_dynamic_layer_refuses_a_static_state():
    with pytest.raises(RuntimeError, match="input_scale has no place: the layer was made with static=False"):
        Fp8Linear(70, 33).load_state_dict(STATIC.make().state_dict())


def test_a_weight_of_nan_cannot_be_set():
    with pytest.raises(ValueError, match="weight holds NaN"):
        Fp8Linear(70, 33).weight = NAN_WEIGHT


# ------------------------------------------------------------------------------------------- swap_


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_swap_passes_the_granularity_on(granularity):
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 7))
    weights = [ops.quantize_fp8(model[i].weight, granularity) for i in (0, 2)]
    report = pyops.swap_(model, pyops.Fp8Dynamic(granularity))
    assert [row.choice for row in report.rows] == ["fp8_dynamic"] * 2
    for i, (codes, scale) in zip((0, 2), weights, strict=True):
        assert type(model[i]) is Fp8Linear
        assert equal(model[i].weight, codes)
        assert torch.equal(model[i].weight_scale, scale)


def test_bad_granularity_of_the_config():
    with pytest.raises(ValueError, match="granularity='tensor' is not one of row, block"):
        pyops.Fp8Dynamic("tensor")
