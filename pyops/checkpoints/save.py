"""Save a quantized model as safetensors: `save_quantized(model, directory)`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyops.checkpoints import compressed_tensors_export, own
from pyops.checkpoints.layer import keeps_its_own_state
from pyops.checkpoints.source import CONFIG, INDEX, WEIGHTS, read_json
from pyops.nn.linear import QuantLinear
from pyops.replacing import nbytes

FORMATS = ("pyops", "compressed-tensors")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass
class Part:
    """Tensors that go into one file together: those of a layer, or a single one."""

    nbytes: int
    make: Callable[[], dict[str, torch.Tensor]]
    """Called when the file is written: what a layer holds packed is unpacked then."""


def save_quantized(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    format: str = "pyops",
    max_shard_size: int | str = "5GB",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a model with quantized layers to a directory, for `load_quantized_` to load into the float model.

    Args:
        model: with `Int4Linear`, `Int8Linear` … in it, on any device.
        directory: made if need be; it may hold other files, but no safetensors yet.
        format: "pyops": the `state_dict` as it is, exactly. "compressed-tensors": what other programs read,
            `Int4Linear` as pack-quantized, `Int8Linear` as int- and `Fp8Linear` as float-quantized, if that can express
            them.
        max_shard_size: bytes of a file, as a number or such as "500MB"; above it there are several and an index. A
            single layer that is larger has a file of its own.
        config: what goes into config.json beside the quantization; by default the config of a transformers model, or
            what config.json holds already.

    The tensors are those of `state_dict()`; one that is under several names is written once, under its first.

    Raises:
        FileExistsError if there are safetensors, ValueError for a format or size that is none, for a layer that the
        format cannot express, and for a model whose layers were fused with their neighbours, as no float model would
        take them. Nothing is written then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    limit, folder = _bytes(max_shard_size), Path(directory)
    found = sorted(p.name for p in folder.glob("*.safetensors*")) if folder.exists() else []
    if found:
        raise FileExistsError(f"{folder} holds {found[0]} already: choose another directory, or remove it")
    layers, others = _parts(model)
    if format == "pyops":
        quantization = own.describe(layers)
        make = _own_tensors
    else:
        quantization = compressed_tensors_export.config(layers)
        make = compressed_tensors_export.tensors
    parts = [Part(nbytes(m._held().values()), partial(_named, make, m, name)) for name, m in layers.items()]
    text = json.dumps({**_model_config(model, config, folder), "quantization_config": quantization}, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _shards(parts + others, limit))
    _replace(folder / CONFIG, lambda file: file.write_text(text + "\n", encoding="utf-8"))


def _parts(model: nn.Module) -> tuple[dict[str, QuantLinear], list[Part]]:
    """The quantized layers by their first names, and all other tensors."""
    layers, others, seen = {}, [], set()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            own.check_saved(name, module)
            layers[name] = module
        elif keeps_its_own_state(module):
            raise ValueError(f"{name} is a {type(module).__name__}, which cannot be saved in this way")
        quantized = isinstance(module, QuantLinear)
        for local, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or local in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            if quantized and local != "bias":
                continue
            if tensor.is_meta:
                raise ValueError(f"{name}.{local} is on meta and has no values")
            seen.add(id(tensor))
            key = f"{name}.{local}" if name else local
            others.append(Part(nbytes([tensor]), partial(dict, {key: tensor})))
    if not layers:
        raise ValueError("model has no quantized layer; save it as any other model")
    return layers, others


def _own_tensors(layer: QuantLinear) -> dict[str, torch.Tensor]:
    canonical = layer._canonical()
    return {local: canonical[local] for local in layer.layout()}


def _named(make: Callable[[QuantLinear], dict[str, torch.Tensor]], layer: QuantLinear, name: str) -> Any:
    return {f"{name}.{local}" if name else local: t for local, t in make(layer).items()}


def _shards(parts: list[Part], limit: int) -> list[list[Part]]:
    """Filled one after the other; none above the limit, unless a part is."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    return shards


def _write(folder: Path, shards: list[list[Part]]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("saving needs safetensors: pip install 'pyops-kernels[checkpoints]'") from error
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _plain(t) for part in shard for key, t in part.make().items()}
        _replace(folder / name, lambda file, tensors=tensors: save_file(tensors, file, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, name)
        total += nbytes(tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _replace(folder / INDEX, lambda file: file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8"))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and dense, in memory of its own: safetensors takes no views of one another."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside it and rename: nobody ever sees half a file."""
    beside = file.with_name(f".{file.name}.part")
    try:
        write(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def _model_config(model: nn.Module, config: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    if config is None:
        own_config = getattr(model, "config", None)
        if hasattr(own_config, "to_json_string"):  # of transformers
            config = json.loads(own_config.to_json_string())
            if config.get("dtype") is None:  # else from_pretrained takes that of the first tensor: of scales
                config["dtype"] = str(model.dtype).removeprefix("torch.")
        else:
            config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    return {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}


def _bytes(size: int | str) -> int:
    if isinstance(size, str):
        number, unit = size[:-2].strip(), size[-2:].upper()
        size = int(float(number) * UNITS[unit]) if unit in UNITS and number.replace(".", "", 1).isdigit() else 0
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise ValueError(f"max_shard_size must be a positive number of bytes or such as '5GB', got {size!r}")
    return size
