"""Where the tensors of a checkpoint come from: a state dict, a file, or a directory of safetensors, read lazily.

A directory holds `model.safetensors`, or shards and their `model.safetensors.index.json`, or any single safetensors
file. Its quantization config is what `config.json` has under `quantization_config`, or else `quantize_config.json`
(AutoGPTQ, GPTQModel) or `quant_config.json` (AutoAWQ).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyops.checkpoints.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
QUANT_CONFIGS = ("quantize_config.json", "quant_config.json")
CONFIG_KEYS = ("quantization_config", "compression_config")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Source:
    """Tensors by key, each read when it is asked for."""

    def __init__(self, where: str, config: Mapping[str, Any] | None, readers: Mapping[str, Any]) -> None:
        self.where, self.config, self._readers = where, config, readers
        """In words; the quantization config, None if there is none; what has get_tensor(key) for each key."""

    def keys(self) -> Iterable[str]:
        """All keys."""
        return self._readers.keys()

    def get(self, key: str) -> torch.Tensor:
        """A tensor on the CPU, or where the state dict has it; it may share the file's or the state dict's memory."""
        return self._readers[key].get_tensor(key)


class _Given:
    """A state dict as something to read from."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key].detach()


def open_source(checkpoint: Any, config: Mapping[str, Any] | None = None) -> Source:
    """A `Source` over a directory, a safetensors file or a state dict; `config` takes the place of the one found there.

    Raises FileNotFoundError, TypeError for another kind of checkpoint, and CheckpointError for what is truncated,
    missing, or no safetensors.
    """
    if config is not None:
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, such as json.load gives it, got {type(config).__name__}")
        config = _quantization_part(config) or config
    if isinstance(checkpoint, Mapping):
        return Source("the state dict", config, _given(checkpoint))
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a directory, a file or a state dict, got {type(checkpoint).__name__}")
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"no such directory or file: {path}")
    files, listed = ([path], None) if path.is_file() else _files(path)
    if config is None:
        config = _config_in(path.parent if path.is_file() else path)
    return Source(str(path), config, _opened(path, files, listed))


def _given(state: Mapping[str, Any]) -> dict[str, _Given]:
    reader, problems = _Given(state), []
    for key, value in state.items():
        if not isinstance(key, str):
            problems.append(f"key {key!r} is no string")
        elif not isinstance(value, torch.Tensor):
            problems.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif value.is_meta:
            problems.append(f"{key} is on meta and has no values")
    if problems:
        raise CheckpointError("the state dict", problems)
    return dict.fromkeys(state, reader)


def _files(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The safetensors files of a checkpoint, and which keys its index promises in which."""
    if (folder / INDEX).exists():
        if (folder / WEIGHTS).exists():
            raise CheckpointError(str(folder), [f"it holds both {WEIGHTS} and {INDEX}: which one counts?"])
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(str(folder), [f"{INDEX} has no weight_map of keys to file names"])
        names = sorted(set(listed.values()))
        outside = [f"{INDEX} names {name!r}, which is no file of this directory" for name in names if _leaves(name)]
        if outside:
            raise CheckpointError(str(folder), outside)
        return [folder / name for name in names], listed
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS], None
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise CheckpointError(str(folder), [f"{len(found)} safetensors files without {INDEX}"])
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    hint = f"; {', '.join(pickles)}: pickles are not read, convert them to safetensors" if pickles else ""
    raise CheckpointError(str(folder), [f"no safetensors in it{hint}"])


def _leaves(name: str) -> bool:
    return name != os.path.basename(name) or name in ("", ".", "..")


def _opened(path: Path, files: list[Path], listed: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading checkpoints needs safetensors: pip install 'pyops-kernels[checkpoints]'") from error
    readers: dict[str, Any] = {}
    held: dict[str, str] = {}
    problems = []
    for file in files:
        try:
            # Checks the header, and that the file is as long as the header says.
            reader = safe_open(file, framework="pt", device="cpu")
        except FileNotFoundError:
            problems.append(f"{file.name} is missing")
            continue
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} is truncated or no safetensors file: {error}")
            continue
        for key in reader.keys():  # noqa: SIM118 - no mapping
            if key in held:
                problems.append(f"{key} is in {held[key]} and in {file.name}")
            readers[key], held[key] = reader, file.name
    for key, name in (listed or {}).items():
        if held.get(key) != name and not problems:
            problems.append(f"{INDEX} has {key} in {name}, which does not hold it")
    if problems:
        raise CheckpointError(str(path), problems)
    return readers


def _config_in(folder: Path) -> Mapping[str, Any] | None:
    if (folder / CONFIG).exists():
        found = _quantization_part(read_json(folder / CONFIG))
        if found is not None:
            return found
    for name in QUANT_CONFIGS:
        if (folder / name).exists():
            return read_json(folder / name)
    return None


def _quantization_part(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of a model's config; of what old compressed-tensors nested, the inner one."""
    for key in CONFIG_KEYS:
        part = config.get(key)
        if isinstance(part, Mapping) and part:
            inner = part.get("quantization_config")
            return part if not isinstance(inner, Mapping) else {**part, **inner, "quantization_config": None}
    return None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError otherwise."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(str(file.parent), [f"{file.name} is no JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise CheckpointError(str(file.parent), [f"{file.name} holds a {type(content).__name__}, not an object"])
    return content
