"""The `quantization_config` of compressed-tensors: which layer has which scheme, and what in it is not understood."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pyops.checkpoints.layer import unknown_fields, usable_group_size, wrong_types

NAME = "compressed-tensors"
PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE)
UNDERSTOOD = {"config_groups", "quant_method", "format", "ignore", "quantization_status", "kv_cache_scheme"}
UNDERSTOOD |= {"sparsity_config", "transform_config", "moe_sparsity_config", "quantization_config"}
HARMLESS = {"version", "global_compression_ratio", "run_compressed", "dequantize"}
GROUP_FIELDS = {"targets", "weights", "input_activations", "output_activations", "format"}
ARGS_FIELDS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"}
ARGS_HARMLESS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}  # calibration; tensors have their dtypes
TYPES = {"config_groups": Mapping, "format": str, "ignore": list, "sparsity_config": Mapping}
GROUP_TYPES = {"targets": list, "weights": Mapping, "input_activations": Mapping, "format": str}
ARGS_TYPES = {"num_bits": int, "type": str, "symmetric": bool, "strategy": str, "group_size": int}
ARGS_TYPES |= {"block_structure": (list, str), "dynamic": (bool, str), "actorder": (str, bool)}
ACTORDERS = {None: "", False: "", "weight": "", "static": "", "group": "group", "dynamic": "group", True: "group"}


@dataclasses.dataclass(frozen=True)
class Args:
    """How weights or activations are quantized."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool
    actorder: str


@dataclasses.dataclass(frozen=True)
class Options:
    """One scheme of `config_groups`."""

    format: str
    weights: Args
    inputs: Args | None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Which options each layer has."""

    targets: tuple[tuple[str, Options], ...]
    ignore: tuple[str, ...]

    def of(self, name: str, classes: Iterable[str] = ("Linear",)) -> Options | None:
        """The options of a layer, None if it has none; a full name counts before a pattern, that before a class."""
        classes = set(classes)
        if any(_matches(one, name) or one in classes for one in self.ignore):
            return None
        ranked = sorted(self.targets, key=lambda pair: (pair[0].startswith("re:"), pair[0]))
        for target, options in ranked:
            if _matches(target, name):
                return options
        return next((options for target, options in self.targets if target in classes), None)


def _matches(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


# ---------------------------------------------------------------------------------------------------------- the config


def parse(config: Mapping[str, Any]) -> tuple[Scheme | None, list[str]]:
    """The schemes of the config, and everything in it that is not understood."""
    what = "compressed-tensors config"
    problems = unknown_fields(dict(config), UNDERSTOOD | HARMLESS, what)
    wrong = wrong_types(config, TYPES, what)
    if wrong:
        return None, problems + wrong
    status = config.get("quantization_status") or "compressed"
    if str(status).lower() != "compressed":
        problems.append(f"{what}: quantization_status={status!r}; allowed: compressed")
    if config.get("kv_cache_scheme"):
        problems.append(f"{what}: kv_cache_scheme: a quantized key-value cache is not understood")
    sparsity = config.get("sparsity_config") or {}
    if sparsity and str(sparsity.get("format", "dense")).lower() != "dense":
        problems.append(f"{what}: sparsity_config: format {sparsity.get('format')!r} is not understood")
    if config.get("transform_config"):
        problems.append(f"{what}: transform_config: transforms of weights and activations are not understood")
    if config.get("moe_sparsity_config"):
        problems.append(f"{what}: moe_sparsity_config: pruned experts are not understood")
    ignore, wrong = _patterns(config.get("ignore"), f"{what}: ignore")
    problems += wrong
    groups, targets = config.get("config_groups"), []
    if not isinstance(groups, Mapping) or not groups:
        problems.append(f"{what}: config_groups is missing or empty")
        groups = {}
    for name, group in groups.items():
        where = f"{what}: config_groups[{name!r}]"
        if not isinstance(group, Mapping):
            problems.append(f"{where} is a {type(group).__name__}: presets given by name are not understood")
            continue
        options, wrong = _group(group, config.get("format"), where)
        wanted, bad = _patterns(group.get("targets"), f"{where}.targets")
        problems += wrong + bad
        targets += [(target, options) for target in wanted]
    return (None, problems) if problems else (Scheme(tuple(targets), tuple(ignore)), [])


def _patterns(value: Any, where: str) -> tuple[list[str], list[str]]:
    """The names and patterns of a list, and what is wrong with them."""
    found = value if isinstance(value, list) else []  # what is none was told before
    problems = [f"{where}: {one!r} is no name" for one in found if not isinstance(one, str)]
    found = [one for one in found if isinstance(one, str)]
    for one in found:
        try:
            re.compile(one[3:] if one.startswith("re:") else "")
        except re.error as error:
            problems.append(f"{where}: {one!r} is no regular expression: {error}")
    return found, problems


def _group(group: Mapping[str, Any], default_format: Any, where: str) -> tuple[Options | None, list[str]]:
    problems = unknown_fields(dict(group), GROUP_FIELDS, where)
    wrong = wrong_types(group, GROUP_TYPES, where)
    if wrong:
        return None, problems + wrong
    if group.get("output_activations"):
        problems.append(f"{where}: output_activations: quantized outputs are not understood")
    layout = group.get("format") or default_format
    if layout not in FORMATS:
        return None, [*problems, f"{where}: format {layout!r}; allowed: {', '.join(FORMATS)}"]
    if not isinstance(group.get("weights"), Mapping):
        return None, [*problems, f"{where}: weights is missing: schemes of activations alone are not understood"]
    weights, wrong = _args(group["weights"], f"{where}.weights")
    problems += wrong
    inputs = None
    if group.get("input_activations"):
        inputs, wrong = _args(group["input_activations"], f"{where}.input_activations")
        problems += wrong
    if not problems:
        problems = [f"{where}: {problem}" for problem in _refused(layout, weights, inputs)]
    return (None, problems) if problems else (Options(layout, weights, inputs), [])


def _args(args: Mapping[str, Any], where: str) -> tuple[Args | None, list[str]]:
    problems = unknown_fields(dict(args), ARGS_FIELDS | ARGS_HARMLESS, where)
    wrong = wrong_types(args, ARGS_TYPES, where)
    if wrong:
        return None, problems + wrong
    group_size, block, actorder = args.get("group_size"), args.get("block_structure"), args.get("actorder")
    strategy = args.get("strategy")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if isinstance(block, str):
        block = [int(part) if part.isdigit() else 0 for part in block.split("x")]
    if block is not None and not (len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        problems.append(f"{where}: block_structure={args['block_structure']!r} is no pair of positive numbers")
    if actorder not in ACTORDERS:
        problems.append(f"{where}: actorder={actorder!r}; allowed: none, weight, static, group, dynamic")
    if args.get("dynamic") not in (None, True, False):
        problems.append(f"{where}: dynamic={args['dynamic']!r}; allowed: true, false")
    if problems:
        return None, problems
    kind, bits = (args.get("type") or "int").lower(), 8 if args.get("num_bits") is None else args["num_bits"]
    block = None if block is None else (block[0], block[1])
    dynamic, symmetric = bool(args.get("dynamic")), args.get("symmetric") is not False
    return Args(bits, kind, symmetric, str(strategy).lower(), group_size, block, dynamic, ACTORDERS[actorder]), []


def _refused(layout: str, w: Args, x: Args | None) -> list[str]:
    """Why a scheme that is well formed has no layer here."""
    problems = []
    if layout == PACKED:
        if (w.kind, w.bits) not in (("int", 4), ("int", 8)):
            problems.append(f"weights of {w.bits} bits, type {w.kind}; allowed in {PACKED}: int of 4 or 8 bits")
        if w.bits == 4 and w.strategy not in ("group", "channel", "tensor"):
            problems.append(f"weights by {w.strategy!r}; allowed: group, channel, tensor")
        if w.strategy == "group":
            problem = usable_group_size(w.group_size, 0)[1]
            problems += [problem] if problem else []
        if x is not None and not (w.bits == 4 and _is_int8_token(x)):
            problems.append(
                f"{PACKED} with {_described(x)} activations; allowed: none, or int8 by token (4-bit weights)"
            )
    elif (w.kind, w.bits) == ("float", 8):
        problems += _refused_fp8(w, x)
    elif (w.kind, w.bits) != ("int", 8):
        problems.append(f"weights of {w.bits} bits, type {w.kind}; allowed in {layout}: int or float of 8 bits")
    elif x is not None and not _is_int8_token(x) and not _is_int8_static(x):
        problems.append(f"int8 weights with {_described(x)} activations; allowed: symmetric int8 by token or static")
    if (w.kind, w.bits) == ("int", 8):
        if w.strategy not in ("channel", "tensor"):
            problems.append(f"8-bit weights by {w.strategy!r}; allowed: channel, tensor")
        if not w.symmetric:
            problems.append("8-bit weights with zero points are not understood")
    if w.dynamic:
        problems.append("weights that are quantized dynamically are not understood")
    return problems


def _refused_fp8(w: Args, x: Args | None) -> list[str]:
    problems = []
    if w.strategy not in ("channel", "tensor", "block"):
        problems.append(f"float8 weights by {w.strategy!r}; allowed: channel, tensor, block")
    if not w.symmetric:
        problems.append("float8 weights with zero points are not understood")
    if x is not None and ((x.kind, x.bits) != ("float", 8) or not x.symmetric or x.strategy not in FP8_INPUTS):
        problems.append(f"float8 weights with {_described(x)} activations; allowed: symmetric float8")
    return problems


FP8_INPUTS = ("token", "tensor", "group")


def _is_int8_token(x: Args) -> bool:
    return (x.kind, x.bits, x.symmetric, x.strategy, x.dynamic) == ("int", 8, True, "token", True)


def _is_int8_static(x: Args) -> bool:
    return (x.kind, x.bits, x.symmetric, x.strategy, x.dynamic) == ("int", 8, True, "tensor", False)


def _described(x: Args) -> str:
    symmetry, when = "symmetric" if x.symmetric else "asymmetric", "dynamic" if x.dynamic else "static"
    return f"{when}, {symmetry} {x.kind}{x.bits} by {x.strategy}"
