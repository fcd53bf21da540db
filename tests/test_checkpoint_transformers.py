"""Checkpoints of small Llamas of transformers, compressed and written by compressed-tensors itself."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import pyops
from pyops.checkpoints import CheckpointError, load_quantized_, save_quantized
from pyops.nn import Int4Linear, Int8Linear

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

IDS = torch.arange(24).view(2, 12) * 7 % 96
WEIGHTS = {"num_bits": 4, "type": "int", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES = {
    "group": {"weights": {**WEIGHTS, "symmetric": True, "strategy": "group", "group_size": 64}},
    "group asymmetric": {
        "weights": {**WEIGHTS, "symmetric": False, "strategy": "group", "group_size": 32, "actorder": "weight"}
    },
    "channel": {"weights": {**WEIGHTS, "symmetric": True, "strategy": "channel"}},
    "channel asymmetric": {"weights": {**WEIGHTS, "symmetric": False, "strategy": "channel"}},
    "tensor": {"weights": {**WEIGHTS, "symmetric": True, "strategy": "tensor"}},
    "w4a8": {
        "weights": {**WEIGHTS, "symmetric": True, "strategy": "group", "group_size": 64},
        "input_activations": TOKEN,
    },
    "w8a8": {
        "weights": {**WEIGHTS, "num_bits": 8, "symmetric": True, "strategy": "channel"},
        "input_activations": TOKEN,
    },
    "w8a8 tensor": {
        "weights": {**WEIGHTS, "num_bits": 8, "symmetric": True, "strategy": "tensor"},
        "input_activations": TOKEN,
    },
    "w8a8 static": {
        "weights": {**WEIGHTS, "num_bits": 8, "symmetric": True, "strategy": "channel"},
        "input_activations": {**TOKEN, "strategy": "tensor", "dynamic": False},
    },
    "w8a16": {"weights": {**WEIGHTS, "num_bits": 8, "symmetric": True, "strategy": "channel"}},
    "fp8": {
        "weights": {**WEIGHTS, "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        "input_activations": {**TOKEN, "type": "float"},
    },
    "fp8 block": {
        "weights": {
            **WEIGHTS,
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": [128, 128],
        },
        "input_activations": {**TOKEN, "type": "float", "strategy": "group", "group_size": 128},
    },
    "fp8 static": {
        "weights": {**WEIGHTS, "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
        "input_activations": {**TOKEN, "type": "float", "strategy": "tensor", "dynamic": False},
    },
}
FORMATS = {"w8a8": "int-quantized", "w8a8 tensor": "int-quantized", "w8a8 static": "int-quantized"}
FORMATS |= {name: "float-quantized" for name in SCHEMES if name.startswith("fp8")}
FORMATS["w4a8"] = "pack-quantized"  # it would choose int-quantized, a byte for four bits


def llama_config(tied=True):
    return transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=True,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes a checkpoint of one scheme once; (directory, the same model decompressed by the library)."""
    made = {}

    def write(scheme, tied=True, dtype=torch.float32):
        key = (scheme, tied, dtype)
        if key not in made:
            made[key] = _write(tmp_path_factory.mktemp("llama"), SCHEMES[scheme], FORMATS.get(scheme), tied, dtype)
        return made[key]

    return write


def _write(folder, scheme, layout, tied, dtype):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(tied)).to(dtype).eval()
    group = {"targets": ["Linear"], **copy.deepcopy(scheme), **({"format": layout} if layout else {})}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        args, weight = module.quantization_scheme.weights, module.weight.data
        scale, zero = calculate_qparams(*_ranges(weight, args), args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return folder, model


def _ranges(weight, args):
    if args.strategy == "group":
        each = weight.unflatten(1, (-1, args.group_size))
        return each.amin(2), each.amax(2)
    if args.strategy == "block":
        rows, columns = args.block_structure
        weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % rows))
        each = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return each.amin((1, 3)), each.amax((1, 3))
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return weight.amin().reshape(1), weight.amax().reshape(1)


def empty(tied=True):
    with pyops.empty_weights():
        return transformers.LlamaForCausalLM(llama_config(tied)).eval()


def layers_of(model):
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_equal_after_dequantization(scheme, dtype, checkpoint):
    """Bit by bit: into the float layers, where the library's own decompression gives the same."""
    folder, theirs = checkpoint(scheme, dtype=dtype)
    model = empty().to(dtype)
    report = load_quantized_(model, folder, filter_fn=lambda module, name: False)
    wanted = layers_of(theirs)
    assert len(wanted) == 14
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.weight, wanted[name].weight), name
    assert all("dequantized" in row.reason for row in report.rows if row.name.endswith("_proj"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "scheme", [name for name in SCHEMES if "fp8" not in name and name not in ("w8a16", "w8a8 static")]
)
def test_a_llama(scheme, tied, checkpoint):
    """The layers are ours, everything else is loaded, and it generates."""
    folder, theirs = checkpoint(scheme, tied)
    model = empty(tied)
    report = load_quantized_(model, folder)
    kind = Int8Linear if scheme.startswith("w8a8") else Int4Linear
    assert {type(layer) for layer in layers_of(model).values()} == {kind}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert report.totals()["swapped"] == 14
    if kind is Int4Linear:
        load_quantized_(exact := empty(tied), folder, compute="float")
        load_quantized_(floats := empty(tied), folder, filter_fn=lambda module, name: False)
        with torch.no_grad():
            torch.testing.assert_close(exact(IDS).logits, floats(IDS).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y = model(IDS).logits
        load_quantized_(floats := empty(tied), folder, filter_fn=lambda module, name: False)
        wanted = floats(IDS).logits
    assert (y - wanted).norm() < 0.05 * wanted.norm()
    tokens = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    ]
    assert tokens[0].shape == (2, 20)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "fp8" in name])
def test_a_llama_in_float8(scheme, checkpoint, tmp_path):
    folder, _ = checkpoint(scheme)
    load_quantized_(model := empty(), folder)
    assert {type(layer).__name__ for layer in layers_of(model).values()} == {"Fp8Linear"}
    assert {layer.input_scale is None for layer in layers_of(model).values()} == {scheme != "fp8 static"}
    load_quantized_(floats := empty(), folder, filter_fn=lambda module, name: False)
    with torch.no_grad():
        y, wanted = model(IDS).logits, floats(IDS).logits
    if scheme != "fp8 static":  # whose scale is made up
        assert (y - wanted).norm() < 0.1 * wanted.norm()
    for layout in ("pyops", "compressed-tensors"):
        save_quantized(model, tmp_path / layout, format=layout)
        load_quantized_(new := empty(), tmp_path / layout)
        state = model.state_dict()
        assert all(same_bits(t, state[key]) for key, t in new.state_dict().items())
        load_quantized_(again := empty(), tmp_path / layout, filter_fn=lambda module, name: False)
        state = floats.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in again.state_dict().items())


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("scheme", "mode"), [("w8a16", "weight_only"), ("w8a8 static", "static")])
def test_a_llama_with_other_activations(scheme, mode, checkpoint, tmp_path):
    folder, _ = checkpoint(scheme)
    report = load_quantized_(model := empty(), folder)
    assert {layer.mode for layer in layers_of(model).values()} == {mode}
    assert {row.choice for row in report.rows} == {f"int8_{mode.removesuffix('_only')}", "unchanged"}
    load_quantized_(floats := empty(), folder, filter_fn=lambda module, name: False)
    with torch.no_grad():
        y, wanted = model(IDS).logits, floats(IDS).logits
    if mode == "static":  # by a scale that is made up
        assert {layer.input_scale.item() for layer in layers_of(model).values()} == {torch.tensor(0.02).item()}
    else:
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    for layout in ("pyops", "compressed-tensors"):
        save_quantized(model, tmp_path / layout, format=layout)
        again = load_quantized_(new := empty(), tmp_path / layout)
        assert [row.choice for row in again.rows] == [row.choice for row in report.rows]
        state = model.state_dict()
        assert all(same_bits(t, state[key]) for key, t in new.state_dict().items())
        load_quantized_(kept := empty(), tmp_path / layout, filter_fn=lambda module, name: False)
        state = floats.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in kept.state_dict().items())


def gpt2():
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("layout", ["pyops", "compressed-tensors"])
@pytest.mark.parametrize("config", [pyops.Int4Weight(group_size=32), pyops.Int8Weight(), pyops.Fp8Dynamic()])
def test_conv1d(config, layout, tmp_path):
    """GPT-2's layers, whose float weights lie transposed."""
    torch.manual_seed(0)
    model = gpt2()
    w = model.transformer.h[0].mlp.c_fc.weight.detach()
    pyops.swap_(model, config, filter_fn=lambda module, name: name != "lm_head")
    save_quantized(model, tmp_path, format=layout)
    with pyops.empty_weights():
        new, kept = gpt2(), gpt2()
    report = load_quantized_(new, tmp_path)
    assert {row.kind: row.choice for row in report.rows} == {"Conv1D": config.choice, "Linear": "unchanged"}
    state = model.state_dict()
    assert all(same_bits(t, state[key]) for key, t in new.state_dict().items())
    with torch.no_grad():
        assert torch.equal(new(IDS).logits, model(IDS).logits)
    load_quantized_(kept, tmp_path, filter_fn=lambda module, name: False)
    layer = kept.transformer.h[0].mlp.c_fc
    assert type(layer) is transformers.pytorch_utils.Conv1D
    assert (layer.weight - w).norm() < 0.1 * w.norm()
    with pytest.raises(ValueError, match="itself a Conv1D"):
        load_quantized_(layer, tmp_path)


def test_conv1d_of_another_size(tmp_path):
    """Turned about, c_fc would fit c_proj: the sizes tell."""
    pyops.swap_(model := gpt2(), pyops.Int8Weight(), filter_fn=lambda module, name: name != "lm_head")
    save_quantized(model, tmp_path)
    new = gpt2()
    mlp = new.transformer.h[0].mlp
    mlp.c_fc, mlp.c_proj = mlp.c_proj, mlp.c_fc
    with pytest.raises(pyops.CheckpointError, match=r"c_fc\.weight.*\(256, 64\)"):
        load_quantized_(new, tmp_path)
    assert type(mlp.c_fc) is transformers.pytorch_utils.Conv1D


@pytest.mark.parametrize("scheme", ["group asymmetric", "w8a8"])
def test_saved_beside_the_config(scheme, checkpoint, tmp_path):
    """As `save_pretrained` does it: transformers reads the config back, and we the weights."""
    folder, _ = checkpoint(scheme)
    model = empty()
    load_quantized_(model, folder)
    save_quantized(model, tmp_path, max_shard_size="60KB")
    model.generation_config.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "pyops"
    with pyops.empty_weights():
        new = transformers.AutoModelForCausalLM.from_config(config).eval()
    load_quantized_(new, tmp_path)
    with torch.no_grad():
        assert torch.equal(new(IDS).logits, model(IDS).logits)
    state = model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in new.state_dict().items())


def test_transformers_reads_what_we_write_as_compressed_tensors(checkpoint, tmp_path):
    """Written by us, read and decompressed by from_pretrained: the same weights."""
    folder, theirs = checkpoint("group asymmetric")
    load_quantized_(model := empty(), folder)
    save_quantized(model, tmp_path, format="compressed-tensors")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
    )
    for name, layer in layers_of(theirs).items():
        assert torch.equal(read.get_submodule(name).weight, layer.weight), name


def test_the_wrong_llama(checkpoint):
    folder, _ = checkpoint("group")
    config = llama_config()
    config.num_hidden_layers, config.intermediate_size = 1, 384
    with pyops.empty_weights():
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(CheckpointError) as caught:
        load_quantized_(model, folder)
    text = "\n".join(caught.value.problems)
    assert "model.layers.1.self_attn.q_proj is quantized in the checkpoint; the model has no such layer" in text
    assert "model.layers.1.input_layernorm.weight is in the checkpoint; the model has no place for it" in text
    assert "model.layers.0.mlp.up_proj.weight_packed is (256, 16); a layer of N=384 and K=128 needs (384, 16)" in text
    assert all(p.is_meta for p in model.parameters())


def test_gptq_by_its_config_of_transformers(tmp_path):
    """What `GPTQConfig` and `AwqConfig` put into config.json is understood to the last field."""
    for config in (
        transformers.GPTQConfig(4, group_size=64, dataset="c4"),
        transformers.AwqConfig(4, group_size=64, modules_to_not_convert=["lm_head"]),
    ):
        told = json.loads(json.dumps(config.to_dict(), default=str))
        module = pyops.checkpoints.gptq if told["quant_method"] == "gptq" else pyops.checkpoints.awq
        scheme, problems = module.parse(told)
        assert problems == []
        assert scheme.of("up").group_size == 64
