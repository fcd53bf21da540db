"""Models of Hugging Face transformers, small ones with random weights, with their layers swapped."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import pyops
from pyops.bench.report import sqnr_db
from pyops.nn import Int4Linear
from pyops.nn.linear import QuantLinear
from pyops.ops.int4_weight import dequantize_int4
from pyops.reads import reads_weight

transformers = pytest.importorskip("transformers")
pyops_transformers = pytest.importorskip("pyops.transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 61
CONFIGS = {
    "int8": pyops.Int8Dynamic(),
    "int8_weight": pyops.Int8Weight(),
    "int4": pyops.Int4Weight(group_size=32),
    "int4_float": pyops.Int4Weight(group_size=-1, symmetric=True, compute="float"),
    "fp8": pyops.Fp8Dynamic(),
}
LEAST_SQNR_DB = {"int8": 30.0, "int8_weight": 32.0, "int4": 13.0, "int4_float": 10.0, "fp8": 20.0}
IDS = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, vocab_size=VOCABULARY))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8))


def gpt2() -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, **ends)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=64, d_ff=96, d_kv=16, num_heads=4, num_layers=1, vocab_size=VOCABULARY)
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> nn.Module:
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=8)
    return transformers.MambaForCausalLM(config)


def bart() -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(d_model=64, vocab_size=VOCABULARY, **sides, **heads)
    return transformers.BartForConditionalGeneration(config)


TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], set[str]]] = {
    # How it is made, an input, and the layers that stay because their parent reads the weight.
    "llama": (llama, TEXT, set()),
    "bert": (bert, TEXT, set()),
    "vit": (vit, IMAGES, set()),
    "gpt2": (gpt2, TEXT, set()),
    "bart": (bart, BOTH, set()),
    "t5": (t5, BOTH, {f"{side}.DenseReluDense.wo" for side in ("encoder.block.0.layer.1", "decoder.block.0.layer.2")}),
    "mamba": (mamba, TEXT, {*(f"backbone.layers.0.mixer.{n}_proj" for n in ("x", "dt", "out")), "lm_head"}),
}


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    make, inputs, _ = MODELS[name]
    return make().eval(), inputs


def no_head(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


def head(module: nn.Module) -> torch.Tensor:
    """The first tensor of what a model returned."""
    return module[0].detach()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model(name: str, config: str) -> None:
    model, inputs = made(name)
    want, footprint = head(model(**inputs)), model.get_memory_footprint()
    report = pyops.swap_(model, CONFIGS[config])
    stays = MODELS[name][2]
    assert {row.name for row in report.rows if not row.swapped} == stays
    assert all("reads its weight" in row.reason for row in report.rows if row.name in stays)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == sum(row.swapped for row in report.rows)
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    assert {name for name, module in model.named_modules() if isinstance(module, linear)} == stays
    got = head(model(**inputs))
    assert sqnr_db(got.numpy(), want.numpy()) >= LEAST_SQNR_DB[config]
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.get_memory_footprint() < footprint


@pytest.mark.parametrize("config", CONFIGS)
def test_a_conv1d_is_the_linear_layer_that_it_computes(config: str) -> None:
    """Its weight lies transposed; its bias stays the same parameter."""
    model, _ = made("gpt2")
    conv = model.transformer.h[0].mlp.c_fc
    linear = nn.Linear(64, 256)
    linear.load_state_dict({"weight": conv.weight.T.contiguous(), "bias": conv.bias})
    pyops.swap_(nn.Sequential(model), CONFIGS[config])
    new = model.transformer.h[0].mlp.c_fc
    assert new.bias is conv.bias
    want = CONFIGS[config].convert(linear).state_dict()
    assert all(torch.equal(t, want[key]) for key, t in new.state_dict().items())
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        pyops.swap_(conv, CONFIGS[config])


def test_rows_tell_of_a_conv1d() -> None:
    model, inputs = made("gpt2")
    report = pyops.swap_(model, pyops.Int8Dynamic(), example_inputs=inputs, progress=False)
    rows = {row.name: row for row in report.rows}
    assert rows["transformer.h.0.mlp.c_fc"].kind == "Conv1D"
    assert rows["transformer.h.0.mlp.c_fc"].sqnr_db > 30


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
def test_static_scales(name: str) -> None:
    """Found on the model's own batches, for a Conv1D too."""
    model, inputs = made(name)
    want = head(model(**inputs))
    report = pyops.swap_(model, pyops.Int8Static([inputs], smooth=0.5), progress=False)
    assert all(row.choice == "int8_static" for row in report.rows)
    assert sqnr_db(head(model(**inputs)).numpy(), want.numpy()) >= 25.0


# ------------------------------------------------------------------------------------------------------------ generate


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with float layers in place of those of int4, of the very weights that they stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            weight = (layer.weight, layer.weight_scale, layer.weight_zero)
            linear.weight = nn.Parameter(dequantize_int4(*weight, layer.in_features, layer.group_size))
            linear.bias = layer.bias
            model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 8}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_generate_as_the_dequantized_model(name: str, options: dict) -> None:
    """Token by token, with the cache, two rows of which one is padded on the left."""
    model, _ = made(name)
    pyops.swap_(model, pyops.Int4Weight(group_size=32, compute="float"))
    mask = torch.ones_like(IDS)
    if name != "bart":
        mask[0, :3] = 0
    ids = IDS * mask
    options = options | {"max_new_tokens": 9, "min_new_tokens": 9, "attention_mask": mask, "pad_token_id": 0}
    outputs = []
    for each in (dequantized(model), model):
        torch.manual_seed(3)
        outputs.append(each.generate(ids, return_dict_in_generate=True, output_logits=True, **options))
    want, got = outputs
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == 9
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_changes_nothing(config: str) -> None:
    """Rows are quantized one by one, so that a token alone is what it is among others."""
    model = llama()
    pyops.swap_(model, CONFIGS[config], filter_fn=no_head)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with_cache, without = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        assert sqnr_db(a.numpy(), b.numpy()) > 40


@pytest.mark.parametrize("config", CONFIGS)
def test_bfloat16(config: str) -> None:
    model = llama().to(torch.bfloat16)
    want = head(model(IDS))
    pyops.swap_(model, CONFIGS[config])
    got = head(model(IDS))
    assert got.dtype == torch.bfloat16
    assert sqnr_db(got.float().numpy(), want.float().numpy()) >= LEAST_SQNR_DB[config] - 2
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 10)
    after = llama()
    pyops.swap_(after, CONFIGS[config])
    assert head(after.to(torch.bfloat16)(IDS)).dtype == torch.bfloat16


@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_checkpointing(config: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = llama(attention_bias=True)
        pyops.swap_(model, CONFIGS[config], filter_fn=no_head)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    want, got = gradients
    assert "model.layers.0.self_attn.q_proj.bias" in want
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())
    assert all(gradient.abs().sum() > 0 for name, gradient in want.items() if "k_proj.bias" not in name)


# ---------------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("config", CONFIGS)
def test_ties(config: str) -> None:
    """A head that is swapped is cut from the embedding, and says so; one that is left out stays tied."""
    model = llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    report = pyops.swap_(model, CONFIGS[config])
    (row,) = (row for row in report.rows if row.name == "lm_head")
    assert "tied to model.embed_tokens.weight: the tie is cut" in row.reason
    assert model.model.embed_tokens.weight is embedding
    before = head(model(IDS))
    with pytest.raises(TypeError, match="is quantized: it cannot be a parameter, nor tied"):
        model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(head(model(IDS)), before)
    model.config.tie_word_embeddings = False
    model.tie_weights()
    assert torch.equal(head(model(IDS)), before)

    tied = llama(tie_word_embeddings=True)
    pyops.swap_(tied, CONFIGS[config], filter_fn=no_head)
    tied.tie_weights()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.resize_token_embeddings(VOCABULARY + 3)
    assert head(tied(IDS)).shape[-1] == VOCABULARY + 3


# --------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("excluded", [False, True], ids=["all", "no_head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", CONFIGS)
def test_from_pretrained(config: str, tied: bool, excluded: bool, tmp_path: Path) -> None:
    """What save_quantized and save_pretrained write, whole and in shards, the decoder alone, and in another dtype."""
    model = llama(tie_word_embeddings=tied, attention_bias=True)
    pyops.swap_(model, CONFIGS[config], filter_fn=no_head if excluded else None)
    want = head(model(IDS))
    load = transformers.AutoModelForCausalLM.from_pretrained
    pyops.save_quantized(model, tmp_path / "a")
    first = load(tmp_path / "a")
    assert torch.equal(head(first(IDS)), want)
    assert (first.lm_head.weight is first.model.embed_tokens.weight) == (tied and excluded)
    first.tie_weights()
    first.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert torch.equal(head(load(tmp_path / "b")(IDS)), want)
    pyops_transformers.mark_(model).save_pretrained(tmp_path / "c")
    for name in "abc":
        told = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert told["quant_method"] == "pyops"
        assert ("lm_head" in told["layers"]) != excluded
    decoder = transformers.AutoModel.from_pretrained(tmp_path / "c")
    assert torch.equal(head(decoder(IDS)), head(model.model(IDS)))
    narrow = load(tmp_path / "c", dtype=torch.bfloat16)
    layer, original = narrow.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight_scale, original.weight_scale)
    assert layer.weight_scale.dtype == original.weight_scale.dtype
    assert head(narrow(IDS)).dtype == torch.bfloat16
    ours = llama(tie_word_embeddings=tied, attention_bias=True)
    pyops.load_quantized_(ours, tmp_path / "b")
    assert torch.equal(head(ours(IDS)), want)


def test_gpt2_comes_back(tmp_path: Path) -> None:
    model, inputs = made("gpt2")
    pyops.swap_(model, CONFIGS["int4"], filter_fn=no_head)
    pyops.save_quantized(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(head(again(**inputs)), head(model(**inputs)))
    assert again.lm_head.weight is again.transformer.wte.weight


def change_config(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: change_config(d, lambda c: c["layers"][Q].update(layer="Int5Linear")), "no layer 'Int5Linear'"),
        (lambda d: change_config(d, lambda c: c.update(version=9)), "version=9"),
        (lambda d: change_config(d, lambda c: c.update(layers={"nowhere": c["layers"][Q]})), "none of its layers"),
        (lambda d: change_tensors(d, lambda t: t.pop(f"{Q}.weight_scale")), f"{Q}.weight_scale is missing"),
        (lambda d: change_tensors(d, lambda t: t[f"{Q}.weight_scale"].fill_(torch.nan)), "NaN or Inf"),
        (lambda d: change_tensors(d, lambda t: t[f"{Q}.weight_zero"].fill_(17)), "zero points are 0 to 16"),
    ],
)
def test_a_wrong_checkpoint_is_refused(change: Callable[[Path], None], match: str, tmp_path: Path) -> None:
    model = llama()
    pyops.swap_(model, CONFIGS["int4"])
    pyops.save_quantized(model, tmp_path)
    change(tmp_path)
    with pytest.raises(pyops.CheckpointError, match=match):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_mark_refuses() -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        pyops_transformers.mark_(llama())
    with pytest.raises(TypeError, match=r"must be a transformers\.PreTrainedModel, got Linear"):
        pyops_transformers.mark_(nn.Linear(3, 3))
    model = llama()
    pyops.swap_(model, pyops.Int8Dynamic())
    model.lm_head.activation = "relu"
    with pytest.raises(ValueError, match="lm_head was fused with the relu"):
        pyops_transformers.mark_(model)


# ---------------------------------------------------------------------------------------------- who reads its children


class Reader(nn.Module):
    """Uses the weights of some children, in its forward or in what it calls, and those of others elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "used", "in_method", "in_lambda", "cast", "asked", "initialized", "unused"):
            setattr(self, name, nn.Linear(4, 4))
        nn.init.zeros_(self.initialized.weight)

    def reset(self) -> None:
        self.unused.weight.data.zero_()

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.in_method.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.asked.weight.device)) + x.shape[0] * self.asked.weight.shape[0]
        x = self.cast(x.to(self.cast.weight.dtype)) + self.initialized(x)
        x = nn.functional.linear(x, self.used.weight, self.used.bias)
        return (lambda y: y @ self.in_lambda.weight)(self.method(x)) + self.unused(x)


def test_reads_weight() -> None:
    reader = Reader()
    read = {name for name, _ in reader.named_children() if reads_weight(reader, name)}
    assert read == {"used", "in_method", "in_lambda", "cast"}
    x = torch.randn(2, 4)
    want = reader(x)
    report = pyops.swap_(reader, pyops.Int8Dynamic())
    assert {row.name for row in report.rows if not row.swapped} == read
    torch.testing.assert_close(reader(x), want, rtol=0.1, atol=0.1)
