"""`pyops.nn.Int8Linear` and checkpoints: what is saved, what is loaded, what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import safetensors.torch
import torch
from cases import randn
from test_linear_module import held_form_is_right, make, same
from torch import nn

from pyops import ops
from pyops.nn import Int8Linear

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_canonical_and_round_trips(bias, tmp_path):
    layer = make(bias=bias)
    state = layer.state_dict()
    kinds = {key: (tuple(t.shape), t.dtype) for key, t in state.items()}
    expected = {"weight": ((33, 70), torch.int8), "weight_scale": ((33,), torch.float32)}
    assert kinds == expected | ({"bias": ((33,), torch.float32)} if bias else {})
    safetensors.torch.save_file(state, tmp_path / "layer.safetensors")
    new = Int8Linear(70, 33, bias)
    new.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    held_form_is_right(new)
    assert same(new.state_dict(), state)
    assert torch.equal(new(randn(3, 70)), layer(randn(3, 70)))


def test_load_keeps_the_memory():
    layer = make()
    held = {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}
    layer.load_state_dict(Int8Linear(70, 33).state_dict())
    assert held == {name: t.data_ptr() for name, t in (*layer.named_buffers(), *layer.named_parameters())}


def test_weights_only_file_and_prefix():
    model = nn.Sequential(nn.ReLU(), make())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == ["1.weight", "1.bias", "1.weight_scale"]
    new = nn.Sequential(nn.ReLU(), Int8Linear(70, 33))
    new.load_state_dict(state)
    assert same(new.state_dict(), model.state_dict())


def _state(**changes):
    state = dict(make().state_dict())
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


NAN = torch.full((33,), torch.nan)
BAD_STATES = {
    "no weight": ({"weight": None}, r'Missing key\(s\).*"0\.weight"'),
    "no scale": ({"weight_scale": None}, r'Missing key\(s\).*"0\.weight_scale"'),
    "no bias": ({"bias": None}, r'Missing key\(s\).*"0\.bias"'),
    "nothing": ({"weight": None, "weight_scale": None, "bias": None}, r'"0\.weight".*"0\.bias".*"0\.weight_scale"'),
    "one too many": ({"scale": NAN}, r'Unexpected key\(s\).*"0\.scale"'),
    "a child's": ({"child.weight": NAN}, r'Unexpected key\(s\).*"0\.child\.weight"'),
    "misspelt": ({"weight": None, "weigth": NAN}, r'(?s)Missing.*"0\.weight".*Unexpected.*"0\.weigth"'),
    "float weight": (
        {"weight": torch.ones(33, 70)},
        r"0\.weight has dtype torch\.float32, expected torch\.int8.*float layer",
    ),
    "uint8 weight": ({"weight": torch.ones(33, 70, dtype=torch.uint8)}, r"0\.weight has dtype torch\.uint8"),
    "transposed": (
        {"weight": torch.ones(70, 33, dtype=torch.int8)},
        r"size mismatch for 0\.weight: got \(70, 33\).*\(33, 70\)",
    ),
    "packed": ({"weight": ops.pack_int8(torch.ones(33, 70, dtype=torch.int8))}, r"size mismatch for 0\.weight"),
    "half scale": ({"weight_scale": torch.ones(33).half()}, r"0\.weight_scale has dtype torch\.float16"),
    "short scale": ({"weight_scale": torch.ones(32)}, r"size mismatch for 0\.weight_scale"),
    "scale of NaN": ({"weight_scale": NAN}, r"0\.weight_scale holds NaN or Inf"),
    "scale of Inf": ({"weight_scale": NAN.fill_(torch.nan) + torch.inf}, r"0\.weight_scale holds NaN or Inf"),
    "short bias": ({"bias": torch.ones(1)}, r"size mismatch for 0\.bias"),
    "int bias": ({"bias": torch.ones(33, dtype=torch.int32)}, r"0\.bias has dtype torch\.int32"),
    "not a tensor": ({"weight_scale": [1.0] * 33}, r"0\.weight_scale must be a tensor, got list"),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state_dict_is_refused_whole(name, assign):
    changes, message = BAD_STATES[name]
    model = nn.Sequential(Int8Linear(70, 33))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({"0." + key: value for key, value in _state(**changes).items()}, assign=assign)
    if name not in ("no bias", "one too many", "a child's"):  # torch loads what is right beside them, and so do we
        assert same(model.state_dict(), before)


def test_several_errors_are_all_told():
    state = _state(weight=torch.ones(1), weight_scale=NAN, bias=torch.ones(1))
    with pytest.raises(RuntimeError) as caught:
        make().load_state_dict(state)
    assert all(text in str(caught.value) for text in ("weight has dtype", "weight_scale holds", "mismatch for bias"))


def test_load_without_strict():
    layer, source = Int8Linear(70, 33), make()
    before = layer.state_dict()
    result = layer.load_state_dict({"other": NAN}, strict=False)
    assert set(result.missing_keys) == {"weight", "bias", "weight_scale"}
    assert result.unexpected_keys == ["other"]
    assert same(layer.state_dict(), before)
    state = source.state_dict()
    layer.load_state_dict(
        {"weight": state["weight"], "weight_scale": state["weight_scale"], "other": NAN}, strict=False
    )
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer.bias, before["bias"])
    with pytest.raises(RuntimeError, match="weight comes without weight_scale"):
        layer.load_state_dict({"weight": state["weight"]}, strict=False)
    with pytest.raises(RuntimeError, match="weight has dtype"):
        layer.load_state_dict({"weight": torch.ones(33, 70)}, strict=False)


def test_load_hooks_may_rename():
    layer, source = Int8Linear(70, 33), make()

    def rename(module, state_dict, prefix, *rest):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "qweight")

    layer.register_load_state_dict_pre_hook(rename)
    state = source.state_dict()
    state["qweight"] = state.pop("weight")
    for _ in range(2):
        layer.load_state_dict(state)
        assert same(layer.state_dict(), source.state_dict())


def test_weight_can_be_set():
    layer, source = Int8Linear(70, 33), make()
    layer.weight = source.weight
    held_form_is_right(layer)
    assert torch.equal(layer.weight, source.weight)
    with pytest.raises(ValueError, match=r"weight has dtype torch\.float32"):
        layer.weight = torch.ones(33, 70)
    x = randn(2, 70)
    assert torch.equal(torch.func.functional_call(layer, source.state_dict(), (x,)), source(x))


def test_distributed_checkpoint_state():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, model = nn.Sequential(make()), nn.Sequential(Int8Linear(70, 33))
    set_model_state_dict(model, get_model_state_dict(source))
    assert same(model.state_dict(), source.state_dict())
