"""The formats of other libraries: layers that they packed themselves, and any layer packed by their definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from pyops.checkpoints import awq, compressed_tensors, gptq
from pyops.checkpoints.errors import Entry
from pyops.checkpoints.layer import words_of_bytes
from pyops.ops.int4_weight import pack_nibbles, unpack_nibbles

FOREIGN = Path(__file__).parent / "foreign_checkpoints"
FORMATS = {"gptqmodel": gptq, "autogptq": gptq, "autoawq": awq, "compressed_tensors_09": compressed_tensors}


def foreign_cases():
    for name, fmt in FORMATS.items():
        with safe_open(FOREIGN / f"{name}.safetensors", "pt") as file:
            for case, config in sorted(file.metadata().items()):  # a hash map, of no order of its own
                yield pytest.param(name, fmt, case, json.loads(config), id=f"{name}-{case}")


def foreign(name, case):
    """(tensors of the layer, its weight in fp32) as the library wrote them."""
    with safe_open(FOREIGN / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{case}.")]  # noqa: SIM118 - no mapping
        tensors = {key.removeprefix(f"{case}."): file.get_tensor(key) for key in keys}
    return tensors, tensors.pop("expected")


def read(fmt, config, tensors, N, K, name="up"):
    keys = [f"{name}.{local}" for local in tensors]
    assert fmt.detect(config, keys)
    scheme, problems = fmt.parse(config)
    assert problems == []
    found = fmt.layers(keys, config)
    assert list(found) == [name]
    entry = Entry(name, {local: tensors[local] for local in found[name]}, N, K)
    layer = fmt.read(entry, scheme.of(name))
    assert entry.problems == []
    return layer


@pytest.mark.parametrize(("name", "fmt", "case", "config"), foreign_cases())
def test_what_the_libraries_packed(name, fmt, case, config):
    tensors, expected = foreign(name, case)
    layer = read(fmt, config, tensors, *expected.shape)
    assert torch.equal(layer.dequantize(), expected)
    assert ("act_order" in case or "actorder" in case) == (getattr(layer, "order", None) is not None)
    if "symmetric" in case and "asymmetric" not in case:
        assert layer.zero is None


# --------------------------------------------------------------------- packed here, by the definition, bit by bit


def packed_words(values: np.ndarray, bits: int, places=range(8)) -> torch.Tensor:
    """int32 words of consecutive values along the last axis: value i of a word at bit bits · places[i]."""
    each = 32 // bits
    rows, width = values.shape
    out = [[0] * -(-width // each) for _ in range(rows)]
    for r in range(rows):
        for c in range(width):
            out[r][c // each] |= int(values[r, c]) << (bits * list(places)[c % each])
    return torch.from_numpy(np.array(out, dtype=np.uint64).astype(np.uint32).view(np.int32).reshape(rows, -1))


def weight(q, z, s, group_of):
    """s · (q − z) as float32 [N, K], element by element in double."""
    N, K = q.shape
    w = [[float(s[n, group_of[k]]) * (int(q[n, k]) - int(z[n, group_of[k]])) for k in range(K)] for n in range(N)]
    return torch.tensor(w, dtype=torch.float64).reshape(N, K).float()


@st.composite
def problems(draw, whole_groups=False, multiple_n=1):
    """(q [N, K], z and s [N, groups], G as the config has it) of any small size."""
    G = draw(st.sampled_from([32, 64, 128, -1]))
    K = draw(st.integers(1, 3)) * max(G, 8) if whole_groups else draw(st.integers(1, 150))
    N = draw(st.integers(1, 20)) * multiple_n
    groups = -(-K // G) if G > 0 else 1
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, z = rng.integers(0, 16, (N, K)), rng.integers(0, 16, (N, groups))
    if draw(st.booleans()):
        z[:] = 8
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    s = torch.from_numpy(rng.normal(size=(N, groups))).to(dtype)
    return q, z, s, G


@given(problems(), st.booleans(), st.booleans())
def test_gptq(problem, v1, act_order):
    q, z, s, G = problem
    (N, K), groups = q.shape, z.shape[1]
    group_of = np.arange(K) // (G if G > 0 else K)
    if act_order:
        group_of = np.random.default_rng(K).permutation(group_of)
    tensors = {
        "qweight": packed_words(q, 4).T.contiguous(),
        "qzeros": packed_words(z.T, 4),  # in v1 what is stored is z − 1
        "scales": s.T.contiguous(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    assert tensors["qzeros"].shape[0] == groups
    config = {"bits": 4, "group_size": G, "quant_method": "gptq", "checkpoint_format": "gptq" if v1 else "gptq_v2"}
    layer = read(gptq, config, tensors, N, K)
    assert torch.equal(layer.dequantize(), weight(q, (z + 1) % 16 if v1 else z, s, group_of))
    assert layer.scale.dtype == s.dtype


@given(problems(multiple_n=8))
def test_awq_gemm(problem):
    q, z, s, G = problem
    (N, K) = q.shape
    places = (0, 4, 1, 5, 2, 6, 3, 7)  # channel i of eight is at this place of the word
    tensors = {
        "qweight": packed_words(q.T, 4, places),
        "qzeros": packed_words(z.T, 4, places),
        "scales": s.T.contiguous(),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": G, "zero_point": True, "version": "gemm"}
    layer = read(awq, config, tensors, N, K)
    assert torch.equal(layer.dequantize(), weight(q, z, s, np.arange(K) // (G if G > 0 else K)))


@given(problems(), st.booleans())
def test_pack_quantized(problem, symmetric):
    q, z, s, G = problem
    (N, K) = q.shape
    z = np.full_like(z, 8) if symmetric else z
    tensors = {
        "weight_packed": packed_words(q, 4),
        "weight_scale": s,
        "weight_shape": torch.tensor([N, K]),
    }
    tensors |= {} if symmetric else {"weight_zero_point": packed_words(z.T, 4).T.contiguous()}
    how = {"strategy": "group", "group_size": G} if G > 0 else {"strategy": "channel"}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **how}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["config_groups"] = {"a": {"targets": ["Linear"], "weights": weights}}
    layer = read(compressed_tensors, config, tensors, N, K)
    assert torch.equal(layer.dequantize(), weight(q, z, s, np.arange(K) // (G if G > 0 else K)))
    assert (layer.zero is None) == symmetric
    # And back to the same words.
    assert torch.equal(words_of_bytes(layer.w_q), tensors["weight_packed"])
    if not symmetric:
        assert torch.equal(words_of_bytes(pack_nibbles(layer.zero.t())).t(), tensors["weight_zero_point"])


def test_every_byte_in_every_place():
    """All 2⁸ values of each byte of a word, as two k of one channel, through the packing and back."""
    for place in range(4):
        words = torch.arange(256, dtype=torch.int64) << (8 * place)
        words = words.to(torch.int32)[:, None]  # N = 256, K = 8
        tensors = {"weight_packed": words, "weight_scale": torch.ones(256, 1), "weight_shape": torch.tensor([256, 8])}
        weights = {"num_bits": 4, "symmetric": True, "strategy": "channel"}
        config = {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}, "format": "pack-quantized"}
        layer = read(compressed_tensors, config, tensors, 256, 8)
        q = unpack_nibbles(layer.w_q, 8)
        assert torch.equal(q[:, 2 * place] + 16 * q[:, 2 * place + 1].int(), torch.arange(256))
        assert int(q.sum()) == int(q[:, 2 * place : 2 * place + 2].sum())
        assert torch.equal(words_of_bytes(layer.w_q), words)


def test_zero_points_of_gptq_v1():
    """Modulo 16 each, but in files of GPTQModel, which subtracts 1 from whole words: there 0 borrows from the next."""
    z = torch.tensor([[0, 3, 0, 0, 15, 8, 1, 0]])
    word = sum(int(v) << (4 * i) for i, v in enumerate(z[0]))
    subtracted = (word - 0x11111111) & 0xFFFFFFFF
    stored = torch.tensor([[subtracted]]).to(torch.int32)
    assert torch.equal(gptq.zero_points(stored, 8, gptq.Options(whole_words=True)), z.T.to(torch.uint8))
    nibbles = torch.tensor([[0x0FEDCBA9]], dtype=torch.int32)
    expected = [10, 11, 12, 13, 14, 15, 0, 1]
    assert gptq.zero_points(nibbles, 8, gptq.Options()).flatten().tolist() == expected
    assert gptq.zero_points(nibbles, 8, gptq.Options(v1=False)).flatten().tolist() == [9, 10, 11, 12, 13, 14, 15, 0]


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_of_compressed_tensors(strategy):
    q = torch.arange(-128, 128, dtype=torch.int8).view(8, 32)
    s = torch.arange(1, 9).bfloat16()[:, None] / 7 if strategy == "channel" else torch.tensor([0.25]).half()
    weights = {"num_bits": 8, "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": group}}
    packed = packed_words(q.numpy().astype(np.int64) + 128, 8)
    tensors = {"weight_packed": packed, "weight_scale": s, "weight_shape": torch.tensor([8, 32])}
    layer = read(compressed_tensors, config, tensors, 8, 32)
    assert (layer.activations, layer.choice, layer.scale.dtype) == ("none", "int8_weight", torch.float32)
    assert torch.equal(layer.w_q, q)
    assert torch.equal(layer.dequantize(), q.float() * s.float())
    inputs = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    config = {**config, "format": "int-quantized", "config_groups": {"a": {**group, "input_activations": inputs}}}
    layer = read(compressed_tensors, config, {"weight": q, "weight_scale": s}, 8, 32)
    assert (layer.activations, layer.choice, layer.x_scale) == ("dynamic", "int8_dynamic", None)
    assert torch.equal(layer.w_q, q)
    assert torch.equal(layer.scale, s.float().expand(8, 1).flatten())
    group = {**group, "input_activations": {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}}
    config = {**config, "format": "int-quantized", "config_groups": {"a": group}}
    tensors = {"weight": q, "weight_scale": s, "input_scale": torch.tensor([0.02]).bfloat16()}
    layer = read(compressed_tensors, config, tensors, 8, 32)
    assert (layer.activations, layer.choice) == ("static", "int8_static")
    assert torch.equal(layer.x_scale, torch.tensor(0.02).bfloat16().float())


@pytest.mark.parametrize(
    ("strategy", "shape", "block"),
    [("channel", (8, 1), None), ("tensor", (1,), None), ("block", (2, 3), [4, 16])],
)
def test_float8_of_compressed_tensors(strategy, shape, block):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 40, generator=generator).to(torch.float8_e4m3fn)
    s = torch.rand(shape, generator=generator) + 0.5
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "block_structure": block}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["re:.*up"], "weights": weights, "input_activations": inputs, "format": "float-quantized"}
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {"a": group}}
    layer = read(compressed_tensors, config, {"weight": q, "weight_scale": s}, 8, 40)
    each = [
        s.reshape(-1)[0] if strategy == "tensor" else s[n // 4, k // 16] if block else s[n, 0]
        for n in range(8)
        for k in range(40)
    ]
    assert torch.equal(layer.dequantize(), q.float() * torch.stack(each).view(8, 40))
    assert (layer.activations, layer.choice) == ("dynamic-token", "fp8_dynamic")


def test_which_scheme_a_layer_has():
    def group(bits, *targets):
        weights = {"num_bits": bits, "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    groups = {"a": group(8, "Linear"), "b": group(4, "re:.*mlp.*"), "c": group(8, "mlp.down"), "d": group(4, "attn.q")}
    ignore = ["lm_head", "re:.*gate$"]
    scheme, problems = compressed_tensors.parse({"config_groups": groups, "ignore": ignore})
    assert problems == []
    bits = {
        name: scheme.of(name) and scheme.of(name).weights.bits for name in ("mlp.up", "mlp.down", "attn.q", "attn.k")
    }
    assert bits == {"mlp.up": 4, "mlp.down": 8, "attn.q": 4, "attn.k": 8}
    assert scheme.of("lm_head") is None
    assert scheme.of("mlp.gate") is None
    assert scheme.of("attn.k", ("Embedding",)) is None
    assert scheme.of("mlp.up", ("Embedding",)) is not None, "a pattern takes any class"


def test_dynamic_of_gptqmodel():
    dynamic = {"-:.*lm_head": {}, "+:.*down": {"bits": 8, "group_size": -1}, ".*gate": {"group_size": 32}}
    scheme, problems = gptq.parse({"bits": 4, "group_size": 128, "dynamic": dynamic})
    assert problems == []
    assert scheme.of("lm_head") is None
    assert (scheme.of("mlp.down").bits, scheme.of("mlp.down").group_size) == (8, -1)
    assert (scheme.of("mlp.gate").bits, scheme.of("mlp.gate").group_size) == (4, 32)
    assert scheme.of("mlp.up") == scheme.default
