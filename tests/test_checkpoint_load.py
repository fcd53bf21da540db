"""`pyops.load_quantized_`: what a model is afterwards, wherever it was made and wherever the tensors come from."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from checkpoint_cases import CHECKPOINTS, GPTQ, IDS, INT, SIZES, Net, gptq_state, int_state, others, unchanged
from safetensors.torch import save_file
from torch import nn

import pyops
from pyops.checkpoints import awq, compressed_tensors, gptq
from pyops.checkpoints.errors import Entry
from pyops.checkpoints.load import load_quantized_
from pyops.nn import Fp8Linear, Int4Linear, Int8Linear
from pyops.replacing import commit

pytestmark = pytest.mark.usefixtures("poison")
READERS = {"gptq": gptq, "awq": awq} | {kind: compressed_tensors for kind in CHECKPOINTS if kind not in ("gptq", "awq")}
LAYERS = {"int-quantized": (Int8Linear, "int8_dynamic"), "float-quantized": (Fp8Linear, "fp8_dynamic")}


def written(tmp_path, state, config, *, shards=1, where="config.json"):
    """A directory with this state, in so many files."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    keys = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors")
    else:
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {key: names[i % shards] for i, key in enumerate(keys)}  # the tensors of a layer are scattered
        for name in names:
            save_file({key: state[key] for key in keys if weight_map[key] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / where).write_text(json.dumps({"quantization_config": config} if where == "config.json" else config))
    return folder


def dequantized(kind, state, config):
    """{layer: its weight}, as the pure functions give it."""
    fmt = READERS[kind]
    scheme, _ = fmt.parse(config)
    weights = {}
    for name, locals_ in fmt.layers(state).items():
        entry = Entry(name, {local: state[f"{name}.{local}"] for local in locals_}, *SIZES[name])
        weights[name] = fmt.read(entry, scheme.of(name)).dequantize()
    return weights


def reference(kind, state, config, dtype=torch.float32):
    """The float model that the checkpoint means."""
    model = Net(dtype=dtype)
    model.load_state_dict(
        {
            **{key: t for key, t in state.items() if key in others()},
            **{f"{name}.weight": w for name, w in dequantized(kind, state, config).items()},
            "head.weight": state["embed.weight"],
        }
    )
    return model


@pytest.mark.parametrize("made", ["cpu", "meta"])
@pytest.mark.parametrize("given", ["state dict", "directory", "shards", "file"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_format(kind, given, made, tmp_path):
    make, config = CHECKPOINTS[kind]
    state = make()
    if made == "meta":
        with pyops.empty_weights():
            model = Net().eval()
        assert all(p.is_meta for p in model.parameters())
    else:
        model = Net().eval()
    if given == "state dict":
        report = load_quantized_(model, state, config=config)
    else:
        folder = written(tmp_path, state, config, shards=3 if given == "shards" else 1)
        source = folder / "model.safetensors" if given == "file" else folder
        report = load_quantized_(model, str(source) if given == "file" else source)
    expected = reference(kind, state, config).eval()
    layer, choice = LAYERS.get(kind, (Int4Linear, "int4_weight"))
    assert type(model.up) is type(model.down) is layer
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for key, t in others().items():
        assert torch.equal(model.state_dict()[key], t.to(model.state_dict()[key].dtype)), key
    assert model.embed.weight.dtype == model.up.bias.dtype == torch.float32
    assert [(row.name, row.choice) for row in report.rows] == [
        ("up", choice),
        ("down", choice),
        ("head", "unchanged"),
    ]
    assert report.rows[2].reason == "float in the checkpoint"
    assert all(row.bytes_after < row.bytes_before / 2.5 for row in report.rows[:2])
    assert not model.up.training
    y, wanted = model(IDS), expected(IDS)
    assert (y - wanted).norm() < 0.05 * wanted.norm()
    if layer is Int4Linear:
        for module in (model.up, model.down):
            module.compute = "float"
        torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_layers_hold_what_the_checkpoint_says(kind):
    """The weights of the modules, dequantized, bit by bit."""
    make, config = CHECKPOINTS[kind]
    state, model = make(), Net()
    load_quantized_(model, state, config=config)
    for name, wanted in dequantized(kind, state, config).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, Int4Linear):
            assert torch.equal(layer.weight.float() * layer.weight_scale[:, None], wanted)
            continue
        eye = torch.eye(layer.in_features)
        layer.compute = "float"
        got = layer(eye).T if layer.bias is None else (layer(eye) - layer.bias).T
        scale = layer.weight_scale
        assert scale.dtype == torch.float16
        if layer.bias is None:  # one product and zeros: exact
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json", "quant_config.json"])
def test_where_the_config_is(where, tmp_path):
    folder = written(tmp_path, gptq_state(), {k: v for k, v in GPTQ.items() if k != "quant_method"}, where=where)
    load_quantized_(model := Net(), folder)
    assert isinstance(model.up, Int4Linear)
    load_quantized_(Net(), folder, config={"quantization_config": GPTQ, "hidden_size": 64})


def test_hooks_training_and_parameters_are_kept():
    model, seen = Net(), []
    model.up.register_forward_hook(lambda module, args, y: seen.append(type(module)))
    model.up.bias.requires_grad_(False)
    model.down.eval()
    bias, embed, old = model.up.bias, model.embed.weight, model.up
    load_quantized_(model, gptq_state(), config=GPTQ)
    model(IDS)
    assert seen == [Int4Linear]
    assert model.up.bias is bias
    assert not bias.requires_grad
    assert model.embed.weight is embed
    assert embed.requires_grad
    assert (model.up.training, model.down.training) == (True, False)
    assert torch.equal(bias, others()["up.bias"].float())
    assert type(old) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_model_keeps_its_dtype(dtype):
    model = Net(dtype=dtype)
    load_quantized_(model, gptq_state(), config=GPTQ)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.up.weight_scale.dtype == torch.float16, "the checkpoint's"
    assert model(IDS).dtype == dtype


def test_filter_keeps_the_float_layer():
    state, model = gptq_state(), Net()
    weight = model.down.weight
    report = load_quantized_(model, state, config=GPTQ, filter_fn=lambda module, name: name != "down")
    assert type(model.up) is Int4Linear
    assert model.down.weight is weight
    assert torch.equal(weight, dequantized("gptq", state, GPTQ)["down"])
    assert [row.choice for row in report.rows] == ["int4_weight", "unchanged", "unchanged"]
    assert "filter_fn keeps the float layer: dequantized" in report.rows[1].reason


@pytest.mark.parametrize("compute", ["auto", "int8", "float"])
def test_compute(compute):
    model = Net()
    load_quantized_(model, gptq_state(), config=GPTQ, compute=compute)
    assert model.up.compute == model.down.compute == compute


def test_w4a8_computes_in_int8():
    make, config = CHECKPOINTS["pack-quantized"]
    groups = copy.deepcopy(config["config_groups"])
    groups["group_0"]["input_activations"] = INT["config_groups"]["group_0"]["input_activations"]
    load_quantized_(model := Net(), make(), config={**config, "config_groups": groups})
    assert model.up.compute == "int8"
    load_quantized_(model := Net(), make(), config={**config, "config_groups": groups}, compute="float")
    assert model.up.compute == "float"


def test_without_strict():
    state, model = gptq_state(), Net()
    state["stray"] = torch.ones(1)
    del state["norm.bias"]
    before = model.norm.bias.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_quantized_(model, state, config=GPTQ, strict=False)
    (text,) = [str(w.message) for w in caught if "strict=False" in str(w.message)]
    assert "stray is in the checkpoint; the model has no place for it" in text
    assert "norm.bias is missing in the checkpoint" in text
    assert torch.equal(model.norm.bias, before)
    assert torch.equal(model.norm.weight, state["norm.weight"].float())


def test_a_bias_of_zeros_where_the_layer_has_none():
    state, model = gptq_state(), Net()
    state["down.bias"] = torch.zeros(64)
    report = load_quantized_(model, state, config=GPTQ)
    assert model.down.bias is None
    assert "its bias in the checkpoint is zero" in report.rows[1].reason
    state["down.bias"][3] = 0.5
    with unchanged(model := Net()), pytest.raises(pyops.CheckpointError, match=r"down\.bias is in the checkpoint"):
        load_quantized_(model, state, config=GPTQ)


def test_buffers_that_old_versions_saved():
    state = gptq_state()
    state["layers.0.rotary_emb.inv_freq"] = torch.ones(4)
    load_quantized_(Net(), state, config=GPTQ)


def test_modules_that_load_in_their_own_way():
    """Batch norm reads old state dicts in a way of its own; its state is plain tensors all the same."""
    model, state = Net(), gptq_state()
    model.batch = nn.BatchNorm1d(3)
    values = {f"batch.{key}": t + 1 for key, t in model.batch.state_dict().items()}
    load_quantized_(model, {**state, **values}, config=GPTQ)
    assert all(torch.equal(t, values[f"batch.{key}"]) for key, t in model.batch.state_dict().items())


def test_modules_with_more_than_tensors():
    class Counting(nn.Module):
        def get_extra_state(self):
            return 3

    model = Net()
    model.counting = Counting()
    with unchanged(model), pytest.raises(pyops.CheckpointError, match="counting: the state of a Counting is no plain"):
        load_quantized_(model, gptq_state(), config=GPTQ)


def test_a_layer_under_two_names():
    model = Net()
    model.again = model.up
    state = gptq_state()
    report = load_quantized_(model, state, config=GPTQ)
    assert model.again is model.up
    assert type(model.up) is Int4Linear
    assert "the same layer as again" in report.rows[0].reason
    both = {**state, **{f"again.{key[3:]}": t for key, t in state.items() if key.startswith("up.")}}
    model = Net()
    model.again = model.up
    load_quantized_(model, both, config=GPTQ)
    both["again.scales"] = both["again.scales"] * 2
    model = Net()
    model.again = model.up
    with unchanged(model), pytest.raises(pyops.CheckpointError, match="up and again are one layer in the model"):
        load_quantized_(model, both, config=GPTQ)


def test_a_quantized_head_cuts_the_tie():
    state, model = int_state(), Net()
    state |= {"head.weight": state["up.weight"][:12, :64].contiguous(), "head.weight_scale": torch.ones(12, 1)}
    config = {**INT, "ignore": []}
    report = load_quantized_(model, state, config=config)
    assert type(model.head) is Int8Linear
    assert torch.equal(model.embed.weight, state["embed.weight"].float())
    assert "its weight was tied to embed.weight: the tie is cut" in report.rows[2].reason


def test_the_source_can_go_away(tmp_path):
    """Nothing of the model lies in the memory of the files."""
    folder = written(tmp_path, gptq_state(), GPTQ)
    model = Net()
    load_quantized_(model, folder)
    before = model(IDS)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert torch.equal(model(IDS), before)


def test_the_state_dict_is_not_kept():
    for kind, (make, config) in CHECKPOINTS.items():
        state = make()
        load_quantized_(model := Net(), state, config=config)
        before = model(IDS)
        for t in state.values():
            t.zero_()
        assert torch.equal(model(IDS), before), kind


def test_interrupted_while_it_is_put_into_place(monkeypatch):
    """Everything is undone, at whichever step it happens."""
    real, steps = commit, []

    def interrupted(*args):
        steps.append(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr("pyops.checkpoints.load.commit", interrupted)
    for model in (Net(), empty()):
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            load_quantized_(model, gptq_state(), config=GPTQ)
    assert len(steps) == 2


def empty():
    with pyops.empty_weights():
        return Net()


def test_empty_weights():
    model = empty()
    assert all(p.is_meta for p in model.parameters())
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.cache, torch.arange(4.0))
    assert not any(p.is_meta for p in Net().parameters())


def test_on_meta_altogether():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(pyops.CheckpointError, match=r"cache is on meta, and no checkpoint holds it.*empty_weights"):
        load_quantized_(model, gptq_state(), config=GPTQ)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"model": nn.Linear(3, 3)}, ValueError, "wrap it in torch.nn.Sequential"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a directory, a file or a state dict, got int"),
        ({"checkpoint": "no/such/place"}, FileNotFoundError, "no such directory or file: no/such/place"),
        ({"config": 3}, TypeError, "config must be a mapping"),
        ({"filter_fn": 3}, TypeError, "filter_fn must be callable"),
        ({"compute": "int3"}, ValueError, "compute='int3' is not one of auto, int8, float"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load_quantized_(**{"model": Net(), "checkpoint": gptq_state(), "config": GPTQ, **arguments})
