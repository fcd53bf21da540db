"""Replace the layers of a model that one already has: `swap_(model, config)`.

Nothing is touched before everything has worked: layers are converted and measured beside the model, and only then put
into their places, which cannot fail.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyops.measure import capture, check_inputs, compare, evaluating
from pyops.nn.effective import baked_hooks, effective, origin
from pyops.nn.linear import Int8Linear
from pyops.ops.int8_linear import FLOAT_DTYPES, MAX_K
from pyops.report import UNCHANGED, Report, Row


class Config:
    """Which layers a swap is for and what it makes of them; subclasses are small frozen dataclasses."""

    choice: str
    """The name of this choice in a report."""

    def matches(self, module: nn.Module) -> bool:
        """True if `module` is of the kind that this config is for: it gets a row, converted or not."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that matches must stay as it is; None if it can be converted."""
        raise NotImplementedError

    def convert(self, module: nn.Module) -> nn.Module:
        """The replacement. Must not change `module`; may raise."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Int8Dynamic(Config):
    """Every `nn.Linear` to `pyops.nn.Int8Linear`: int8 weight a channel, activations quantized a row at each call."""

    choice = "int8_dynamic"

    def matches(self, module: nn.Module) -> bool:
        """An `nn.Linear` or a subclass of it."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module) -> str | None:
        """Why `Int8Linear` cannot stand in its place."""
        return linear_refusal(module)

    def convert(self, module: nn.Module) -> nn.Module:
        """`Int8Linear.from_float`."""
        return Int8Linear.from_float(module)


def linear_refusal(linear: nn.Linear) -> str | None:
    """Why a layer that is an `nn.Linear` by type cannot be replaced by one of ours; None if it can."""
    if isinstance(linear, LazyModuleMixin) and linear.has_uninitialized_params():
        return "not initialized yet: run the model once"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "its parent (nn.MultiheadAttention) reads the weight instead of calling the layer"
    if "forward" in linear.__dict__ or type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    if type(linear).__call__ is not nn.Linear.__call__:
        return f"{type(linear).__name__} has a __call__ of its own"
    own = {key for key, value in linear._parameters.items() if value is not None} - {"weight", "bias"}
    own = {key for key in own if not _baked(linear, key)} | {
        key for key in linear._modules if key != "parametrizations"
    }
    if own:
        return f"holds more than a weight and a bias: {', '.join(sorted(own))}"
    weight, bias = effective(linear, "weight"), effective(linear, "bias")
    if weight is None:
        return "has no weight"
    if type(weight) not in (torch.Tensor, nn.Parameter, torch._subclasses.FakeTensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES or (bias is not None and bias.dtype not in FLOAT_DTYPES):
        return f"{weight.dtype if bias is None else bias.dtype} is not supported"
    if weight.shape[1] > MAX_K:
        return f"in_features above {MAX_K} could overflow the int32 sum"
    return None


def swap_(
    model: nn.Module,
    config: Config,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    example_inputs: Any = None,
) -> Report:
    """Replace in place the layers that `config` is for; returns a report with a row for each of them.

    Args:
        model: any module that holds layers.
        config: what to do, such as `Int8Dynamic()`.
        filter_fn: called as filter_fn(module, qualified_name) for each layer that could be replaced; False leaves it
            as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. With them the model
            runs once, in eval mode and without gradients, and each layer is measured against its replacement on its
            real input. Without them times and SQNR are None.

    A layer found under several names is replaced once, at all of them, if the filter takes them all. Device, training
    flag, forward and backward hooks and the bias (the same Parameter) are kept; pruning and parametrizations are baked
    into the weight. A weight that is tied to another parameter is cut from it: the other one stays as it is.
    `nn.TransformerEncoderLayer` reads the weights of its layers in its own inference kernel, which is switched off for
    the layers that hold a replaced one.

    Raises:
        TypeError for arguments of a wrong type, ValueError if the model itself is the layer to replace (its caller
        holds it, so it cannot be replaced in place) or if a weight holds NaN or Inf. After any exception, also one of
        the model's own forward, the model is exactly as it was.
    """
    _check(model, config, filter_fn)
    check_inputs(example_inputs)
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if config.matches(module):
            names[module].append(name)
    training = {module: module.training for module in names}
    rows: dict[nn.Module, Row] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    with evaluating(model):
        for module, found in names.items():
            rows[module] = row = _row(module, found)
            refusal = config.refusal(module) or _filtered(module, found, filter_fn)
            if refusal:
                row.reason = refusal
                continue
            try:
                replacements[module] = config.convert(module)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"layer {found[0]!r}: {error}") from error
        if example_inputs is not None:
            _measure(model, rows, replacements, example_inputs)
    ties = _ties(model)
    for module, new in replacements.items():
        new.train(training[module])
        dropped = _hand_over(module, new)
        row = rows[module]
        row.choice = config.choice
        row.bytes_after = _nbytes([*new.parameters(), *new.buffers()])
        row.reason = "; ".join([*_facts(row, module, names[module], ties), *dropped])
    _commit(model, replacements, rows)
    return Report(list(rows.values()))


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
            "pyops.nn.Int8Linear.from_float(model), or wrap it in torch.nn.Sequential(model)"
        )


def _row(module: nn.Module, found: list[str]) -> Row:
    cls = type(module)
    kind = cls.__bases__[0] if nn.utils.parametrize.is_parametrized(module) else cls
    lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    weight, bias = (None, None) if lazy else (effective(module, "weight"), effective(module, "bias"))
    shape = () if weight is None else tuple(weight.shape)
    size = _nbytes([weight, bias])
    return Row(found[0], kind.__name__, UNCHANGED, "", shape, size, size)


def _nbytes(tensors: list[torch.Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _baked(module: nn.Module, key: str) -> bool:
    """True if this parameter or buffer only serves to make the weight or bias: weight_orig, weight_mask, weight_g …"""
    return any(key.startswith(name + "_") and baked_hooks(module, name) for name in ("weight", "bias"))


def _filtered(module: nn.Module, found: list[str], filter_fn: Callable | None) -> str | None:
    refused = [name for name in found if filter_fn is not None and not filter_fn(module, name)]
    if not refused:
        return None
    return "filter_fn" if len(found) == 1 else f"filter_fn refuses it as {', '.join(refused)}; it is also {found}"


def _measure(
    model: nn.Module, rows: dict[nn.Module, Row], replacements: dict[nn.Module, nn.Module], example_inputs: Any
) -> None:
    inputs = capture(model, replacements, example_inputs)
    for module, new in replacements.items():
        if module in inputs and not inputs[module].x.is_meta:
            row = rows[module]
            row.input_shape = tuple(inputs[module].x.shape)
            # forward, not __call__: hooks belong to the model and shall not see these calls.
            row.ms_before, row.ms_after, row.sqnr_db = compare(module.forward, new.forward, inputs[module])
        elif module not in inputs:
            rows[module].reason = "not called with these example_inputs"


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
    dropped = [key for key in module._buffers if not _baked(module, key)]
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
