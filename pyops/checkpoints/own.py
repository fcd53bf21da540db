"""Our own checkpoints: the `state_dict` as it is, and in `quantization_config` what each quantized layer is.

    {"quant_method": "pyops", "version": 1, "layers": {"model.layers.0.mlp.up_proj": {"layer": "Int4Linear", …}}}

`layer` is a class of `pyops.nn`, the rest the options of its constructor; sizes, bias and dtype are the float model's.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

import pyops.nn
from pyops.checkpoints.errors import Entry
from pyops.checkpoints.layer import FP8_BLOCK, Fp8Layer, Int4Layer, Int8Layer, unknown_fields
from pyops.nn.linear import QuantLinear

NAME = "pyops"
VERSION = 1
GIVEN = ("in_features", "out_features", "bias", "device", "dtype")
"""Arguments of a layer that the model tells."""
CHOICES = {"Int4Linear": "int4_weight", "Fp8Linear": "fp8_dynamic"}


@dataclasses.dataclass(frozen=True)
class Options:
    """One layer of the config."""

    cls: type[QuantLinear]
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """All layers of the config."""

    layers: dict[str, Options]

    def of(self, name: str) -> Options | None:
        """The options of a layer; None if it has none."""
        return self.layers.get(name)


@dataclasses.dataclass
class OwnLayer:
    """A layer of one of our own classes, and its canonical tensors."""

    cls: type[QuantLinear]
    arguments: dict[str, Any]
    sizes: tuple[int, int]
    tensors: dict[str, torch.Tensor]

    @property
    def choice(self) -> str:
        """As the configs of `swap_` are called, or else the class."""
        name, mode = self.cls.__name__, self.arguments.get("mode", "dynamic")
        return f"int8_{mode.removesuffix('_only')}" if name == "Int8Linear" else CHOICES.get(name, name)

    @property
    def note(self) -> str:
        """The class and its options."""
        options = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"pyops {self.cls.__name__}{f', {options}' if options else ''}"

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] in fp32."""
        t, name = self.tensors, self.cls.__name__
        if name == "Int4Linear":
            group_size, order = self.arguments.get("group_size", 128), t.get("input_order")
            weight = (t["weight"], t["weight_scale"], t.get("weight_zero"))
            return Int4Layer(*weight, self.sizes[1], group_size, order).dequantize()
        if name == "Int8Linear":
            w = Int8Layer(t["weight"], t["weight_scale"], "dynamic").dequantize()
            return w / t["smooth"] if "smooth" in t else w
        if name == "Fp8Linear":
            blocks = self.arguments.get("granularity", "row") == "block"
            scale = t["weight_scale"] if blocks else t["weight_scale"][:, None]
            block = (FP8_BLOCK, FP8_BLOCK) if blocks else (1, max(self.sizes[1], 1))
            return Fp8Layer(t["weight"], scale, block, "").dequantize()
        raise NotImplementedError(f"the weight of a {name} cannot be dequantized")

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device, compute: str) -> nn.Module:
        """The layer on `device`."""
        arguments = dict(self.arguments)
        if compute != "auto" and "compute" in inspect.signature(self.cls).parameters:
            arguments["compute"] = compute
        N, K = self.sizes
        module = self.cls(K, N, False, "meta", dtype, **arguments)
        module.load_state_dict({name: t.to(device, copy=True) for name, t in self.tensors.items()}, assign=True)
        if bias is not None:
            module.bias = nn.Parameter(bias)
        return module


def detect(config: Mapping[str, Any] | None, keys: Iterable[str]) -> bool:
    """True if the config says so."""
    return (config or {}).get("quant_method") == NAME


def parse(config: Mapping[str, Any]) -> tuple[Scheme | None, list[str]]:
    """The layers of the config, and everything in it that is not understood."""
    problems = unknown_fields(dict(config), {"quant_method", "version", "layers"}, "pyops config")
    if config.get("version") != VERSION:
        problems.append(f"pyops config: version={config.get('version')!r}; understood: {VERSION}")
    layers = config.get("layers")
    if not isinstance(layers, Mapping):
        return None, [*problems, "pyops config: layers is missing"]
    found = {}
    for name, told in layers.items():
        options, wrong = _options(told, f"pyops config: layers[{name!r}]")
        problems += wrong
        found[name] = options
    return (None, problems) if problems else (Scheme(found), [])


def check_saved(name: str, layer: QuantLinear) -> None:
    """Raise ValueError for a layer that no float model would take back."""
    if layer.activation != "none":
        raise ValueError(f"{name} was fused with the {layer.activation} after it: save before that is done")
    if getattr(pyops.nn, type(layer).__name__, None) is not type(layer):  # a part of one, say
        raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be saved in this way")


def describe(layers: Mapping[str, QuantLinear]) -> dict[str, Any]:
    """The config of these layers; raises the ValueError of `check_saved`."""
    for name, layer in layers.items():
        check_saved(name, layer)
    told = {name: {"layer": type(layer).__name__, **layer._options()} for name, layer in layers.items()}
    return {"quant_method": NAME, "version": VERSION, "layers": told}


def _options(told: Any, where: str) -> tuple[Options | None, list[str]]:
    if not isinstance(told, Mapping) or not isinstance(told.get("layer"), str):
        return None, [f"{where} does not name its layer"]
    cls = getattr(pyops.nn, told["layer"], None)
    if not (isinstance(cls, type) and issubclass(cls, QuantLinear)):
        return None, [f"{where}: there is no layer {told['layer']!r}"]
    arguments = {key: value for key, value in told.items() if key != "layer"}
    allowed = set(inspect.signature(cls).parameters) - set(GIVEN)
    unknown = sorted(set(arguments) - allowed)
    if unknown:
        return None, [f"{where}: {cls.__name__} has no option {', '.join(unknown)}"]
    try:
        cls(64, 1, False, "meta", **arguments)
    except (TypeError, ValueError) as error:
        return None, [f"{where}: {error}"]
    return Options(cls, arguments), []


def layers(keys: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """{name of a quantized layer: the local names of its tensors, without the bias}."""
    told = (config or {}).get("layers")
    found: dict[str, list[str]] = {name: [] for name in (told if isinstance(told, Mapping) else ())}
    for key in sorted(keys):
        name, _, local = key.rpartition(".")
        if name in found and local != "bias":
            found[name].append(local)
    return found


def read(entry: Entry, options: Options) -> OwnLayer | None:
    """The canonical layer; None if anything is wrong, which `entry.problems` then tells."""
    empty = options.cls(entry.K, entry.N, False, "meta", **options.arguments)
    layout = empty.layout()
    for name in layout.keys() - entry.tensors.keys():
        entry.wrong(name, "is missing")
    entry.not_understood(layout)
    if not entry.problems:
        prefix = f"{entry.name}." if entry.name else ""
        entry.problems += empty._problems({prefix + name: t for name, t in entry.tensors.items()}, prefix)
    if entry.problems:
        return None
    return OwnLayer(options.cls, dict(options.arguments), (entry.N, entry.K), dict(entry.tensors))
