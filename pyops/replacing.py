"""How one layer of a model takes the place of another: what it is given, where it is put, what there is to say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from pyops.nn.effective import baked_hooks, effective, origin
from pyops.refusal import is_baked, is_lazy
from pyops.report import Row

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


def weight_and_bias(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the layer computes with; None twice for a lazy layer."""
    return (None, None) if is_lazy(module) else (effective(module, "weight"), effective(module, "bias"))


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of these tensors; None has none."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def names_of_weights(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, list[str]]:
    """For each layer all names that its weight has as a parameter of the model: its own, and those that are tied."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {layer: names.get(id(layer._parameters.get("weight")), []) for layer in layers}


def parents_of(model: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """For each layer the modules that have to change when it is replaced."""
    parents: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in layers}
    encoders = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            encoders.append(module)
        for child in set(module._modules.values()) & parents.keys():
            parents[child].append(module)
    return {layer: [*own, *encoders] for layer, own in parents.items()}


def complete(module: nn.Module, new: nn.Module, row: Row, found: list[str], tied: list[str]) -> None:
    """Give the replacement what the layer has, and its row what there is to say."""
    dropped = _hand_over(module, new)
    row.bytes_after = nbytes([*new.parameters(), *new.buffers()])
    row.reason = "; ".join([*_facts(row, module, new, found, tied), *dropped])


def _facts(row: Row, module: nn.Module, new: nn.Module, found: list[str], tied: list[str]) -> list[str]:
    facts = [row.reason] if row.reason else []
    if not row.bytes_before or not row.bytes_after:
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
    others = [name for name in tied if name not in own]
    if others:
        facts.append(f"its weight was tied to {', '.join(others)}: the tie is cut, and that one stays")
    dropped = [key for key in module._buffers if not is_baked(module, key) and key not in new._buffers]
    if dropped:
        facts.append(f"buffers dropped: {', '.join(dropped)}")
    return facts


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


def commit(parents: list[nn.Module], replacements: dict[nn.Module, nn.Module], rows: dict[nn.Module, Row]) -> None:
    """Put the replacements into their places: assignments only, nothing here can fail."""
    for parent in parents:
        held = [child for child in parent._modules.values() if child in replacements]
        if held and isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # what its forward asks before it takes its own kernel
            for child in held:
                rows[child].reason += "; nn.TransformerEncoderLayer's inference kernel is switched off"
        if isinstance(parent, nn.TransformerEncoder):
            layers = (layer for layer in parent.layers if isinstance(layer, nn.TransformerEncoderLayer))
            if any(layer.linear1 in replacements or layer.linear2 in replacements for layer in layers):
                parent.use_nested_tensor = False  # only that kernel takes nested tensors
    for parent in parents:
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
