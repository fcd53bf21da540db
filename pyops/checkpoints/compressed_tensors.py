"""Checkpoints of compressed-tensors (llm-compressor), whose name for a scheme's layout is `format`.

pack-quantized   weight_packed int32 [N, ⌈K·b/32⌉]: q + 2^(b−1), 32/b consecutive k in a word, the first in the lowest
                 bits; weight_scale [N, K/G], [N, 1] (channel) or [1] (tensor); weight_shape int64 [2];
                 asymmetric: weight_zero_point int32 [⌈N/8⌉, K/G], z + 8 of 8 consecutive n in a word, or int8 as it is;
                 actorder "group": weight_g_idx int32 [K], the group of each k (all −1: not set)
                 b is 4, or 8 with a scale for each channel or the tensor.
int-quantized, naive-quantized
                 weight int8 [N, K]; weight_scale [N, 1] or [1]; static activations: input_scale [1]
float-quantized, naive-quantized
                 weight float8_e4m3fn [N, K]; weight_scale [N, 1], [1] or, by blocks, [⌈N/bn⌉, ⌈K/bk⌉]; input_scale [1]

w = weight_scale · (q − zero). Which scheme a layer has is told by `config_groups` and `ignore`: full names, "re:" and a
regular expression, or a class.

Source: compressed-tensors 0.20 as a description of the format, 0.9 for what it no longer writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyops.checkpoints.compressed_tensors_config import NAME, PACKED, Args, Options, parse
from pyops.checkpoints.errors import Entry
from pyops.checkpoints.gptq import locals_of
from pyops.checkpoints.layer import (
    SCALE_DTYPES,
    Fp8Layer,
    Int4Layer,
    Int8Layer,
    bytes_of_words,
    canonical_nibbles,
    group_order,
    usable_group_size,
)
from pyops.ops.int4_weight import group_count, unpack_nibbles
from pyops.sizes import ceil_div

__all__ = ["NAME", "detect", "layers", "parse", "read"]

LOCALS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
LOCALS += ("input_scale", "input_zero_point")


def detect(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """True if the config says so; without a method in the config, if its fields or else the keys look so."""
    method = (config or {}).get("quant_method")
    if method is not None:
        return str(method).lower() == NAME
    if config is not None:
        return "config_groups" in config
    return any(key.endswith((".weight_packed", ".weight_shape")) for key in keys)


# ---------------------------------------------------------------------------------------------------------- the layers


def layers(keys: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """{name of a quantized layer: the local names of its tensors}."""
    return {**locals_of(keys, "weight_scale", LOCALS), **locals_of(keys, "weight_packed", LOCALS)}


def read(entry: Entry, options: Options) -> Int4Layer | Int8Layer | Fp8Layer | None:
    """The canonical layer; None if anything is wrong, which `entry.problems` then tells."""
    w = options.weights
    if options.format == PACKED:
        return _packed4(entry, options) if w.bits == 4 else _packed8(entry, options)
    entry.not_understood(("weight", "weight_scale", "input_scale", "weight_zero_point", "input_zero_point"))
    _zero_is_zero(entry, "input_zero_point")
    return _fp8(entry, options) if w.kind == "float" else _int8(entry, options)


def _packed4(entry: Entry, options: Options) -> Int4Layer | None:
    w, N, K = options.weights, entry.N, entry.K
    group_size, problem = usable_group_size(w.group_size if w.strategy == "group" else -1, K)
    if problem:
        entry.problems.append(f"{entry.name}: {problem}")
        return None
    groups = group_count(K, group_size)
    packed = _packed(entry, 4)
    scale = _scale(entry, [(N, groups)], w.strategy)
    scale = None if scale is None else scale.expand(N, groups)
    zero = None if w.symmetric else _zero_points(entry, groups)
    if w.symmetric:
        _zero_is_zero(entry, "weight_zero_point")
    order = _order(entry, w, group_size)
    entry.not_understood(("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"))
    if entry.problems:
        return None
    w_q = canonical_nibbles(bytes_of_words(packed), K, order)
    groups_said = f"groups of {group_size}" if group_size > 0 else f"a scale a {w.strategy}"
    note = f"pack-quantized, 4 bits, {groups_said}{', symmetric' if w.symmetric else ''}"
    note += "" if order is None else ", act-order"
    compute = "auto" if options.inputs is None else "int8"
    return Int4Layer(w_q, scale.contiguous().clone(), zero, K, group_size, order, compute, note)


def _packed8(entry: Entry, options: Options) -> Int8Layer | None:
    packed = _packed(entry, 8)
    scale = _channel_scale(entry, options.weights)
    _zero_is_zero(entry, "weight_zero_point")
    _order(entry, options.weights, -1)
    entry.not_understood(("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"))
    if entry.problems:
        return None
    w_q = (bytes_of_words(packed)[:, : entry.K] ^ 0x80).view(torch.int8).contiguous()  # − 128
    return Int8Layer(w_q, scale, "none", note=f"pack-quantized, 8 bits, a scale a {options.weights.strategy}")


def _int8(entry: Entry, options: Options) -> Int8Layer | None:
    weight = entry.take("weight", [(entry.N, entry.K)], (torch.int8,))
    scale = _channel_scale(entry, options.weights)
    _zero_is_zero(entry, "weight_zero_point")
    x = options.inputs
    activations = "none" if x is None else "dynamic" if x.dynamic else "static"
    x_scale = _input_scale(entry, activations)
    if entry.problems:
        return None
    note = f"{options.format}, a scale a {options.weights.strategy}"
    return Int8Layer(weight.clone(), scale, activations, x_scale, note)


def _fp8(entry: Entry, options: Options) -> Fp8Layer | None:
    w, N, K = options.weights, entry.N, entry.K
    weight = entry.take("weight", [(N, K)], (torch.float8_e4m3fn,))
    block = {"channel": (1, max(K, 1)), "tensor": (max(N, 1), max(K, 1)), "block": w.block}[w.strategy]
    if block is None:
        entry.problems.append(f"{entry.name}: strategy 'block' without block_structure")
        return None
    scale = _scale(entry, [(ceil_div(N, block[0]), ceil_div(K, block[1]))], w.strategy)
    _zero_is_zero(entry, "weight_zero_point")
    x = options.inputs
    activations = "none"
    if x is not None:
        activations = f"{'dynamic' if x.dynamic else 'static'}-{x.strategy}"
        activations += f" of {x.group_size}" if x.strategy == "group" else ""
    x_scale = _input_scale(entry, activations)
    if entry.problems:
        return None
    if weight.view(torch.uint8).bitwise_and(0x7F).eq(0x7F).any():
        entry.wrong("weight", "holds NaN")
        return None
    note = f"{options.format}, a scale a {w.strategy}"
    return Fp8Layer(weight.clone(), scale.float().contiguous().clone(), block, activations, x_scale, note)


# ------------------------------------------------------------------------------------------------------ single tensors


def _packed(entry: Entry, bits: int) -> torch.Tensor | None:
    N, K = entry.N, entry.K
    shape = entry.take("weight_shape", [(2,)], (torch.int64, torch.int32))
    if shape is not None and tuple(shape.tolist()) != (N, K):
        entry.wrong("weight_shape", f"holds {tuple(shape.tolist())}; the layer of the model has {(N, K)}")
    return entry.take("weight_packed", [(N, ceil_div(K * bits, 32))], (torch.int32,))


def _scale(entry: Entry, shapes: list[tuple[int, int]], strategy: str) -> torch.Tensor | None:
    """weight_scale as [rows, columns]; one for the whole tensor may have shape [1] or []."""
    allowed = [*shapes, (1,), (), (1, 1)] if strategy == "tensor" else list(shapes)
    if strategy == "channel":
        allowed.append((shapes[0][0],))
    scale = entry.finite("weight_scale", entry.take("weight_scale", allowed, SCALE_DTYPES))
    if scale is None:
        return None
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def _channel_scale(entry: Entry, w: Args) -> torch.Tensor | None:
    scale = _scale(entry, [(entry.N, 1)], w.strategy)
    return None if scale is None else scale.float().expand(entry.N, 1).flatten().clone()


def _input_scale(entry: Entry, activations: str) -> torch.Tensor | None:
    if not activations.startswith("static"):
        if "input_scale" in entry.tensors:
            entry.wrong("input_scale", f"comes with activations that the config calls {activations}")
        return None
    scale = entry.finite("input_scale", entry.take("input_scale", [(1,), (), (1, 1)], SCALE_DTYPES))
    if scale is not None and not float(scale) > 0:
        entry.wrong("input_scale", f"is {float(scale)}, not above 0")
        return None
    return None if scale is None else scale.float().reshape(()).clone()


def _zero_points(entry: Entry, groups: int) -> torch.Tensor | None:
    """z + 8 as uint8 [N, groups], from words of eight n, or from int8 of each group, or of the whole tensor."""
    N, given = entry.N, entry.tensors.get("weight_zero_point")
    if given is None or given.dtype != torch.int8:
        zero = entry.take("weight_zero_point", [(ceil_div(N, 8), groups)], (torch.int32, torch.int8))
        return None if zero is None else unpack_nibbles(bytes_of_words(zero.t()), N).t().contiguous()
    zero = entry.take("weight_zero_point", [(N, groups), (1,), ()], (torch.int8,))
    if zero is None:
        return None
    low, high = (int(v) for v in zero.aminmax()) if zero.numel() else (0, 0)
    if low < -8 or high > 7:
        entry.wrong("weight_zero_point", f"holds {low if low < -8 else high}; allowed: -8 to 7")
        return None
    return (zero.reshape(1, 1) if zero.dim() < 2 else zero).expand(N, groups).add(8).to(torch.uint8).contiguous()


def _zero_is_zero(entry: Entry, local: str) -> None:
    """Symmetric layers may bring zero points all the same, which older versions wrote; they must be 0."""
    zero = entry.tensors.get(local)
    if zero is not None and bool((zero.float() != 0).any()):
        entry.wrong(local, "is not 0, though the config says symmetric")


def _order(entry: Entry, w: Args, group_size: int) -> torch.Tensor | None:
    wanted = w.actorder == "group" and w.strategy == "group"
    g_idx = entry.take("weight_g_idx", [(entry.K,)], (torch.int32, torch.int64), optional=not wanted)
    if g_idx is None or bool((g_idx == -1).all()):
        return None
    order, problem = group_order(g_idx, entry.K, group_size)
    if problem:
        entry.wrong("weight_g_idx", problem)
    return order
