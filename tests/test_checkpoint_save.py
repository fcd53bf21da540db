"""`pyops.save_quantized`: written and read again, exactly, by us and by compressed-tensors."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import GPTQ, IDS, Net, gptq_state, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_checkpoint_errors import JUNK, places
from torch import nn

import pyops
from pyops.checkpoints import CheckpointError, load_quantized_, save_quantized
from pyops.nn import Int4Linear, Int8Linear

pytestmark = pytest.mark.usefixtures("poison")


V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}


def swapped(tied=True, *, head=False, **options):
    """A model with an int4 layer and an int8 one."""
    torch.manual_seed(0)
    model = Net(tied).eval()
    model.up = Int4Linear.from_float(model.up, **{"group_size": 32, **options})
    model.down = Int8Linear.from_float(model.down)
    if head:
        model.head = Int8Linear.from_float(model.head)
    return model


def empty(**options):
    with pyops.empty_weights():
        return Net(**options).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("size", ["5GB", 9000], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "group_size": -1},
        {"scale_dtype": torch.float16, "compute": "float"},
        {"group_size": 64, "scale_dtype": torch.float32},
    ],
    ids=str,
)
def test_round_trip(options, tied, size, tmp_path):
    model = swapped(tied, **options)
    save_quantized(model, tmp_path / "deep" / "er", max_shard_size=size)
    folder = tmp_path / "deep" / "er"
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == 9000)
    new = empty(tied=tied)
    report = load_quantized_(new, folder)
    assert same(new.state_dict(), model.state_dict())
    assert repr(new) == repr(model)
    assert torch.equal(new(IDS), model(IDS))
    assert (new.head.weight is new.embed.weight) == tied
    assert [(row.name, row.choice) for row in report.rows] == [
        ("up", "int4_weight"),
        ("down", "int8_dynamic"),
        ("head", "unchanged"),
    ]
    again = Net(tied).eval()  # made with values
    load_quantized_(again, folder)
    assert same(again.state_dict(), model.state_dict())


def test_act_order_round_trip(tmp_path):
    model = Net()
    load_quantized_(model, gptq_state(), config=GPTQ)
    assert model.down.act_order
    save_quantized(model, tmp_path)
    load_quantized_(new := Net(), tmp_path)
    assert same(new.state_dict(), model.state_dict())
    assert torch.equal(new(IDS), model(IDS))
    kept = Net()
    load_quantized_(kept, tmp_path, filter_fn=lambda module, name: False)
    direct = Net()
    load_quantized_(direct, gptq_state(), config=GPTQ, filter_fn=lambda module, name: False)
    assert same(kept.state_dict(), direct.state_dict()), "dequantized from either"


def test_files(tmp_path):
    model = swapped()
    save_quantized(model, tmp_path, max_shard_size=9000, config={"hidden_size": 64, "quantization_config": {"old": 1}})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted({*index["weight_map"].values(), "config.json", "model.safetensors.index.json"})
    assert names[1].startswith("model-00001-of-0000")
    held = {}
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            assert all(index["weight_map"][key] == name for key in file.keys())  # noqa: SIM118
    assert held.keys() == index["weight_map"].keys() == model.state_dict().keys() - {"head.weight"}
    total = sum(t.numel() * t.element_size() for t in held.values())
    assert index["metadata"] == {"total_size": total}
    assert same(held, {key: model.state_dict()[key] for key in held})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["quantization_config"] == {
        "quant_method": "pyops",
        "version": 1,
        "layers": {
            "up": {"layer": "Int4Linear", "group_size": 32, "symmetric": False},
            "down": {"layer": "Int8Linear"},
        },
    }
    assert not [name for name in names if "part" in name]


def test_a_config_that_is_there_is_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    save_quantized(swapped(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64


def test_a_shared_layer_is_written_once(tmp_path):
    model = swapped()
    model.again = model.up
    save_quantized(model, tmp_path)
    new = Net()
    new.again = new.up
    load_quantized_(new, tmp_path)
    assert new.again is new.up
    assert same(new.state_dict(), model.state_dict())


def test_views_of_one_memory(tmp_path):
    model = swapped()
    both = torch.randn(2, 96)
    model.norm.weight.data, model.norm.bias.data = both[0], both[1]
    save_quantized(model, tmp_path)
    load_quantized_(new := Net(), tmp_path)
    assert same(new.state_dict(), model.state_dict())


BAD_CONFIGS = {
    "version": (lambda c: c.update(version=2), "pyops config: version=2; understood: 1"),
    "no layers": (lambda c: c.pop("layers"), "layers is missing"),
    "no class": (lambda c: c["layers"].update(up={}), "layers['up'] does not name its layer"),
    "class": (lambda c: c["layers"]["up"].update(layer="Int3Linear"), "there is no layer 'Int3Linear'"),
    "no layer of ours": (lambda c: c["layers"]["up"].update(layer="SparseConv2d"), "there is no layer 'SparseConv2d'"),
    "option": (lambda c: c["layers"]["up"].update(bits=4), "Int4Linear has no option bits"),
    "size": (lambda c: c["layers"]["up"].update(in_features=4), "Int4Linear has no option in_features"),
    "value": (lambda c: c["layers"]["up"].update(group_size=48), "layers['up']: group_size is 48"),
    "another group": (lambda c: c["layers"]["up"].update(group_size=64), "size mismatch for up.weight_scale"),
    "symmetric": (lambda c: c["layers"]["up"].update(symmetric=True), "up.weight_zero is not understood"),
    "field": (lambda c: c.update(more=1), "field more=1 is not understood"),
    "another layer": (
        lambda c: c["layers"].update(side={"layer": "Int8Linear"}),
        "side is quantized in the checkpoint",
    ),
    "left out": (lambda c: c["layers"].pop("up"), "up.weight is (96, 32); the model has (96, 64)"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name, tmp_path):
    save_quantized(swapped(), tmp_path)
    change, message = BAD_CONFIGS[name]
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with unchanged(model := Net()), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, tmp_path)
    assert any(message in problem for problem in caught.value.problems), str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_value_of_a_config_replaced_by_any_other(data):
    model, new = swapped(), Net()
    layers = {name: {"layer": type(m).__name__, **m._options()} for name, m in (("up", model.up), ("down", model.down))}
    config = {"quant_method": "pyops", "version": 1, "layers": layers}
    *path, last = data.draw(st.sampled_from(sorted(places(config), key=str)))
    parent = config
    for key in path:
        parent = parent[key]
    parent[last] = data.draw(st.sampled_from(JUNK))
    state = {key: t for key, t in model.state_dict().items() if key != "head.weight"}
    try:
        load_quantized_(new, state, config=config)
    except CheckpointError:
        assert type(new.up) is type(new.down) is nn.Linear
    else:
        assert same(new.state_dict(), model.state_dict())


BAD_TENSORS = {
    "up.weight": (lambda t: t[:, 1:], "size mismatch for up.weight"),
    "up.weight_scale": (lambda t: t * torch.nan, "up.weight_scale holds NaN or Inf"),
    "up.weight_zero": (lambda t: t + 17, "up.weight_zero holds"),
    "down.weight": (lambda t: t.view(torch.uint8), "down.weight has dtype torch.uint8"),
    "down.weight_scale": (None, "down.weight_scale is missing"),
}


@pytest.mark.parametrize("key", BAD_TENSORS)
def test_bad_tensors(key, tmp_path):
    save_quantized(swapped(), tmp_path)
    change, message = BAD_TENSORS[key]
    state = {k: t for k, t in swapped().state_dict().items() if k != "head.weight"}
    t = state.pop(key)
    state |= {} if change is None else {key: change(t)}
    config = json.loads((tmp_path / "config.json").read_text())
    with unchanged(model := Net()), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state, config=config)
    assert any(message in problem for problem in caught.value.problems), str(caught.value)


def fused():
    model = nn.Sequential(Int8Linear(4, 4, activation="relu"))
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (lambda: 3, {}, TypeError, "model must be a torch.nn.Module, got int"),
        (Net, {}, ValueError, "model has no quantized layer"),
        (fused, {}, ValueError, "0 was fused with the relu after it: save before that is done"),
        (swapped, {"format": "gguf"}, ValueError, "format='gguf' is not one of pyops, compressed-tensors"),
        (swapped, {"max_shard_size": "5 apples"}, ValueError, "max_shard_size must be a positive number"),
        (swapped, {"max_shard_size": 0}, ValueError, "max_shard_size must be a positive number"),
        (lambda: swapped().to("meta"), {}, ValueError, "on meta and has no values"),
    ],
)
def test_nothing_is_written(model, arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save_quantized(model(), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
    save_quantized(swapped(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds model\.safetensors already"):
        save_quantized(swapped(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"group_size": -1}, {"group_size": 64}, {"compute": "int8"}], ids=str
)
def test_as_compressed_tensors(options, tmp_path):
    """Read again by us, every integer and scale is the same; by compressed-tensors, every weight."""
    model = swapped(**options)
    save_quantized(model, tmp_path, format="compressed-tensors")
    load_quantized_(new := Net().eval(), tmp_path)
    assert same(new.state_dict(), model.state_dict())
    assert torch.equal(new(IDS), model(IDS))
    assert new.up.compute == model.up.compute

    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    told = QuantizationConfig.model_validate(config)
    assert ct.__version__
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    load_quantized_(floats := Net(), tmp_path, filter_fn=lambda module, name: False)
    for scheme in told.config_groups.values():
        (name,) = scheme.targets
        own = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.weight")}
        found = BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
        wanted = floats.get_submodule(name).weight
        assert torch.equal(found, wanted.to(found.dtype)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: load_quantized_(m, gptq_state(), config=V2), "down has columns in act-order"),
        (lambda m: setattr(m, "up", Int4Linear(65, 96, group_size=32)), "up has in_features 65 and group_size 32"),
        (lambda m: setattr(m, "up", sixteen()), "up has a zero point of 16; compressed-tensors stores 0 to 15"),
    ],
    ids=["act-order", "short group", "z = 16"],
)
def test_what_compressed_tensors_cannot_express(change, message, tmp_path):
    change(model := Net())
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "new", format="compressed-tensors")
    assert not (tmp_path / "new").exists()


def sixteen():
    layer = Int4Linear(64, 96, group_size=32)
    layer.weight_zero = torch.full_like(layer.weight_zero, 16)
    return layer
