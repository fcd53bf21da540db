"""Replace the layers of a model that one already has: `swap_(model, config)`.

Nothing is touched before everything has worked: layers are converted and measured beside the model, and only then put
into their places, which cannot fail.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pyops.config import Config, FilterFn, Layer
from pyops.measure import captured_inputs, check_inputs, evaluating
from pyops.nn.effective import baked_hooks, effective, origin
from pyops.nn.linear import Int8Linear
from pyops.ops.int8_linear import FLOAT_DTYPES, MAX_K
from pyops.prune.shrink import undoing
from pyops.refusal import is_baked, is_lazy, layer_refusal
from pyops.report import UNCHANGED, Report, Row


@dataclasses.dataclass(frozen=True)
class Int8Dynamic(Config):
    """Every `nn.Linear` to `pyops.nn.Int8Linear`: int8 weight a channel, activations quantized a row at each call."""

    choice = "int8_dynamic"

    def matches(self, module: nn.Module) -> bool:
        """An `nn.Linear` or a subclass of it."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module) -> str | None:
        """Why `Int8Linear` cannot stand in its place."""
        reason = layer_refusal(module, nn.Linear, FLOAT_DTYPES)
        if reason is None and effective(module, "weight").shape[1] > MAX_K:
            return f"in_features above {MAX_K} could overflow the int32 sum"
        return reason

    def by_hand(self, module: nn.Module) -> str:
        """`Int8Linear.from_float`."""
        return "pyops.nn.Int8Linear.from_float(model)"

    def convert(self, module: nn.Module) -> nn.Module:
        """`Int8Linear.from_float`."""
        return Int8Linear.from_float(module)


def swap_(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Report:
    """Replace in place the layers that `config` is for; returns a report with a row for each of them.

    Args:
        model: any module that holds layers.
        config: what to do, such as `Int8Dynamic()`.
        filter_fn: called as filter_fn(module, qualified_name) for each layer that could be replaced; False leaves it
            as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. With them the model
            runs, in eval mode and without gradients, and each layer is measured against its replacement on its real
            input. It runs once, or a few times where the inputs of all layers would take much memory. Without example
            inputs times and SQNR are None.
        progress: show a bar on stderr; by default where layers are measured and stderr is a terminal. Needs tqdm.

    A layer found under several names is replaced once, at all of them, if the filter takes them all. Device, training
    flag, forward and backward hooks and the bias (the same Parameter) are kept; pruning and parametrizations are baked
    into the weight. A weight that is tied to another parameter is cut from it: the other one stays as it is.
    `nn.TransformerEncoderLayer` reads the weights of its layers in its own inference kernel, which is switched off for
    the layers that hold a replaced one.

    Raises:
        TypeError for arguments of a wrong type, ValueError if the model itself is the layer to replace (its caller
        holds it, so it cannot be replaced in place), if a weight holds NaN or Inf, or if the config lacks example
        inputs. After any exception, also one of the model's own forward or Ctrl-C, the model is exactly as it was.
    """
    _check(model, config, filter_fn)
    check_inputs(example_inputs)
    config.check(example_inputs)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if config.matches(module):
            names[module].append(name)
    training = {module: module.training for module in names}
    rows = {module: _row(module, found) for module, found in names.items()}
    replacements: dict[nn.Module, nn.Module] = {}
    with config.prepared(model, filter_fn, example_inputs) as changed:
        for module, what in changed.items():
            row, tensors = rows[module], _tensors(module)
            row.bytes_after, row.reason = _nbytes(tensors), what
            if tuple(tensors[0].shape) != row.shape:
                row.choice = "fewer_channels"
        with evaluating(model):
            replacements = _replaced(model, config, filter_fn, example_inputs, names, rows, progress)
        ties = _ties(model)
        for module, new in replacements.items():
            new.train(training[module])
            dropped = _hand_over(module, new)
            row = rows[module]
            row.bytes_after = _nbytes([*new.parameters(), *new.buffers()])
            row.reason = "; ".join([*_facts(row, module, names[module], ties), *dropped])
        with undoing(list(model.modules())):
            _commit(model, replacements, rows)
            done = config.finish(model, example_inputs)
        for row in rows.values():
            if row.name in done:
                row.add(done[row.name])
    return Report(list(rows.values()))


def _replaced(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    example_inputs: Any,
    names: dict[nn.Module, list[str]],
    rows: dict[nn.Module, Row],
    progress: bool | None,
) -> dict[nn.Module, nn.Module]:
    """The replacement of each layer that gets one, made and measured beside the model."""
    taken = []
    for module, found in names.items():
        refusal = config.refusal(module) or _filtered(module, found, filter_fn)
        if refusal:
            rows[module].add(refusal)
        else:
            taken.append(module)
    measured = example_inputs is not None
    inputs = captured_inputs(model, taken, example_inputs) if measured else ((module, None) for module in taken)
    show = measured if progress is None else progress
    replacements, shared = {}, {}
    for module, captured in _with_progress(inputs, len(taken), show, force=progress is True):
        row, name = rows[module], names[module][0]
        if captured is not None:
            row.input_shape = tuple(captured.x.shape)
        if captured is not None and captured.x.is_meta:
            row.input_shape = captured = None
        elif captured is None and measured:
            row.add("not called with these example_inputs")
        try:
            new = config.replace(Layer(module, name, row, captured, shared))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"layer {name!r}: {error}") from error
        if new is not None:
            replacements[module] = new
    return replacements


def _with_progress(layers: Iterable, total: int, show: bool, force: bool) -> Iterable:
    if not show or not (force or sys.stderr.isatty()):
        return layers
    try:
        from tqdm import tqdm
    except ImportError:  # a GPU machine on which nothing may be installed
        return layers
    return tqdm(layers, total=total, desc="pyops.swap_", unit="layer", leave=False)


def _check(model: nn.Module, config: Config, filter_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Config):
        hint = f"; write {config.__name__}()" if isinstance(config, type) and issubclass(config, Config) else ""
        got = config.__name__ if isinstance(config, type) else type(config).__name__
        raise TypeError(f"config must be an instance of a config such as Int8Dynamic(), got {got}{hint}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {type(filter_fn).__name__}")
    if config.matches(model):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place: convert it with "
            f"{config.by_hand(model)}, or wrap it in torch.nn.Sequential(model)"
        )


def _row(module: nn.Module, found: list[str]) -> Row:
    cls = type(module)
    kind = cls.__bases__[0] if nn.utils.parametrize.is_parametrized(module) else cls
    weight, bias = _tensors(module)
    shape = () if weight is None else tuple(weight.shape)
    size = _nbytes([weight, bias])
    return Row(found[0], kind.__name__, UNCHANGED, "", shape, size, size)


def _tensors(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if is_lazy(module) else (effective(module, "weight"), effective(module, "bias"))


def _nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _filtered(module: nn.Module, found: list[str], filter_fn: Callable | None) -> str | None:
    refused = [name for name in found if filter_fn is not None and not filter_fn(module, name)]
    if not refused:
        return None
    return "filter_fn" if len(found) == 1 else f"filter_fn refuses it as {', '.join(refused)}; it is also {found}"


def _ties(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter, by its identity."""
    ties = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties[id(parameter)].append(name)
    return ties


def _facts(row: Row, module: nn.Module, found: list[str], ties: dict[int, list[str]]) -> list[str]:
    facts = [row.reason] if row.reason else []
    if not row.bytes_after:
        facts.append("empty")
    elif row.bytes_after <= row.bytes_before:
        facts.append(f"{row.bytes_before / row.bytes_after:.1f}x smaller")
    else:
        facts.append(f"{row.bytes_after / row.bytes_before:.1f}x larger")
    if len(found) > 1:
        facts.append(f"the same layer as {', '.join(found[1:])}")
    made = origin(module)
    if made:
        facts.append(f"the weight was {made}, now baked in")
    own = {f"{name}.weight" for name in found}
    others = [name for name in ties.get(id(module._parameters.get("weight")), []) if name not in own]
    if others:
        facts.append(f"its weight was tied to {', '.join(others)}: the tie is cut, and that one stays")
    dropped = [key for key in module._buffers if not is_baked(module, key)]
    if dropped:
        facts.append(f"buffers dropped: {', '.join(dropped)}")
    return facts


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _hand_over(module: nn.Module, new: nn.Module) -> list[str]:
    """Give the replacement the hooks and the bias; returns what could not be given, in words."""
    for name in HOOKS:
        # The same dict objects: the handles that users hold go on to work.
        new.__dict__[name] = module.__dict__[name]
    baked = baked_hooks(module, "weight", "bias")
    if baked:
        kept = {key: hook for key, hook in module._forward_pre_hooks.items() if hook not in baked}
        new.__dict__["_forward_pre_hooks"] = type(module._forward_pre_hooks)(kept)
    bias = module._parameters.get("bias")
    if bias is not None and "bias" in new._parameters:
        new._parameters["bias"] = bias
    state_hooks = any(module.__dict__[name] for name in STATE_HOOKS)
    return ["hooks on its state_dict dropped"] if state_hooks and not baked else []


def _commit(model: nn.Module, replacements: dict[nn.Module, nn.Module], rows: dict[nn.Module, Row]) -> None:
    """Put the replacements into their places: assignments only, nothing here can fail."""
    for parent in list(model.modules()):
        held = [child for child in parent._modules.values() if child in replacements]
        if held and isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # what its forward asks before it takes its own kernel
            for child in held:
                rows[child].reason += "; nn.TransformerEncoderLayer's inference kernel is switched off"
        if isinstance(parent, nn.TransformerEncoder):
            layers = (layer for layer in parent.layers if isinstance(layer, nn.TransformerEncoderLayer))
            if any(layer.linear1 in replacements or layer.linear2 in replacements for layer in layers):
                parent.use_nested_tensor = False  # only that kernel takes nested tensors
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
