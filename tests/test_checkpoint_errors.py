"""Checkpoints that are wrong: all of it is told, by key, and the model is what it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checkpoint_cases import (
    AWQ,
    CHECKPOINTS,
    FLOAT,
    GPTQ,
    INT,
    PACKED,
    TOKEN,
    Net,
    awq_state,
    float_state,
    gptq_state,
    int_state,
    packed_state,
    unchanged,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint_load import empty, written
from torch import nn

import pyops
from pyops.checkpoints import CheckpointError, load_quantized_


def changed(state, key, change):
    """One tensor changed in place of a copy of it; None takes it out, and a tensor may be a new one."""
    if change is None:
        del state[key]
    elif isinstance(change, torch.Tensor):
        state[key] = change
    else:
        t = state[key].clone()
        made = change(t)
        state[key] = t if made is None else made


def put(index, value):
    return lambda t: t.__setitem__(index, value)


MALFORMED = {
    # name: (state, config, key, what is done to it, what the error says after the key)
    "gptq dtype": (gptq_state, GPTQ, "up.qweight", lambda t: t.long(), "has dtype torch.int64; allowed: torch.int32"),
    "gptq float": (gptq_state, GPTQ, "up.qzeros", lambda t: t.float(), "has dtype torch.float32"),
    "gptq int scales": (
        gptq_state,
        GPTQ,
        "up.scales",
        lambda t: t.int(),
        "has dtype torch.int32; allowed: torch.float",
    ),
    "gptq rows": (
        gptq_state,
        GPTQ,
        "down.qweight",
        lambda t: t[:-1],
        "is (11, 64); a layer of N=64 and K=96 needs (12, 64)",
    ),
    "gptq groups": (
        gptq_state,
        GPTQ,
        "down.scales",
        lambda t: t[:2],
        "is (2, 64); a layer of N=64 and K=96 needs (3, 64)",
    ),
    "gptq zeros": (gptq_state, GPTQ, "down.qzeros", lambda t: t.T, "is (8, 3); a layer of N=64 and K=96 needs (3, 8)"),
    "gptq nan": (gptq_state, GPTQ, "up.scales", put((1, 2), torch.nan), "holds NaN or Inf"),
    "gptq inf": (gptq_state, GPTQ, "up.scales", put((0, 0), torch.inf), "holds NaN or Inf"),
    "g_idx above": (gptq_state, GPTQ, "down.g_idx", put(5, 3), "holds 3; there are scales for the groups 0 to 2"),
    "g_idx below": (gptq_state, GPTQ, "down.g_idx", put(5, -1), "holds -1; there are scales for the groups 0 to 2"),
    "g_idx uneven": (gptq_state, GPTQ, "up.g_idx", put(0, 1), "gives group 0 31 columns instead of 32"),
    "g_idx short": (gptq_state, GPTQ, "up.g_idx", lambda t: t[:-1], "is (63,); a layer of N=96 and K=64 needs (64,)"),
    "gptq no scales": (gptq_state, GPTQ, "up.scales", None, "is missing"),
    "gptq no zeros": (gptq_state, GPTQ, "down.qzeros", None, "is missing"),
    "no bias": (gptq_state, GPTQ, "up.bias", None, "is missing in the checkpoint"),
    "no embedding": (gptq_state, GPTQ, "embed.weight", None, "(and head.weight, which is the same) is missing"),
    "embedding": (gptq_state, GPTQ, "embed.weight", lambda t: t[:5], "is (5, 64); the model has (12, 64)"),
    "norm": (gptq_state, GPTQ, "norm.weight", lambda t: t.int(), "has dtype torch.int32; the model has torch.float32"),
    "fp8 norm": (gptq_state, GPTQ, "norm.bias", lambda t: t.to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn"),
    "count": (gptq_state, GPTQ, "count", lambda t: t.float(), "has dtype torch.float32; the model has torch.int64"),
    "awq rows": (awq_state, AWQ, "up.qweight", lambda t: t[1:], "is (63, 12); a layer of N=96 and K=64 needs (64, 12)"),
    "awq groups": (awq_state, AWQ, "up.qzeros", lambda t: t[1:], "is (1, 12); a layer of N=96 and K=64 needs (2, 12)"),
    "awq nan": (awq_state, AWQ, "down.scales", put((1, 2), torch.nan), "holds NaN or Inf"),
    "awq dtype": (awq_state, AWQ, "down.qweight", lambda t: t.to(torch.int16), "has dtype torch.int16"),
    "packed width": (packed_state, PACKED, "up.weight_packed", lambda t: t[:, 1:], "is (96, 7)"),
    "packed shape": (
        packed_state,
        PACKED,
        "up.weight_shape",
        put(0, 97),
        "holds (97, 64); the layer of the model has (96, 64)",
    ),
    "packed no shape": (packed_state, PACKED, "up.weight_shape", None, "is missing"),
    "packed groups": (packed_state, PACKED, "up.weight_scale", lambda t: t[:, :1], "is (96, 1)"),
    "packed zeros": (packed_state, PACKED, "up.weight_zero_point", lambda t: t[1:], "is (11, 2)"),
    "packed zero range": (
        packed_state,
        PACKED,
        "up.weight_zero_point",
        torch.full((96, 2), 8, dtype=torch.int8),
        "holds 8; allowed: -8 to 7",
    ),
    "packed zeros of bytes": (packed_state, PACKED, "up.weight_zero_point", lambda t: t.to(torch.int8), "is (12, 2)"),
    "packed inf": (packed_state, PACKED, "down.weight_scale", put((1, 2), -torch.inf), "holds NaN or Inf"),
    "int8 dtype": (
        int_state,
        INT,
        "up.weight",
        lambda t: t.view(torch.uint8),
        "has dtype torch.uint8; allowed: torch.int8",
    ),
    "int8 shape": (int_state, INT, "up.weight", lambda t: t.T, "is (64, 96)"),
    "int8 scale": (int_state, INT, "up.weight_scale", lambda t: t[1:], "is (95, 1)"),
    "int8 nan": (int_state, INT, "up.weight_scale", put((1, 0), torch.nan), "holds NaN or Inf"),
    "fp8 dtype": (
        float_state,
        FLOAT,
        "up.weight",
        lambda t: t.float().to(torch.float8_e5m2),
        "has dtype torch.float8_e5m2; allowed: torch.float8_e4m3fn",
    ),
    "fp8 shape": (float_state, FLOAT, "up.weight", lambda t: t.T, "is (64, 96)"),
    "fp8 scale": (float_state, FLOAT, "up.weight_scale", lambda t: t[1:], "is (95, 1)"),
    "fp8 code": (
        float_state,
        FLOAT,
        "down.weight",
        lambda t: t.view(torch.uint8).fill_(0xFF).view(t.dtype),
        "holds NaN",
    ),
    "fp8 nan": (float_state, FLOAT, "up.weight_scale", put((1, 0), torch.nan), "holds NaN or Inf"),
    "fp8 input scale": (float_state, FLOAT, "up.input_scale", torch.ones(1), "comes with activations"),
}


@pytest.mark.parametrize("made", [Net, empty], ids=["cpu", "meta"])
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name, made):
    make, config, key, change, message = MALFORMED[name]
    state, model = make(), made()
    changed(state, key, change)
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state, config=config)
    assert any(problem.startswith(key) and message in problem for problem in caught.value.problems), str(caught.value)


ADDED = {
    "a layer that the model lacks": (
        gptq_state,
        GPTQ,
        "side",
        "side is quantized in the checkpoint; the model has no such",
    ),
    "a layer that is none": (
        gptq_state,
        GPTQ,
        "norm",
        "norm is quantized in the checkpoint; in the model it is a LayerNorm",
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_layers_that_do_not_fit(name):
    make, config, layer, message = ADDED[name]
    state, model = make(), Net()
    state |= {f"{layer}.{key[3:]}": t for key, t in state.items() if key.startswith("up.q")}
    state |= {f"{layer}.{local}": state[f"up.{local}"] for local in ("scales", "g_idx")}
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state, config=config)
    assert any(message in problem for problem in caught.value.problems)


def test_a_layer_with_a_forward_of_its_own():
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = Net()
    model.up = Other(64, 96)
    with unchanged(model), pytest.raises(CheckpointError, match=r"up is quantized .* Other has a forward of its own"):
        load_quantized_(model, gptq_state(), config=GPTQ)


def test_a_layer_that_is_pruned():
    model = Net()
    torch.nn.utils.prune.l1_unstructured(model.up, "weight", amount=0.5)
    with unchanged(model), pytest.raises(CheckpointError, match=r"up is quantized .* cannot be replaced: pruned"):
        load_quantized_(model, gptq_state(), config=GPTQ)


def test_a_model_that_is_swapped_already():
    model = Net()
    pyops.swap_(model, pyops.Int8Dynamic(), filter_fn=lambda module, name: name == "up")
    with unchanged(model), pytest.raises(CheckpointError, match=r"up is quantized .* it is a Int8Linear, no Linear"):
        load_quantized_(model, gptq_state(), config=GPTQ)


def test_tied_tensors_that_differ():
    state, model = gptq_state(), Net()
    state["head.weight"] = state["embed.weight"] + 1
    with (
        unchanged(model),
        pytest.raises(CheckpointError, match=r"embed\.weight and head\.weight are tied in the model"),
    ):
        load_quantized_(model, state, config=GPTQ)
    state["head.weight"] = state["embed.weight"].clone()
    load_quantized_(model, state, config=GPTQ)
    state["head.weight"] += 1
    load_quantized_(model := Net(tied=False), state, config=GPTQ)
    assert torch.equal(model.head.weight, state["head.weight"].float())


def test_everything_is_told_at_once():
    state, model = gptq_state(), Net()
    for key, change in (("up.scales", put(0, torch.nan)), ("up.qzeros", None), ("down.g_idx", put(0, 7))):
        changed(state, key, change)
    state |= {"stray": torch.ones(1), "other.qweight": torch.ones(1), "norm.weight": torch.ones(3)}
    del state["norm.bias"]
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state, config=GPTQ)
    keys = ("up.scales", "up.qzeros", "down.g_idx", "stray", "other", "norm.weight", "norm.bias")
    assert len(caught.value.problems) == len(keys)
    assert all(any(problem.startswith(key) for problem in caught.value.problems) for key in keys)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert "7 problems; nothing was changed" in str(caught.value)


def test_a_long_list_is_cut_in_the_text_only():
    state = gptq_state() | {f"stray{i}": torch.ones(1) for i in range(100)}
    with pytest.raises(CheckpointError) as caught:
        load_quantized_(Net(), state, config=GPTQ)
    assert len(caught.value.problems) == 100
    assert "and 60 more, in .problems" in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- configs


def weights(**changes):
    return group(weights={**PACKED["config_groups"]["group_0"]["weights"], **changes})


def group(**changes):
    return {**PACKED, "config_groups": {"group_0": {**PACKED["config_groups"]["group_0"], **changes}}}


def inputs(**changes):
    one = INT["config_groups"]["group_0"]
    return {**INT, "config_groups": {"group_0": {**one, "input_activations": {**TOKEN, **changes}}}}


CONFIGS = {
    "bits of gptq": (gptq_state, {**GPTQ, "bits": 3}, "gptq config: bits=3; allowed: 4, and 8"),
    "marlin": (
        gptq_state,
        {**GPTQ, "checkpoint_format": "marlin"},
        "checkpoint format 'marlin'; allowed: gptq, gptq_v2",
    ),
    "is_marlin_format": (gptq_state, {**GPTQ, "is_marlin_format": True}, "checkpoint format 'marlin'"),
    "planar": (gptq_state, {**GPTQ, "checkpoint_format": "gptq_p"}, "checkpoint format 'gptq_p'"),
    "words": (gptq_state, {**GPTQ, "pack_dtype": "int16"}, "pack_dtype='int16'; allowed: int32"),
    "group size": (gptq_state, {**GPTQ, "group_size": 48}, "group_size is 48; allowed: 32, a multiple of 64, or -1"),
    "no group size": (gptq_state, {**GPTQ, "group_size": "32"}, "group_size='32' is a str, not int"),
    "rotation": (gptq_state, {**GPTQ, "rotation": "hadamard"}, "field rotation='hadamard' is not understood"),
    "activation": (gptq_state, {**GPTQ, "activation": {"mode": "w4afp8"}}, "field activation="),
    "adapter": (gptq_state, {**GPTQ, "adapter": {"rank": 8}}, "field adapter="),
    "dynamic": (gptq_state, {**GPTQ, "dynamic": {"up": {"bits": 3}}}, "dynamic['up']: bits=3"),
    "dynamic regex": (gptq_state, {**GPTQ, "dynamic": {"-:[": {}}}, "dynamic['-:['] is no regular expression"),
    "excluded": (
        gptq_state,
        {**GPTQ, "dynamic": {"-:up": {}}},
        "up is quantized in the checkpoint, but not by the config",
    ),
    "bits of awq": (awq_state, {**AWQ, "bits": 8}, "awq config: bits=8; allowed: 4"),
    "gemv_fast": (awq_state, {**AWQ, "version": "gemv_fast"}, "awq config: version 'gemv_fast'; allowed: gemm, gemv"),
    "llm-awq": (awq_state, {**AWQ, "backend": "llm-awq"}, "awq config: version 'llm-awq'"),
    "wrong version": (
        awq_state,
        {**AWQ, "version": "gemv"},
        "up.qweight is (64, 12); a layer of N=96 and K=64 needs (96, 8)",
    ),
    "status": (packed_state, {**PACKED, "quantization_status": "frozen"}, "quantization_status='frozen'"),
    "kv cache": (packed_state, {**PACKED, "kv_cache_scheme": TOKEN}, "kv_cache_scheme: a quantized key-value cache"),
    "sparsity": (
        packed_state,
        {**PACKED, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config: format 'sparse-24-bitmask' is not understood",
    ),
    "transforms": (packed_state, {**PACKED, "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    "experts": (packed_state, {**PACKED, "moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config"),
    "new field": (packed_state, {**PACKED, "rounding": "up"}, "field rounding='up' is not understood"),
    "no groups": (packed_state, {**PACKED, "config_groups": {}}, "config_groups is missing or empty"),
    "a preset": (packed_state, {**PACKED, "config_groups": {"W4A16": ["Linear"]}}, "presets given by name"),
    "format": (packed_state, {**PACKED, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'; allowed"),
    "outputs": (packed_state, group(output_activations=TOKEN), "output_activations: quantized outputs"),
    "fp8 inputs": (
        packed_state,
        group(input_activations={**TOKEN, "type": "float"}),
        "with dynamic, symmetric float8 by token",
    ),
    "int4 inputs": (
        packed_state,
        group(input_activations={**TOKEN, "num_bits": 4}),
        "symmetric int4 by token activations",
    ),
    "bits": (packed_state, weights(num_bits=3), "weights of 3 bits, type int; allowed in pack-quantized"),
    "groups of 8 bits": (packed_state, weights(num_bits=8), "8-bit weights by 'group'; allowed: channel, tensor"),
    "strategy": (packed_state, weights(strategy="block", block_structure=[2, 2]), "weights by 'block'"),
    "actorder": (packed_state, weights(actorder="sideways"), "actorder='sideways'; allowed: none, weight"),
    "no g_idx": (packed_state, weights(actorder="group"), "up.weight_g_idx is missing"),
    "argument": (packed_state, weights(log_scale=True), "field log_scale=True is not understood"),
    "dynamic weights": (packed_state, weights(dynamic=True), "quantized dynamically"),
    "symmetric": (
        packed_state,
        weights(symmetric=True),
        "up.weight_zero_point is not 0, though the config says symmetric",
    ),
    "ignored": (
        packed_state,
        {**PACKED, "ignore": ["re:up.*"]},
        "up is quantized in the checkpoint, but not by the config",
    ),
    "not ignored": (
        packed_state,
        {**PACKED, "ignore": []},
        "head has no weight_scale, though the config says pack-quantized",
    ),
    "bad pattern": (packed_state, {**PACKED, "ignore": ["re:["]}, "'re:[' is no regular expression"),
    "asymmetric": (int_state, inputs(symmetric=False), "with dynamic, asymmetric int8 by token activations"),
    "tensor": (int_state, inputs(strategy="tensor"), "with dynamic, symmetric int8 by tensor activations"),
    "static": (int_state, inputs(strategy="tensor", dynamic=False), "up.input_scale is missing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name):
    make, config, message = CONFIGS[name]
    state, model = make(), Net(tied=name != "not ignored")
    if name == "not ignored":
        state["head.weight"] = torch.ones(12, 64)
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state, config=config)
    assert any(message in problem for problem in caught.value.problems), str(caught.value)


def test_static_input_scales():
    state = int_state() | {f"{name}.input_scale": torch.tensor([0.02]) for name in ("up", "down")}
    with pytest.raises(CheckpointError, match=r"up\.input_scale comes with activations that the config calls dynamic"):
        load_quantized_(Net(), state, config=INT)
    for value, message in ((0.0, "is 0.0, not above 0"), (torch.nan, "holds NaN or Inf")):
        state["up.input_scale"] = torch.tensor([value])
        with pytest.raises(CheckpointError, match=f"up.input_scale {message}"):
            load_quantized_(Net(), state, config=inputs(strategy="tensor", dynamic=False))


def test_harmless_fields():
    config = {**copy.deepcopy(PACKED), "version": "0.20", "global_compression_ratio": 1.5, "sparsity_config": {}}
    config["transform_config"] = {}
    config["config_groups"]["group_0"]["weights"] |= {
        "observer": "mse",
        "observer_kwargs": {"a": 1},
        "actorder": "weight",
    }
    load_quantized_(Net(), packed_state(), config=config)
    config = {
        **GPTQ,
        "damp_percent": 0.01,
        "static_groups": True,
        "true_sequential": True,
        "meta": {"mse": 2.4},
        "x": None,
    }
    load_quantized_(Net(), gptq_state(), config=config)


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (gptq_state, None, "the keys look like gptq, but there is no quantization config"),
        (awq_state, None, "the keys look like awq, but there is no quantization config"),
        (packed_state, None, "the keys look like compressed-tensors, but there is no quantization config"),
        (lambda: {"a": torch.ones(1)}, None, "no quantization config was found, and the keys look like none of"),
        (gptq_state, {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'; understood: pyops, gptq, awq"),
        (gptq_state, PACKED, "no layer is quantized as compressed-tensors, which its config says"),
        (lambda: {"a": [1.0]}, GPTQ, "a is a list, not a tensor"),
        (lambda: {3: torch.ones(1)}, GPTQ, "key 3 is no string"),
        (lambda: {"a": torch.ones(1, device="meta")}, GPTQ, "a is on meta and has no values"),
    ],
)
def test_what_it_is(state, config, message):
    with unchanged(model := Net()), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, state(), config=config)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- files


def rewrite(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


INDEX = "model.safetensors.index.json"
FILES = {
    "truncated": (
        lambda d: cut(d / "model-00002-of-00003.safetensors", -1),
        "model-00002-of-00003.safetensors is truncated",
    ),
    "cut in the header": (
        lambda d: cut(d / "model-00001-of-00003.safetensors", 20),
        "model-00001-of-00003.safetensors is tr",
    ),
    "empty file": (
        lambda d: cut(d / "model-00003-of-00003.safetensors", 0),
        "model-00003-of-00003.safetensors is truncated",
    ),
    "missing shard": (
        lambda d: (d / "model-00003-of-00003.safetensors").unlink(),
        "model-00003-of-00003.safetensors is missing",
    ),
    "no index": (lambda d: (d / INDEX).unlink(), "3 safetensors files without model.safetensors.index.json"),
    "outside": (
        lambda d: rewrite(d / INDEX, lambda i: i["weight_map"].update(x="../model.safetensors")),
        "names '../model.safetensors', which is no file of this directory",
    ),
    "promised": (
        lambda d: rewrite(d / INDEX, lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")),
        "has x in model-00001-of-00003.safetensors, which does not hold it",
    ),
    "no map": (lambda d: rewrite(d / INDEX, lambda i: i.pop("weight_map")), "has no weight_map"),
    "both": (lambda d: save_file({"a": torch.ones(1)}, d / "model.safetensors"), "which one counts?"),
    "config": (lambda d: (d / "config.json").write_text("{"), "config.json is no JSON"),
    "config of a list": (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list, not an object"),
}


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size if size < 0 else size)


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    folder = written(tmp_path, gptq_state(), GPTQ, shards=3)
    change, message = FILES[name]
    change(folder)
    with unchanged(model := Net()), pytest.raises(CheckpointError) as caught:
        load_quantized_(model, folder)
    assert message in str(caught.value)


def test_the_same_key_in_two_files(tmp_path):
    folder = written(tmp_path, gptq_state(), GPTQ, shards=2)
    save_file({**gptq_state()}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"is in model-00001-of-00002\.safetensors and in model-00002"):
        load_quantized_(Net(), folder)


def test_pickles_are_not_read(tmp_path):
    torch.save(gptq_state(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickles are not read"):
        load_quantized_(Net(), tmp_path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_any_tensor_replaced_by_any_other(data):
    """Whatever stands in the place of a tensor: the model is loaded as a whole, or not touched and the key is told."""
    make, config = CHECKPOINTS[data.draw(st.sampled_from(sorted(CHECKPOINTS)))]
    state, model = make(), Net()
    key = data.draw(st.sampled_from(sorted(state)))
    dtypes = [torch.float32, torch.float16, torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.bool]
    own = tuple(state[key].shape)
    near = [(*own[:i], n + step, *own[i + 1 :]) for i, n in enumerate(own) for step in (-1, 1)]
    siblings = [tuple(t.shape) for name, t in state.items() if name.split(".")[0] == key.split(".")[0]]
    shapes = [own, own, own[::-1], *near, *siblings, (), (1,), (0,), (2, 3, 4)]
    shape = data.draw(st.sampled_from(shapes))
    value = data.draw(st.sampled_from([0, 1, -1, 100, float("nan")]))
    state[key] = torch.full(shape, value, dtype=torch.float32).to(data.draw(st.sampled_from(dtypes)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        load_quantized_(model, state, config=config)
    except CheckpointError as error:
        assert any(key.rpartition(".")[0] in problem for problem in error.problems)  # noqa: PT017
        assert type(model.up) is nn.Linear
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    else:
        assert type(model.up) is not nn.Linear
        assert type(model.down) is not nn.Linear


def places(value, at=()):
    """The path of everything in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*at, key)
        yield from places(one, (*at, key))


FULL = {
    "gptq": {
        **GPTQ,
        "dynamic": {"-:head": {}, "+:up": {"bits": 4}},
        "meta": {"quantizer": ["gptqmodel:7"]},
        "pack_dtype": "int32",
    },
    "awq": {**AWQ, "modules_to_not_convert": ["head"], "backend": "autoawq"},
    "pack-quantized": {**weights(actorder="weight"), "kv_cache_scheme": None, "sparsity_config": {"format": "dense"}},
    "int-quantized": {**INT, "transform_config": {}},
    "float-quantized": {**FLOAT, "transform_config": {}},
}

JUNK = [None, True, False, 0, -1, 3, 4, 8, 1.5, 2**70, "", "4", "re:(", "gptq"]
JUNK += [[], [3], {}, {"a": 1}, {"a": {}}, [[]], ["re:("]]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_any_value_of_a_config_replaced_by_any_other(data):
    """Whatever stands in a config: the checkpoint is loaded, or refused as one that is wrong."""
    kind = data.draw(st.sampled_from(sorted(CHECKPOINTS)))
    config, model = copy.deepcopy(FULL[kind]), Net()
    *path, last = data.draw(st.sampled_from(sorted(places(config), key=str)))
    parent = config
    for key in path:
        parent = parent[key]
    parent[last] = data.draw(st.sampled_from(JUNK))
    try:
        load_quantized_(model, CHECKPOINTS[kind][0](), config=config)
    except CheckpointError:
        assert type(model.up) is nn.Linear
