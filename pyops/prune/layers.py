"""Which layers are pruned, what is asked of them, and how a mask gets into one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from pyops.nn.effective import effective, origin

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
FilterFn = Callable[[nn.Module, str], bool]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One layer after pruning."""

    name: str
    """Its qualified name in the model, "" for the module itself; under several names the first."""
    kept: int
    """Weights that its mask keeps."""
    total: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned; 0 for a layer without weights."""
        return 1 - self.kept / self.total if self.total else 0.0


def find_layers(model: nn.Module, name: str, filter_fn: FilterFn | None) -> dict[nn.Module, str]:
    """{layer: its first qualified name} of what shall be pruned, checked.

    Takes the Conv1d, Conv2d and Linear in `model`, itself included, that have a parameter `name` and whose every name
    the filter takes. In a model, the out_proj of `nn.MultiheadAttention` is left out: the attention reads that weight
    without calling the layer, so the hook that applies a mask never runs.

    Raises:
        TypeError or ValueError if an argument, or one layer of those found, cannot be pruned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name must be the name of a parameter, got {type(name).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(module, name), got {type(filter_fn).__name__}")
    if not any(True for _ in model.children()) and not _supported(model):
        raise TypeError(f"module is a {type(model).__name__}; allowed: Conv1d, Conv2d, Linear, a model that has some")
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for fqn, module in model.named_modules(remove_duplicate=False):
        if _supported(module):
            names[module].append(fqn)
    taken = {m: f[0] for m, f in names.items() if filter_fn is None or all(filter_fn(m, fqn) for fqn in f)}
    layers = {m: fqn for m, fqn in taken.items() if m is model or _tensor_or_none(m, name) is not None}
    if not layers:
        if names and not taken:
            raise ValueError(f"filter_fn takes none of the {len(names)} layers that could be pruned")
        raise ValueError(f"module has nothing to prune: no Conv1d, Conv2d or Linear with a parameter {name!r}")
    for module, fqn in layers.items():
        check_layer(module, name, f"layer {fqn!r}: " if fqn else "")
    return layers


def check_layer(module: nn.Module, name: str, where: str = "") -> None:
    """Raise TypeError or ValueError if the parameter `name` of this layer cannot be pruned."""
    if not _supported(module):
        raise TypeError(f"{where}module is a {type(module).__name__}; allowed: Conv1d, Conv2d, Linear")
    if _lazy(module):
        raise ValueError(f"{where}the module is not initialized yet: run the model once")
    made = origin(module, name)
    if made is not None and made != "pruned":
        raise ValueError(f"{where}{name} is {made}: make it a plain parameter first")
    if pruning_hook(module, name) is None and module._parameters.get(name) is None:
        raise ValueError(f"{where}{type(module).__name__} has no parameter {name!r}")
    tensor = effective(module, name)
    assert tensor is not None
    if not tensor.is_floating_point():
        raise TypeError(f"{where}{name} is {tensor.dtype}; allowed: floating point")
    if tensor.is_meta:
        raise ValueError(f"{where}{name} is on the meta device: it has no values to compare")
    if tensor.isnan().any():
        raise ValueError(f"{where}{name} holds NaN")


def _tensor_or_none(module: nn.Module, name: str) -> Tensor | None:
    """`effective`, None for what the layer does not have; the uninitialized parameter of a lazy layer as it is."""
    if _lazy(module):
        return module._parameters.get(name)
    known = pruning_hook(module, name) is not None or isinstance(getattr(module, name, None), Tensor)
    return effective(module, name) if known else None


def mask_of(module: nn.Module, name: str) -> Tensor:
    """True where the parameter `name` is kept; all True if it is not pruned."""
    if pruning_hook(module, name) is not None:
        return module._buffers[f"{name}_mask"] != 0
    return torch.ones_like(module._parameters[name], dtype=torch.bool)


def pruning_hook(module: nn.Module, name: str) -> BasePruningMethod | None:
    """torch's pruning of the parameter `name`: a method, or the PruningContainer of several."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None


def install(module: nn.Module, name: str, method: BasePruningMethod, mask: Tensor) -> BasePruningMethod:
    """Prune the parameter `name` by `mask`, on top of what is pruned; returns the hook that does it from now on.

    As `BasePruningMethod.apply` would leave it, with two differences. The mask buffer of a pruned layer is changed in
    place, so what holds it (a compiled model, a CUDA graph) goes on to be right. And the method takes the place of an
    earlier one of its class, alone or in the container: a schedule that prunes a hundred times leaves one.
    """
    method._tensor_name = name
    old = pruning_hook(module, name)
    with torch.inference_mode(False), torch.no_grad():
        if old is None:
            weight = module._parameters[name]
            buffer = torch.empty_like(weight.detach()).copy_(mask)
            module.register_parameter(f"{name}_orig", weight)
            del module._parameters[name]
            module.register_buffer(f"{name}_mask", buffer)
            module.register_forward_pre_hook(method)
            hook = method
        else:
            module._buffers[f"{name}_mask"].mul_(mask)
            hook = _combined(old, method)
            key = next(key for key, value in module._forward_pre_hooks.items() if value is old)
            module._forward_pre_hooks[key] = hook  # at the same place among the hooks, and the handle goes on to work
    setattr(module, name, hook.apply_mask(module))
    return hook


def _combined(old: BasePruningMethod, method: BasePruningMethod) -> BasePruningMethod:
    if type(old) is type(method):
        return method
    if isinstance(old, PruningContainer):
        old._pruning_methods = tuple(m for m in old if type(m) is not type(method))
    else:
        old = PruningContainer(old)
    old.add_pruning_method(method)
    return old


def _supported(module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
