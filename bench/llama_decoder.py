"""Cases of llama_decoder: two layers of a decoder of Llama-2-7B's shape, from hidden states to hidden states.

transformers' own LlamaModel, random weights. Embedding and lm_head are left out: two layers of the 32 would make them
weigh 16 times what they do in the model. "decode" is one token after 128 that are in the cache, "prefill" 512 tokens
without one. All peers run the same model in eager mode and differ in what stands for its `nn.Linear`s.

What is right for ours is the float model that has the dequantized weights and, where ours rounds them, the dequantized
activations. How far both are from the original says how good the method is, not whether the kernels are right: it is
reported, and its bound only tells a model from noise.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pyops.bench.case import Case, Inputs, Op
from pyops.ops.fake_quantize import fake_int8_rows
from pyops.ops.int4_linear import resolve_compute
from pyops.ops.int4_quantize import quantize_int4
from pyops.ops.int4_weight import dequantize_int4
from pyops.ops.int8_linear import quantize_int8

LAYERS, HIDDEN, INNER, HEADS = 2, 4096, 11008, 32
WEIGHTS = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
CACHED, PROMPT = 128, 512
GROUP = 128
BYTES = {"pyops-int4": 0.5 + 3 / GROUP, "pyops-int8": 1.0}
"""Of one weight, with scales and zero points."""
REFERENCE_MIN_SQNR_DB = 30.0
"""Of ours against `reference`. What is between them begins as the rounding of fp32 sums. Where that moves an activation
to the next integer it grows from layer to layer, towards what the activations' rounding is (26 to 27 dB)."""


def _case(phase: str, ours: str, target: float | None) -> Case:
    tokens = 1 if phase == "decode" else PROMPT
    seen = CACHED + 1 if phase == "decode" else PROMPT
    attention = 4 * LAYERS * HIDDEN * tokens * seen
    cache = 0 if phase == "prefill" else 2 * LAYERS * CACHED * HIDDEN * 4
    return Case(
        name=f"{phase}/{ours.removeprefix('pyops-')}",
        group="decode, one token" if phase == "decode" else f"prefill, {PROMPT} tokens",
        label=ours.removeprefix("pyops-"),
        dims={"tokens": tokens, "cached": seen - tokens, "layers": LAYERS},
        ops=2 * WEIGHTS * tokens + attention,
        bytes=WEIGHTS * BYTES[ours] + cache,
        source=f"LlamaModel(hidden_size={HIDDEN}, intermediate_size={INNER}, num_hidden_layers={LAYERS})",
        cold=False,
        ours=ours,
        target=target,
        against=("torch-fp32",),
        reference_min_sqnr_db=REFERENCE_MIN_SQNR_DB,
        shared=phase,
    )


def _model() -> nn.Module:
    """In eval mode; its weights are transformers' initial ones."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=32,  # never looked at: the inputs are hidden states
    )
    with torch.device("meta"):  # its own initialization would take seconds in each process
        model = transformers.LlamaModel(config)
    model.to_empty(device="cpu")
    model.rotary_emb = type(model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, config.initializer_range, generator=generator)
        elif "weight" in module._parameters:
            module.weight.data.fill_(1.0)
    return model.eval()


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The model and hidden states ~ N(0, 1) of all tokens, fp32. Ordinary tensors, also under inference mode."""
    with torch.inference_mode(False):
        count = case.dims["cached"] + case.dims["tokens"]
        x = torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(2))
        return {"case": case, "model": _model().to(device), "x": x.to(device)}


def oracle(inputs: Inputs) -> torch.Tensor:
    """The hidden states of the tokens that are timed, in fp32, without a cache."""
    with torch.no_grad():
        return inputs["model"](inputs_embeds=inputs["x"]).last_hidden_state[:, inputs["case"].dims["cached"] :]


def fill_cache(model: nn.Module, x: torch.Tensor) -> object:
    """A cache of the tokens x [1, T, HIDDEN]."""
    transformers = importlib.import_module("transformers")
    cache = transformers.DynamicCache(config=model.config)
    model(inputs_embeds=x, past_key_values=cache)
    return cache


def reference(inputs: Inputs) -> torch.Tensor:
    """The hidden states of the tokens that are timed, in fp32, by weights and activations as ours rounds them.

    The cache is that of the original weights, as all peers fill it.
    """
    model, x, case = inputs["model"], inputs["x"], inputs["case"]
    cached = case.dims["cached"]
    with torch.inference_mode(False), torch.no_grad():
        cache = fill_cache(model, x[:, :cached]) if cached else None
        hooks = [
            hook
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for hook in _rounded_while_it_runs(module, case.ours)
        ]
        y = model(inputs_embeds=x[:, cached:], past_key_values=cache, use_cache=cache is not None).last_hidden_state
        for hook in hooks:
            hook.remove()
    return y


def _rounded_while_it_runs(linear: nn.Linear, ours: str) -> tuple[RemovableHandle, ...]:
    """Hooks that give a layer rounded inputs, and its rounded weight for each call alone: two models need much room."""
    kept = linear.weight.data
    rows = ours == "pyops-int8" or resolve_compute("auto", kept.device) == "int8"

    def before(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        linear.weight.data = ROUNDED[ours](kept)
        return (fake_int8_rows(inputs[0]) if rows else inputs[0],)

    def after(*_: object) -> None:
        linear.weight.data = kept

    return linear.register_forward_pre_hook(before), linear.register_forward_hook(after)


def _int4(w: torch.Tensor) -> torch.Tensor:
    return dequantize_int4(*quantize_int4(w, GROUP), w.shape[1], GROUP)


def _int8(w: torch.Tensor) -> torch.Tensor:
    q, scale = quantize_int8(w)
    return q * scale[:, None]


ROUNDED = {"pyops-int4": _int4, "pyops-int8": _int8}
"""What the layers of ours make of a weight, as floats."""

OP = Op(
    name="llama_decoder",
    title="two layers of a 7B Llama",
    cases=(
        _case("decode", "pyops-int4", 5.0),
        _case("decode", "pyops-int8", None),
        _case("prefill", "pyops-int4", 3.0),
        _case("prefill", "pyops-int8", 3.0),
    ),
    make_inputs=make_inputs,
    oracle=oracle,
    reference=reference,
    min_sqnr_db=8.0,  # rounding normal weights to four bits leaves about 12 dB after two layers, noise -3
    baseline="torch-fp32",
    peak="int8_gops",
    cache_titles={"warm": "tokens one after another"},
)
