"""Checkpoints of AutoGPTQ, GPTQModel and optimum.

    w[n, k] = scales[g, n] · (q[k, n] − z[g, n]),   g = g_idx[k]

    qweight  int32 [⌈K·b/32⌉, N]     32/b consecutive k in a word, the first in the lowest bits
    qzeros   int32 [K/G, ⌈N·b/32⌉]   likewise 32/b consecutive n
    scales   fp16, bf16 or fp32 [K/G, N]
    g_idx    int32 [K]               the group of each k; absent or k // G without act-order

b is 4, or 8 where there is one group and every z is 128: that is an int8 weight of one scale for each output channel.

Zero points. Format "gptq" (v1) stores z − 1, "gptq_v2" stores z. In v1 a stored 15 is z = 0, as exllama reads it, for
quantizers choose z from 0 … 15. (Some kernels make 16 of it.) GPTQModel subtracts 1 from whole words, where z = 0
borrows from its neighbour; adding 1 to whole words is the exact inverse. Its files are known by `meta.quantizer`.

Source: the packing code of AutoGPTQ 0.7.1 and GPTQModel 7.7 as a description of the format.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyops.checkpoints.errors import Entry
from pyops.checkpoints.layer import (
    SCALE_DTYPES,
    Int4Layer,
    Int8Layer,
    bytes_of_words,
    canonical_nibbles,
    group_order,
    unknown_fields,
    usable_group_size,
    wrong_types,
)
from pyops.ops.int4_weight import LEVELS, group_count, unpack_nibbles
from pyops.sizes import ceil_div

NAME = "gptq"
LOCALS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")
UNDERSTOOD = {"bits", "group_size", "sym", "desc_act", "quant_method", "method", "checkpoint_format", "format"}
UNDERSTOOD |= {"dynamic", "meta", "pack_dtype", "is_marlin_format", "awq_gemm_checkpoint"}
TYPES = {"bits": int, "group_size": int, "checkpoint_format": str, "format": str, "dynamic": Mapping, "meta": Mapping}
TYPES |= {"pack_dtype": str, "is_marlin_format": bool, "awq_gemm_checkpoint": bool}
HARMLESS = {
    # How it was calibrated, or which kernel its maker would run: nothing that the tensors depend on.
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "lm_head"),
    *("model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id", "backend"),
    *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "cache_block_outputs"),
    *("modules_in_block_to_quantize", "max_input_length", "use_cuda_fp16", "use_exllama", "exllama_config", "version"),
    *("disable_exllama", "model_format", "offload_to_disk", "v2", "v2_alpha", "hessian", "cache_examples_on_gpu"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the config says of a layer."""

    bits: int = 4
    group_size: int = 128
    v1: bool = True
    whole_words: bool = False
    """In v1 the 1 was subtracted from words, not from each zero point."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The options of every layer."""

    default: Options
    dynamic: tuple[tuple[str, Mapping[str, Any] | None], ...] = ()
    """Patterns of layer names, and what differs there; None where the layers are not quantized."""

    def of(self, name: str) -> Options | None:
        """The options of a layer; None if it is not quantized."""
        for pattern, overrides in self.dynamic:
            if re.match(pattern, name):
                return None if overrides is None else dataclasses.replace(self.default, **overrides)
        return self.default


def detect(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """True if the config says so; without a method in the config, if the keys look so."""
    method = (config or {}).get("quant_method") or (config or {}).get("method")
    if method is not None:
        return str(method).lower() == NAME
    if config is not None and "bits" in config and "w_bit" not in config:
        return any(key.endswith(".qweight") for key in keys)
    return any(key.endswith(".g_idx") for key in keys) and any(key.endswith(".qweight") for key in keys)


def parse(config: Mapping[str, Any]) -> tuple[Scheme | None, list[str]]:
    """The options of the config, and everything in it that is not understood."""
    problems = unknown_fields(dict(config), UNDERSTOOD | HARMLESS, "gptq config")
    wrong = wrong_types(config, TYPES, "gptq config")
    if wrong:
        return None, problems + wrong
    bits = 4 if config.get("bits") is None else config["bits"]
    group_size = 128 if config.get("group_size") is None else config["group_size"]
    if bits not in BITS:
        problems.append(f"gptq config: bits={bits!r}; allowed: 4, and 8 with one scale for each output channel")
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if config.get("is_marlin_format"):
        layout = "marlin"
    if config.get("awq_gemm_checkpoint"):
        layout = "awq gemm repacked by AutoGPTQ"
    if layout not in FORMATS:
        problems.append(f"gptq config: checkpoint format {layout!r}; allowed: {', '.join(FORMATS)}")
    if str(config.get("pack_dtype") or "int32") != "int32":
        problems.append(f"gptq config: pack_dtype={config['pack_dtype']!r}; allowed: int32")
    _, problem = usable_group_size(group_size, 0)
    if problem:
        problems.append(f"gptq config: {problem}")
    dynamic = []
    for pattern, overrides in (config.get("dynamic") or {}).items():
        parsed, wrong = _override(str(pattern), overrides)
        problems += wrong
        if not wrong:
            dynamic.append(parsed)
    if problems:
        return None, problems
    default = Options(bits, group_size, layout == "gptq", _by_gptqmodel(config.get("meta")))
    return Scheme(default, tuple(dynamic)), []


def _override(pattern: str, overrides: Any) -> tuple[tuple[str, Mapping[str, Any] | None], list[str]]:
    """One line of `dynamic`: "-:regex" leaves layers out, "+:regex" or "regex" gives them other options."""
    what = f"gptq config: dynamic[{pattern!r}]"
    bare = pattern.removeprefix("-:").removeprefix("+:")
    problems = []
    try:
        re.compile(bare)
    except re.error as error:
        problems.append(f"{what} is no regular expression: {error}")
    if pattern.startswith("-:"):
        return (bare, None), problems
    if not isinstance(overrides, Mapping):
        return (bare, None), [*problems, f"{what} is a {type(overrides).__name__}, not an object"]
    known = {"bits", "group_size"}
    problems += unknown_fields(dict(overrides), known | {"sym", "desc_act"} | HARMLESS, what)
    problems += wrong_types(overrides, {"bits": int, "group_size": int}, what)
    if overrides.get("bits") not in (None, *BITS):
        problems.append(f"{what}: bits={overrides['bits']!r}; allowed: 4 and 8")
    return (bare, {key: overrides[key] for key in known if overrides.get(key) is not None}), problems


def _by_gptqmodel(meta: Any) -> bool:
    made_by = meta.get("quantizer") if isinstance(meta, Mapping) else None
    made_by = made_by if isinstance(made_by, list) else [made_by]
    return any(str(one).lower().startswith("gptqmodel") for one in made_by)


def layers(keys: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """{name of a quantized layer: the local names of its tensors}."""
    return locals_of(keys, "qweight", LOCALS)


def locals_of(keys: Iterable[str], mark: str, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Of each layer that has a tensor `mark`, which of `names` it has."""
    keys = set(keys)
    found = sorted(key.rpartition(".")[0] for key in keys if key.rpartition(".")[2] == mark)
    return {layer: [name for name in names if (f"{layer}.{name}" if layer else name) in keys] for layer in found}


def read(entry: Entry, options: Options) -> Int4Layer | Int8Layer | None:
    """The canonical layer; None if anything is wrong, which `entry.problems` then tells."""
    N, K, bits = entry.N, entry.K, options.bits
    group_size, problem = usable_group_size(options.group_size, K)
    if problem:
        entry.problems.append(f"{entry.name}: {problem}")
        return None
    groups, each = group_count(K, group_size), 32 // bits
    q = entry.take("qweight", [(ceil_div(K, each), N)], (torch.int32,))
    zeros = entry.take("qzeros", [(groups, ceil_div(N, each))], (torch.int32,))
    scale = entry.finite("scales", entry.take("scales", [(groups, N)], SCALE_DTYPES))
    g_idx = entry.take("g_idx", [(K,)], (torch.int32, torch.int64), optional=True)
    order = None
    if g_idx is not None:
        order, problem = group_order(g_idx, K, group_size)
        if problem:
            entry.wrong("g_idx", problem)
    if entry.problems:
        return None
    q = bytes_of_words(q.t())  # [N, ⌈K·b/8⌉]
    if bits == 8:
        return _int8(entry, q, zeros, scale, order, options)
    w_q = canonical_nibbles(q, K, order)
    zero = zero_points(zeros, N, options)
    if bool((zero == 8).all()):
        zero = None
    note = f"gptq{'' if options.v1 else '_v2'}, 4 bits, {'one group' if group_size < 0 else f'groups of {group_size}'}"
    note += ", symmetric" if zero is None else ""
    note += "" if order is None else ", act-order"
    return Int4Layer(w_q, scale.t().clone(memory_format=torch.contiguous_format), zero, K, group_size, order, note=note)


def zero_points(qzeros: torch.Tensor, N: int, options: Options) -> torch.Tensor:
    """z [N, groups] uint8, of 4 bits, from qzeros [groups, ⌈N/8⌉]."""
    if options.v1 and options.whole_words:
        qzeros = (qzeros.long() + 0x11111111).to(torch.int32)  # the conversion keeps the lower 32 bits
    zero = unpack_nibbles(bytes_of_words(qzeros), N)
    if options.v1 and not options.whole_words:
        zero = (zero + 1) & LEVELS
    return zero.t().contiguous()


def _int8(entry: Entry, q, zeros, scale, order, options) -> Int8Layer | None:
    """8 bits, where they are an int8 weight of one scale for each channel."""
    if scale.shape[0] != 1:
        entry.wrong("scales", f"has {scale.shape[0]} groups: of 8 bits, only one scale for each channel is understood")
        return None
    stored = bytes_of_words(zeros)[0, : entry.N]
    z = stored.long() + options.v1
    if not bool((z == 128).all()):
        entry.wrong("qzeros", f"has zero point {int(z[z != 128][0])}: of 8 bits, only 128 (symmetric) is understood")
        return None
    if order is not None:  # of one group every order is sorted
        raise AssertionError("one group has an order")
    w_q = (q[:, : entry.K] ^ 0x80).view(torch.int8)  # − 128
    return Int8Layer(w_q.clone(), scale[0].float().contiguous(), "none", note="gptq, 8 bits a channel")
