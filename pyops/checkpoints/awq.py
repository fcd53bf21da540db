"""Checkpoints of AutoAWQ, and of GPTQModel's AWQ.

    w[n, k] = scales[k // G, n] · (q[k, n] − z[k // G, n])

Version "gemm"   qweight int32 [K, N/8]: n = 8·c + (0 2 4 6 1 3 5 7)[i] in bits 4·i … of word c
                 qzeros int32 [K/G, N/8] likewise; scales [K/G, N]
Version "gemv"   qweight int32 [N, K/8]: k = 8·c + i in bits 4·i … of word c
                 qzeros int32 [N, Z] likewise over groups, scales [N, 8·Z], both padded: Z = ⌈K/G/8⌉ rounded up to a
                 multiple of 2 if G is 64, of 4 if G is 32

Zero points are stored as they are. Other versions ("gemv_fast", "marlin", "exllama", "llm-awq") are refused: gemv_fast
and llm-awq store −z·s in fp16, from which z and with it the weight cannot be had back exactly.

Source: the packing code of AutoAWQ 0.2.9 as a description of the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyops.checkpoints.errors import Entry
from pyops.checkpoints.gptq import locals_of
from pyops.checkpoints.layer import (
    SCALE_DTYPES,
    Int4Layer,
    bytes_of_words,
    canonical_nibbles,
    unknown_fields,
    usable_group_size,
    wrong_types,
)
from pyops.memory import chunks
from pyops.ops.int4_weight import group_count, pack_nibbles, unpack_nibbles
from pyops.sizes import ceil_div

NAME = "awq"
LOCALS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight output channels each nibble of a word belongs to, from the lowest bits on."""
VERSIONS = ("gemm", "gemv")
UNDERSTOOD = {"bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format"}
UNDERSTOOD |= {"quant_method", "method", "modules_to_not_convert", "backend", "pack_dtype", "dynamic"}
TYPES = {"bits": int, "w_bit": int, "group_size": int, "q_group_size": int, "version": str, "format": str}
TYPES |= {"checkpoint_format": str, "pack_dtype": str}
HARMLESS = {
    *("meta", "lm_head", "desc_act", "sym", "config_file_name", "do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
    *("exllama_config", "damp_percent", "true_sequential", "act_group_aware", "dataset", "tokenizer", "batch_size"),
    *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id"),
    *("max_input_length", "cache_block_outputs", "modules_in_block_to_quantize"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the config says of all layers."""

    group_size: int = 128
    version: str = "gemm"

    def of(self, name: str) -> Options:
        """The options of a layer."""
        return self


def detect(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """True if the config says so; without a method in the config, if the fields or else the keys look so."""
    method = (config or {}).get("quant_method") or (config or {}).get("method")
    if method is not None:
        return str(method).lower() == NAME
    if config is not None:
        return "w_bit" in config or "q_group_size" in config
    keys = list(keys)
    return any(key.endswith(".qweight") for key in keys) and not any(key.endswith(".g_idx") for key in keys)


def parse(config: Mapping[str, Any]) -> tuple[Options | None, list[str]]:
    """The options of the config, and everything in it that is not understood."""
    problems = unknown_fields(dict(config), UNDERSTOOD | HARMLESS, "awq config")
    wrong = wrong_types(config, TYPES, "awq config")
    if wrong:
        return None, problems + wrong
    bits = _first(config, "bits", "w_bit", default=4)
    if bits != 4:
        problems.append(f"awq config: bits={bits!r}; allowed: 4")
    version = _first(config, "version", "checkpoint_format", "format", default="gemm").lower()
    if str(config.get("backend")).lower() == "llm-awq":
        version = "llm-awq"
    if version not in VERSIONS:
        problems.append(f"awq config: version {version!r}; allowed: {', '.join(VERSIONS)}")
    if str(config.get("pack_dtype") or "int32") != "int32":
        problems.append(f"awq config: pack_dtype={config['pack_dtype']!r}; allowed: int32")
    if config.get("dynamic"):
        problems.append(f"awq config: dynamic={config['dynamic']!r}; options that differ by layer are not understood")
    group_size = _first(config, "group_size", "q_group_size", default=128)
    _, problem = usable_group_size(group_size, 0)
    if problem:
        problems.append(f"awq config: {problem}")
    return (None, problems) if problems else (Options(group_size, version), [])


def _first(config: Mapping[str, Any], *fields: str, default: Any) -> Any:
    """The first of these fields that is given: different writers call the same thing by different names."""
    return next((config[field] for field in fields if config.get(field) is not None), default)


def layers(keys: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """{name of a quantized layer: the local names of its tensors}."""
    return locals_of(keys, "qweight", LOCALS)


def read(entry: Entry, options: Options) -> Int4Layer | None:
    """The canonical layer; None if anything is wrong, which `entry.problems` then tells."""
    group_size, problem = usable_group_size(options.group_size, entry.K)
    if problem:
        entry.problems.append(f"{entry.name}: {problem}")
        return None
    made = (_gemv if options.version == "gemv" else _gemm)(entry, group_size)
    if made is None:
        return None
    w_q, zero, scale = made
    if bool((zero == 8).all()):
        zero = None
    groups = "one group" if group_size < 0 else f"groups of {group_size}"
    note = f"awq {options.version}, 4 bits, {groups}{', symmetric' if zero is None else ''}"
    return Int4Layer(w_q, scale, zero, entry.K, group_size, note=note)


def _gemm(entry: Entry, group_size: int):
    N, K = entry.N, entry.K
    groups = group_count(K, group_size)
    q = entry.take("qweight", [(K, ceil_div(N, 8))], (torch.int32,))
    zeros = entry.take("qzeros", [(groups, ceil_div(N, 8))], (torch.int32,))
    scale = entry.finite("scales", entry.take("scales", [(groups, N)], SCALE_DTYPES))
    if N % 8:
        entry.problems.append(f"{entry.name}: N={N} is no multiple of 8, as this format needs")
    if entry.problems:
        return None
    w_q = torch.empty(N, ceil_div(K, 2), dtype=torch.uint8, device=q.device)
    for a, b in chunks(N // 8, 8 * K, q.device):  # unpacked they take twice the memory
        w_q[8 * a : 8 * b] = pack_nibbles(_interleaved(q[:, a:b], 8 * (b - a)).t())
    return w_q, _interleaved(zeros, N).t().contiguous(), scale.t().contiguous()


def _interleaved(words: torch.Tensor, N: int) -> torch.Tensor:
    """int32 [R, N/8] → uint8 [R, N]: nibble i of a word is column ORDER[i] of its eight."""
    nibbles = unpack_nibbles(bytes_of_words(words), N).view(words.shape[0], -1, 8)
    where = torch.tensor(ORDER, device=words.device)
    return torch.empty_like(nibbles).index_copy_(2, where, nibbles).view(words.shape[0], N)


def _gemv(entry: Entry, group_size: int):
    N, K = entry.N, entry.K
    groups = group_count(K, group_size)
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = ceil_div(groups, 8)
    width = ceil_div(words, multiple) * multiple
    q = entry.take("qweight", [(N, ceil_div(K, 8))], (torch.int32,))
    zeros = entry.take("qzeros", [(N, width)], (torch.int32,))
    scale = entry.take("scales", [(N, 8 * width)], SCALE_DTYPES)
    scale = None if scale is None else entry.finite("scales", scale[:, :groups])
    if entry.problems:
        return None
    zero = unpack_nibbles(bytes_of_words(zeros), groups)
    return canonical_nibbles(bytes_of_words(q), K), zero, scale.contiguous()
