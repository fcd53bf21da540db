"""Our layers as compressed-tensors writes them: Int4Linear pack-, Int8Linear int-, Fp8Linear float-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyops.checkpoints.compressed_tensors_config import FLOAT, INT, NAME, PACKED
from pyops.checkpoints.layer import FP8_BLOCK, words_of_bytes
from pyops.nn import Int4Linear, Int8Linear
from pyops.nn.linear import QuantLinear
from pyops.ops.int4_weight import LEVELS, pack_nibbles

WRITTEN_AS = "0.9.0"
"""The version of compressed-tensors that this is the layout of."""


def config(layers: Mapping[str, QuantLinear]) -> dict[str, Any]:
    """The `quantization_config`; ValueError for a layer that the formats cannot express."""
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        scheme = _scheme(layer, name)
        group = groups.setdefault(repr(scheme), {"targets": [], **scheme})
        group["targets"].append(name)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": NAME,
        "version": WRITTEN_AS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(layer: QuantLinear, name: str) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    if type(layer) is Int8Linear:
        return _int8_scheme(layer, name, common)
    if type(layer).__name__ == "Fp8Linear":
        return _fp8_scheme(layer, {**common, "type": "float"})
    if type(layer) is not Int4Linear:
        raise ValueError(f"{name} is a {type(layer).__name__}: it cannot be written as {NAME}")
    if layer.act_order:
        raise ValueError(f"{name} has columns in act-order, which {NAME} does not write any more")
    if layer.group_size > 0 and layer.in_features % layer.group_size:
        sizes = f"in_features {layer.in_features} and group_size {layer.group_size}"
        raise ValueError(f"{name} has {sizes}; {NAME} needs whole groups")
    zero = layer.weight_zero
    if zero is not None and zero.numel() and int(zero.max()) > LEVELS:
        raise ValueError(f"{name} has a zero point of {int(zero.max())}; {NAME} stores 0 to {LEVELS}")
    weights = {**common, "num_bits": 4, "symmetric": layer.symmetric, "strategy": "channel", "group_size": None}
    if layer.group_size > 0:
        weights |= {"strategy": "group", "group_size": layer.group_size}
    inputs = _by_token(common) if layer.compute == "int8" else None
    return {"format": PACKED, "weights": weights, "input_activations": inputs, "output_activations": None}


def _by_token(common: dict[str, Any]) -> dict[str, Any]:
    """The activations' part: each row by its own scale."""
    return {**common, "strategy": "token", "dynamic": True, "group_size": None}


def _int8_scheme(layer: Int8Linear, name: str, common: dict[str, Any]) -> dict[str, Any]:
    options = layer._options()
    if "smooth" in options:
        raise ValueError(f"{name} divides its input by smooth, which {NAME} cannot express")
    mode = options.get("mode", "dynamic")
    weights = {**common, "strategy": "channel", "group_size": None}
    inputs = _by_token(common)
    if mode == "static":
        inputs |= {"strategy": "tensor", "dynamic": False}
    layout, inputs = (PACKED, None) if mode == "weight_only" else (INT, inputs)
    return {"format": layout, "weights": weights, "input_activations": inputs, "output_activations": None}


def _fp8_scheme(layer: QuantLinear, common: dict[str, Any]) -> dict[str, Any]:
    blocks = layer.granularity == "block"
    weights = {**common, "strategy": "block" if blocks else "channel", "group_size": None}
    weights |= {"block_structure": [FP8_BLOCK, FP8_BLOCK]} if blocks else {}
    inputs = _by_token(common)
    if blocks:
        inputs |= {"strategy": "group", "group_size": FP8_BLOCK}
    elif layer.static:
        inputs |= {"strategy": "tensor", "dynamic": False}
    return {"format": FLOAT, "weights": weights, "input_activations": inputs, "output_activations": None}


def tensors(layer: QuantLinear) -> dict[str, torch.Tensor]:
    """The tensors of one layer by their local names, without the bias."""
    if type(layer) is Int4Linear:
        return _int4(layer)
    return _packed8(layer) if layer._options().get("mode") == "weight_only" else _bytes(layer)


def _bytes(layer: QuantLinear) -> dict[str, torch.Tensor]:
    scale = layer.weight_scale
    found = {"weight": layer.weight, "weight_scale": scale[:, None] if scale.dim() == 1 else scale}
    static = getattr(layer, "input_scale", None)
    return found if static is None else found | {"input_scale": static.reshape(1)}


def _packed8(layer: QuantLinear) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": words_of_bytes(layer.weight.view(torch.uint8) ^ 0x80),  # + 128
        "weight_scale": layer.weight_scale[:, None],
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }


def _int4(layer: QuantLinear) -> dict[str, torch.Tensor]:
    canonical = layer._canonical()
    found = {
        "weight_packed": words_of_bytes(canonical["weight"]),
        "weight_scale": canonical["weight_scale"],
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if canonical["weight_zero"] is not None:
        found["weight_zero_point"] = words_of_bytes(pack_nibbles(canonical["weight_zero"].t())).t()
    return found
