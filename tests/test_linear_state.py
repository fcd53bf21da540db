"""The quantized linear layers and checkpoints: what is saved, what is loaded, what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import torch
from cases import randn
from linear_cases import KINDS, equal, held_form_is_right, same
from torch import nn

pytestmark = pytest.mark.usefixtures("poison")
INT8 = KINDS[0]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_canonical_and_round_trips(kind, bias, tmp_path):
    layer = kind.make(bias=bias)
    state = layer.state_dict()
    kinds = {key: (tuple(t.shape), t.dtype) for key, t in state.items()}
    assert kinds == kind.layout | ({"bias": ((33,), torch.float32)} if bias else {})
    safetensors.torch.save_file(state, tmp_path / "layer.safetensors")
    new = kind.new(70, 33, bias)
    new.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    held_form_is_right(new)
    assert same(new.state_dict(), state)
    assert torch.equal(new(randn(3, 70)), layer(randn(3, 70)))


def test_load_keeps_the_memory(kind):
    layer = kind.make()
    held = {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}
    layer.load_state_dict(kind.new(70, 33).state_dict())
    assert held == {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}


def test_weights_only_file_and_prefix(kind):
    model = nn.Sequential(nn.ReLU(), kind.make())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {f"1.{name}" for name in (*kind.layout, "bias")}
    assert next(iter(state)) == "1.weight"
    new = nn.Sequential(nn.ReLU(), kind.new(70, 33))
    new.load_state_dict(state)
    assert same(new.state_dict(), model.state_dict())


def _state(kind, **changes):
    """A right state with some entries changed: by functions of the entry, None for one that is left out."""
    state = dict(kind.make().state_dict())
    for name, change in changes.items():
        state[name] = change(state[name]) if callable(change) else change
    return {key: value for key, value in state.items() if value is not None}


def _with(value):
    def change(t):
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return change


NAN = torch.full((33,), torch.nan)
# {name: (changes, message)}
BAD_STATES = {
    "no weight": ({"weight": None}, r'Missing key\(s\).*"0\.weight"'),
    "no scale": ({"weight_scale": None}, r'Missing key\(s\).*"0\.weight_scale"'),
    "no bias": ({"bias": None}, r'Missing key\(s\).*"0\.bias"'),
    "one too many": ({"scale": NAN}, r'Unexpected key\(s\).*"0\.scale"'),
    "a child's": ({"child.weight": NAN}, r'Unexpected key\(s\).*"0\.child\.weight"'),
    "misspelt": ({"weight": None, "weigth": NAN}, r'(?s)Missing.*"0\.weight".*Unexpected.*"0\.weigth"'),
    "float weight": (
        {"weight": torch.Tensor.float},
        r"0\.weight has dtype torch\.float32, expected torch\.(u?int8|float8_e4m3fn).*float layer",
    ),
    "wide weight": ({"weight": lambda t: t.to(torch.int16)}, r"0\.weight has dtype torch\.int16"),
    "transposed": (
        {"weight": lambda t: t.T.contiguous()},
        r"size mismatch for 0\.weight: got \(\d+, 33\)",
    ),
    "packed": ({"weight": lambda t: t.new_zeros(2, 33, 128)}, r"size mismatch for 0\.weight"),
    "long weight": ({"weight": lambda t: torch.cat([t, t[:, :1]], dim=1)}, r"size mismatch for 0\.weight"),
    "double scale": ({"weight_scale": torch.Tensor.double}, r"0\.weight_scale has dtype torch\.float64, expected"),
    "int scale": ({"weight_scale": torch.Tensor.int}, r"0\.weight_scale has dtype torch\.int32, expected"),
    "short scale": ({"weight_scale": lambda t: t[:-1]}, r"size mismatch for 0\.weight_scale"),
    "scale of NaN": ({"weight_scale": _with(torch.nan)}, r"0\.weight_scale holds NaN or Inf"),
    "scale of Inf": ({"weight_scale": _with(torch.inf)}, r"0\.weight_scale holds NaN or Inf"),
    "short bias": ({"bias": lambda t: t[:1]}, r"size mismatch for 0\.bias"),
    "int bias": ({"bias": torch.Tensor.int}, r"0\.bias has dtype torch\.int32"),
    "not a tensor": ({"weight_scale": torch.Tensor.tolist}, r"0\.weight_scale must be a tensor, got list"),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict_is_refused_whole(kind, name, assign):
    changes, message = BAD_STATES[name]
    model = nn.Sequential(kind.new(70, 33))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({"0." + key: value for key, value in _state(kind, **changes).items()}, assign=assign)
    if name not in ("no bias", "one too many", "a child's"):  # torch loads what is right beside them, and so do we
        assert same(model.state_dict(), before)


def test_nothing_there(kind):
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(kind.new(70, 33)).load_state_dict({})
    assert all(f'"0.{name}"' in str(caught.value) for name in (*kind.layout, "bias"))


def test_half_a_scale_is_refused_by_int8():
    with pytest.raises(RuntimeError, match=r"weight_scale has dtype torch\.float16, expected torch\.float32\."):
        INT8.new().load_state_dict(_state(INT8, weight_scale=torch.Tensor.half))


def test_several_errors_are_all_told(kind):
    changes = {"weight": torch.Tensor.float, "weight_scale": _with(torch.nan), "bias": lambda t: t[:1]}
    state = _state(kind, **changes)
    with pytest.raises(RuntimeError) as caught:
        kind.make().load_state_dict(state)
    assert all(text in str(caught.value) for text in ("weight has dtype", "weight_scale holds", "mismatch for bias"))


def test_load_without_strict(kind):
    layer, source = kind.new(70, 33), kind.make()
    before = layer.state_dict()
    result = layer.load_state_dict({"other": NAN}, strict=False)
    assert set(result.missing_keys) == {*kind.layout, "bias"}
    assert result.unexpected_keys == ["other"]
    assert same(layer.state_dict(), before)
    state = source.state_dict()
    layer.load_state_dict({**{name: state[name] for name in kind.layout}, "other": NAN}, strict=False)
    assert all(equal(layer.state_dict()[name], state[name]) for name in kind.layout)
    assert torch.equal(layer.bias, before["bias"])
    with pytest.raises(RuntimeError, match="weight comes without weight_scale"):
        layer.load_state_dict({"weight": state["weight"]}, strict=False)
    with pytest.raises(RuntimeError, match="weight has dtype"):
        layer.load_state_dict({"weight": torch.ones(33, 70)}, strict=False)


def test_load_hooks_may_rename(kind):
    layer, source = kind.new(70, 33), kind.make()

    def rename(module, state_dict, prefix, *rest):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "qweight")

    layer.register_load_state_dict_pre_hook(rename)
    state = source.state_dict()
    state["qweight"] = state.pop("weight")
    for _ in range(2):
        layer.load_state_dict(state)
        assert same(layer.state_dict(), source.state_dict())


def test_weight_can_be_set(kind):
    layer, source = kind.new(70, 33), kind.make()
    for name in kind.layout:
        setattr(layer, name, getattr(source, name))
        held_form_is_right(layer)
    assert all(equal(getattr(layer, name), getattr(source, name)) for name in kind.layout)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float32"):
        layer.weight = torch.ones(33, 70)
    x = randn(2, 70)
    assert torch.equal(torch.func.functional_call(layer, source.state_dict(), (x,)), source(x))


def test_distributed_checkpoint_state(kind):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, model = nn.Sequential(kind.make()), nn.Sequential(kind.new(70, 33))
    set_model_state_dict(model, get_model_state_dict(source))
    assert same(model.state_dict(), source.state_dict())
