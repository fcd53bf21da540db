"""Load a quantized checkpoint into a float model: `load_quantized_(model, directory)`.

Everything is read, checked and built beside the model, one layer after the other; only then is it put into its place,
and that is undone if it is interrupted.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pyops.checkpoints import awq, compressed_tensors, gptq, own
from pyops.checkpoints.errors import CheckpointError, Entry
from pyops.checkpoints.layer import QuantizedLayer, keeps_its_own_state
from pyops.checkpoints.source import Source, open_source
from pyops.config import FilterFn
from pyops.edit import undoing
from pyops.nn.conv1d import conv1d_class, is_conv1d, is_linear
from pyops.nn.effective import origin
from pyops.ops.int4_linear import COMPUTES
from pyops.ops.int8_linear import FLOAT_DTYPES
from pyops.refusal import layer_refusal
from pyops.replacing import commit, complete, nbytes, weight_and_bias
from pyops.report import UNCHANGED, Report, Row

FORMATS: tuple[ModuleType, ...] = (own, gptq, awq, compressed_tensors)
SUPERFLUOUS = (r".*\.rotary_emb\.inv_freq$", r".*\.attn\.masked_bias$", r".*\.attn\.bias$")
"""Buffers that old versions of transformers saved, and new ones compute."""


def load_quantized_(
    model: nn.Module,
    checkpoint: Any,
    *,
    config: Mapping[str, Any] | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = True,
    compute: str = "auto",
    device: torch.device | str = "cpu",
    progress: bool | None = None,
) -> Report:
    """Load a GPTQ, AWQ, compressed-tensors or pyops checkpoint into a float model, in place.

    The `nn.Linear` layers (and transformers' `Conv1D`) that are quantized in the checkpoint are replaced by
    `Int4Linear`, `Int8Linear` …, which hold the checkpoint's own integers and scales; every other tensor is loaded into
    the model as it is.

    Args:
        model: the float model, on any device, or on meta (see `empty_weights`), where it takes no memory.
        checkpoint: a directory or file of safetensors, which are read tensor by tensor, or a state dict.
        config: the quantization config (or a model config that has one), instead of the one in the directory. A state
            dict needs it.
        filter_fn: called as filter_fn(module, qualified_name) for each layer that would be replaced; False keeps the
            float layer, which then gets the dequantized weight.
        strict: False only warns of keys that the model has no place for, and of tensors that the checkpoint lacks,
            which stay as they are.
        compute: of `Int4Linear`: "auto", "int8" or "float".
        device: where a part of the model that is on meta goes.
        progress: show a bar on stderr; by default if stderr is a terminal.

    Dtypes: a tensor that is not quantized is converted to the dtype that the model has for it; scales keep theirs.

    Returns:
        A report with a row for each of these layers of the model.

    Raises:
        CheckpointError with the list of everything that is wrong or not understood, FileNotFoundError, TypeError or
        ValueError for the arguments. After any exception the model is exactly as it was.
    """
    _check(model, filter_fn, compute)
    source = open_source(checkpoint, config)
    loading = _Loading(model, source, _format_of(source), torch.device(device))
    shown = sys.stderr.isatty() if progress is None else progress
    loading.read_layers(filter_fn, compute, shown)
    loading.read_others()
    loading.finish_reading(strict)
    loading.commit()
    return Report(list(loading.rows.values()))


def _check(model: Any, filter_fn: Any, compute: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if is_linear(model):
        kind = "Conv1D" if is_conv1d(model) else "Linear"
        raise ValueError(f"model is itself a {kind}, which cannot be replaced in place: wrap it in torch.nn.Sequential")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {type(filter_fn).__name__}")
    if compute not in COMPUTES:
        raise ValueError(f"compute={compute!r} is not one of {', '.join(COMPUTES)}")


def _format_of(source: Source) -> ModuleType:
    """The format of a checkpoint; CheckpointError if it is none of ours, or its config is missing."""
    names = ", ".join(fmt.NAME for fmt in FORMATS)
    fmt = next((fmt for fmt in FORMATS if fmt.detect(source.config, source.keys())), None)
    if fmt is None and source.config is None:
        raise CheckpointError(
            source.where, [f"no quantization config was found, and the keys look like none of {names}"]
        )
    if fmt is None:
        method = source.config.get("quant_method") or source.config.get("method")
        raise CheckpointError(source.where, [f"its config is of quant_method {method!r}; understood: {names}"])
    if source.config is None:
        raise CheckpointError(
            source.where,
            [f"the keys look like {fmt.NAME}, but there is no quantization config: give it as config={{…}}"],
        )
    return fmt


class _Loading:
    """What is found out about one checkpoint and one model before the model is touched."""

    def __init__(self, model: nn.Module, source: Source, fmt: ModuleType, device: torch.device) -> None:
        self.model, self.source, self.device, self.fmt = model, source, device, fmt
        self.scheme, self.problems = fmt.parse(source.config)
        self.lenient: list[str] = []  # problems that strict=False forgives
        self.quantized = fmt.layers(source.keys(), source.config)
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[module].append(name)
        self.used = {_join(name, local) for name, locals_ in self.quantized.items() for local in locals_}
        self.rows: dict[nn.Module, Row] = {}
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.values: dict[int, torch.Tensor] = {}  # by the id of the model's tensor
        self.notes: dict[str, str] = {}  # of a layer, for its row

    # ------------------------------------------------------------------------------------------------ quantized layers

    def read_layers(self, filter_fn: FilterFn | None, compute: str, shown: bool) -> None:
        """Make the replacement of every layer that is quantized."""
        known = {name: module for module, names in self.names.items() for name in names}
        for name in self.quantized:
            module = known.get(name)
            if module is None:
                self.problems.append(f"{name} is quantized in the checkpoint; the model has no such layer")
            elif not is_linear(module):
                kind = type(module).__name__
                self.problems.append(f"{name} is quantized in the checkpoint; in the model it is a {kind}, no Linear")
        if not self.quantized:
            self.problems.append(f"no layer is quantized as {self.fmt.NAME}, which its config says")
        linears = [module for module in self.names if is_linear(module)]
        for module in _with_bar(linears) if shown else linears:
            weight, bias = weight_and_bias(module)
            size, shape = nbytes([weight, bias]), () if weight is None else tuple(weight.shape)
            row = Row(self.names[module][0], type(module).__name__, UNCHANGED, "", shape, size, size)
            self.rows[module] = row
            found = [name for name in self.names[module] if name in self.quantized]
            if found:
                self._read_layer(module, found, row, filter_fn, compute)
            else:
                row.reason = "float in the checkpoint"
                self._expect_float(module)

    def _expect_float(self, module: nn.Module) -> None:
        """Note if the config says that a layer is quantized whose tensors are not there."""
        if self.scheme is None or self.fmt is not compressed_tensors:
            return  # other configs do not say which layers are
        present = self.source.keys()
        for name in self.names[module]:
            options = self.scheme.of(name, _classes(module))
            if options is not None and _join(name, "weight") in present:
                self.lenient.append(f"{name} has no weight_scale, though the config says {options.format}")

    def _read_layer(
        self, module: nn.Module, found: list[str], row: Row, filter_fn: FilterFn | None, compute: str
    ) -> None:
        name = found[0]
        refusal = layer_refusal(module, conv1d_class(module) or nn.Linear, FLOAT_DTYPES) or origin(module)
        if refusal:
            self.problems.append(f"{name} is quantized in the checkpoint and cannot be replaced: {refusal}")
            return
        layer = self._canonical(module, name)
        for other in found[1:]:
            if not self._same_tensors(name, other):
                self.problems.append(f"{name} and {other} are one layer in the model; in the checkpoint they differ")
        if layer is None:
            return
        row.reason = layer.note
        keep = [one for one in self.names[module] if filter_fn is not None and not filter_fn(module, one)]
        if keep:
            row.add("filter_fn keeps the float layer: dequantized")
            weight = layer.dequantize()
            self._put(module.weight, weight.t() if is_conv1d(module) else weight)
        else:
            self._build(module, name, layer, row, compute)

    def _canonical(self, module: nn.Module, name: str) -> QuantizedLayer | None:
        """The layer as the checkpoint has it; None if something is wrong with it, which is noted."""
        if self.scheme is None:
            return None
        options = self.scheme.of(name, _classes(module)) if self.fmt is compressed_tensors else self.scheme.of(name)
        if options is None:
            self.problems.append(f"{name} is quantized in the checkpoint, but not by the config")
            return None
        tensors = {local: self.source.get(_join(name, local)) for local in self.quantized[name]}
        N, K = reversed(module.weight.shape) if is_conv1d(module) else module.weight.shape
        entry = Entry(name, tensors, N, K)
        layer = self.fmt.read(entry, options)
        self.problems += entry.problems
        return None if entry.problems else layer

    def _same_tensors(self, name: str, other: str) -> bool:
        if self.quantized[name] != self.quantized[other]:
            return False
        keys = ((_join(name, local), _join(other, local)) for local in self.quantized[name])
        return all(_equal(self.source.get(a), self.source.get(b)) for a, b in keys)

    def _build(self, module: nn.Module, name: str, layer: QuantizedLayer, row: Row, compute: str) -> None:
        device, dtype = self._device_of(module.weight), module.weight.dtype
        bias = None if module.bias is None else torch.zeros(module.bias.shape, dtype=module.bias.dtype, device=device)
        try:
            new = layer.module(bias, dtype, device, compute)
        except (TypeError, ValueError, RuntimeError) as error:
            self.problems.append(f"{name}: {error}")
            return
        new.train(module.training)
        row.choice = layer.choice
        # From here on the bias is the model's own Parameter.
        complete(module, new, row, self.names[module], self._keys_of(module.weight))
        self.replacements[module] = new

    # --------------------------------------------------------------------------------------------------- other tensors

    def read_others(self) -> None:
        """Read every tensor of the model that is not quantized."""
        present, seen = set(self.source.keys()), set()
        others = present - self.used
        for module, names in self.names.items():
            if keeps_its_own_state(module):
                kind = type(module).__name__
                self.problems.append(
                    f"{names[0]}: the state of a {kind} is no plain tensors: give the model before it is swapped"
                )
                continue
            for local, tensor in _tensors(module):
                if id(tensor) in seen or self._is_replaced(module, local):
                    continue
                seen.add(id(tensor))
                keys = self._keys_of(tensor)
                self._read_other(tensor, keys, [key for key in keys if key in others])
        self._left_over(present)

    def _is_replaced(self, module: nn.Module, local: str) -> bool:
        return local == "weight" and any(name in self.quantized for name in self.names[module])

    def _keys_of(self, tensor: torch.Tensor) -> list[str]:
        """All names of a tensor of the model."""
        if not hasattr(self, "_keys"):
            self._keys: dict[int, list[str]] = defaultdict(list)
            for module, names in self.names.items():
                for local, one in _tensors(module):
                    self._keys[id(one)] += [_join(name, local) for name in names]
        return self._keys[id(tensor)]

    def _read_other(self, tensor: torch.Tensor, keys: list[str], found: list[str]) -> None:
        self.used.update(found)
        if not found:
            if id(tensor) not in self.values:
                tied = f" (and {', '.join(keys[1:])}, which is the same)" if len(keys) > 1 else ""
                self.lenient.append(f"{keys[0]}{tied} is missing in the checkpoint")
                if tensor.is_meta:
                    self.problems.append(f"{keys[0]} is on meta, and the checkpoint has nothing for it")
            return
        value, key = self.source.get(found[0]), found[0]
        for other in found[1:]:
            if not _equal(value, self.source.get(other)):
                self.problems.append(f"{key} and {other} are tied in the model; in the checkpoint they differ")
                return
        if id(tensor) in self.values:
            self.problems.append(f"{key} is tied in the model to a layer that is quantized in the checkpoint")
        elif tuple(value.shape) != tuple(tensor.shape):
            self.problems.append(f"{key} is {tuple(value.shape)}; the model has {tuple(tensor.shape)}")
        elif not _convertible(value.dtype, tensor.dtype):
            self.problems.append(f"{key} has dtype {value.dtype}; the model has {tensor.dtype}")
        else:
            self._put(tensor, value)

    def _left_over(self, present: set[str]) -> None:
        """Keys that nothing in the model took."""
        ignored = (*SUPERFLUOUS, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()))
        known = {name: module for module, names in self.names.items() for name in names}
        for key in sorted(present - self.used):
            layer, _, local = key.rpartition(".")
            of_layer = local == "bias" and layer in self.quantized and layer in known and is_linear(known[layer])
            if of_layer and bool((self.source.get(key) == 0).all()):  # AutoGPTQ writes it where the layer had none
                self.rows[known[layer]].add("its bias in the checkpoint is zero, the model has none")
            elif not any(re.search(pattern, key) for pattern in ignored):
                self.lenient.append(f"{key} is in the checkpoint; the model has no place for it")

    def _put(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device_of(tensor))
        self.values[id(tensor)] = new.copy_(value)

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        return self.device if tensor.is_meta else tensor.device

    # ---------------------------------------------------------------------------------------------------------- commit

    def finish_reading(self, strict: bool) -> None:
        """Raise if anything was found wrong."""
        for module, names in self.names.items():
            for local, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and local in module._non_persistent_buffers_set:
                    self.problems.append(
                        f"{_join(names[0], local)} is on meta, and no checkpoint holds it: "
                        "make the model inside pyops.empty_weights(), which leaves buffers where they are"
                    )
        if strict:
            self.problems += self.lenient
        if self.problems:
            raise CheckpointError(self.source.where, self.problems)
        if self.lenient:
            warnings.warn("\n".join(["load_quantized_, strict=False:", *self.lenient]), stacklevel=3)

    def commit(self) -> None:
        """Put everything into its place; it is all undone if this is interrupted."""
        modules = list(self.model.modules())
        with undoing(modules), _data_put_back() as put:
            made: dict[int, torch.Tensor] = {}  # what takes the place of a tensor on meta
            for module in self.names:
                owner = self.replacements.get(module, module)
                for kind in ("_parameters", "_buffers"):
                    for local, tensor in getattr(module, kind).items():
                        value = self.values.get(id(tensor))
                        if value is None or (owner is not module and local != "bias"):
                            continue
                        if not tensor.is_meta:
                            put(tensor, value)
                            continue
                        if id(tensor) not in made:
                            grad = tensor.requires_grad
                            made[id(tensor)] = nn.Parameter(value, grad) if kind == "_parameters" else value
                        getattr(owner, kind)[local] = made[id(tensor)]
            commit(modules, self.replacements, self.rows)


@contextlib.contextmanager
def _data_put_back() -> Iterator[Any]:
    """Gives put(tensor, value), which sets tensor.data; the old data come back if the body raises."""
    before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
        before.append((tensor, tensor.data))
        tensor.data = value

    try:
        yield put
    except BaseException:
        for tensor, data in reversed(before):  # a tied tensor is put twice
            tensor.data = data
        raise


def _with_bar(layers: list[nn.Module]) -> Iterable[nn.Module]:
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine on which nothing may be installed
        return layers
    return tqdm(layers, desc="pyops.load_quantized_", unit="layer", leave=False)


def _join(name: str, local: str) -> str:
    return f"{name}.{local}" if name else local


def _classes(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]


def _tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of a module alone."""
    for local, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and local not in module._non_persistent_buffers_set:
            yield local, tensor


def _convertible(found: torch.dtype, wanted: torch.dtype) -> bool:
    """A float to a float, else only the same; a float8 weight without its scale is no float."""
    plain = (*FLOAT_DTYPES, torch.float64)
    return found == wanted or (found in plain and wanted in plain)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
