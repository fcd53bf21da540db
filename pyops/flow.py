"""Which modules of a model feed which: how the pairs that can be made one are found.

Read from a trace by `torch.fx`, else watched while the model runs, else of neighbours in an `nn.Sequential`. A pair is
a layer, and a follower that takes its output: a normalization, an activation. A plain `nn.Identity` between them is
looked through.
"""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from pyops.measure import call, evaluating
from pyops.trace import owners, trace

Asks = Callable[[nn.Module], bool]
LOOKS = frozenset({"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point"})
"""Methods that only look at a tensor's form, which making one of two does not change."""
FORM = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"})
"""Attributes that are part of it."""


class Flow:
    """What is seen of a model: modules, or words for what is no module."""

    def __init__(self, is_layer: Asks, is_follower: Asks) -> None:
        self.is_layer, self.is_follower = is_layer, is_follower
        self.uses: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        """For each layer, what takes its outputs."""
        self.sources: dict[nn.Module, list[nn.Module | str]] = defaultdict(list)
        """For each follower, what gives its inputs."""
        self.reads: dict[nn.Module, list[str]] = defaultdict(list)
        """For each module, what uses it in other ways than calling it."""
        self.dims: dict[nn.Module, set[int]] = defaultdict(set)
        """For each follower, the number of dimensions of its inputs, where that was seen."""
        self.unseen = ""
        """What to say of a module that is not in it."""

    def read_by(self, module: nn.Module) -> str:
        """What else uses a module, in words; "" if nothing does."""
        return ", ".join(dict.fromkeys(self.reads.get(module, [])))


def find_flow(model: nn.Module, example_inputs: Any, is_layer: Asks, is_follower: Asks, confirm: bool = False) -> Flow:
    """The flow from layers to followers. Raises what the model's forward raises, if it is run.

    `confirm` runs it on example inputs, if there are any, after a trace as well, and adds what only the run shows: fx
    takes another way than a run where the model asks if something is a tensor.
    """
    flow, run, failure = Flow(is_layer, is_follower), Flow(is_layer, is_follower), ""
    try:
        _traced(model, flow)
    except Exception as error:  # whatever a model's own code raises on fx's proxies
        failure = f"{type(error).__name__}: {error}".strip().split("\n")[0][:100]
    if example_inputs is not None and (failure or confirm):
        _watched(model, example_inputs, run)
    if not failure:
        flow.unseen = "never called by the model's forward"
        _confirm(flow.uses, run.uses, is_follower)
        _confirm(flow.sources, run.sources, is_layer)
        return flow
    if example_inputs is not None:
        run.unseen = "not called with these example_inputs"
        return run
    flow = Flow(is_layer, is_follower)
    _neighbours(model, flow)
    flow.unseen = f"the model cannot be traced ({failure}): give example_inputs"
    return flow


def _confirm(traced: dict[nn.Module, list], run: dict[nn.Module, list], pairs: Asks) -> None:
    """Add what only a run has seen, where it matters: to what could be a pair."""
    for module, found in run.items():
        known = traced[module]
        if all(isinstance(other, nn.Module) and pairs(other) for other in known):
            known += [other for other in found if other not in known]


def said(what: nn.Module | str, names: dict[nn.Module, str]) -> str:
    """A module or something else, in words."""
    return what if isinstance(what, str) else f"{names[what]} ({type(what).__name__})"


def hooked(module: nn.Module, inputs: bool = False) -> bool:
    """True if hooks see the module's output or gradients, or also its inputs."""
    names = ["_forward_hooks", "_backward_hooks", "_backward_pre_hooks", *["_forward_pre_hooks"] * inputs]
    return any(module.__dict__.get(name) for name in names)


def passes_on(module: nn.Module) -> bool:
    """True for an `nn.Identity` that nobody watches."""
    return type(module) is nn.Identity and "forward" not in module.__dict__ and not hooked(module, inputs=True)


def only_looks(node: fx.Node) -> bool:
    """True for a node that takes no more of a tensor than its form."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in FORM
    return node.op == "call_method" and node.target in LOOKS


def _traced(model: nn.Module, flow: Flow) -> None:
    seen_by_hooks: dict[fx.Node, list[str]] = defaultdict(list)
    graph = trace(model, leaf=flow.is_follower, seen_by_hooks=seen_by_hooks)
    modules = dict(model.named_modules(remove_duplicate=False))
    owned = owners(model, lambda module: flow.is_layer(module) or flow.is_follower(module))

    def passes(node: fx.Node) -> bool:
        return node.op == "call_module" and passes_on(modules[node.target])

    def described(node: fx.Node) -> nn.Module | str:
        if node.op == "call_module":
            return modules[node.target]
        words = {"output": "the model's output", "placeholder": f"the model's input {node.target}"}
        return words.get(node.op, getattr(node.target, "__name__", str(node.target)))

    def takers(node: fx.Node) -> list[nn.Module | str]:
        found: list[nn.Module | str] = list(seen_by_hooks[node])
        for user in node.users:
            if passes(user):
                found += takers(user)
            elif not only_looks(user):
                found.append(described(user))
        return found

    def givers(node: fx.Node) -> list[nn.Module | str]:
        found = []
        for source in node.all_input_nodes:
            found += givers(source) if passes(source) else [described(source)]
        return found

    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            flow.uses[module] += takers(node)
            if flow.is_follower(module):
                flow.sources[module] += givers(node)
            for held in itertools.islice(module.modules(), 1, None):
                flow.reads[held].append(f"a {type(module).__name__} that holds it")
        elif node.op == "get_attr" and takers(node):
            parent, _, name = node.target.rpartition(".")
            owner = owned.get(id(getattr(modules.get(parent), name, None)))
            if owner is not None:
                flow.reads[owner].append(f"code that reads {node.target}")


def _neighbours(model: nn.Module, flow: Flow) -> None:
    """Children of an `nn.Sequential` feed one another; what any other module does with its children is unknown."""
    for parent in model.modules():
        children = [child for child in parent._modules.values() if child is not None]
        if type(parent).forward is not nn.Sequential.forward or "forward" in parent.__dict__:
            for child in children:
                flow.reads[child].append(f"a {type(parent).__name__} that holds it")
            continue
        children = [child for child in children if not passes_on(child)]
        for first, second in itertools.pairwise(["the input of a Sequential", *children, "the end of a Sequential"]):
            if isinstance(first, nn.Module):
                flow.uses[first].append(second)
            if isinstance(second, nn.Module) and flow.is_follower(second):
                flow.sources[second].append(first)


class _Watch(TorchFunctionMode):
    """Sees what every torch function is given, while hooks see what every module is given."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.owners = owners(model, lambda module: flow.is_layer(module) or flow.is_follower(module))
        # Of a pruned layer each forward makes a new `weight`: were the old one freed, another tensor might get its id.
        self.alive = [module.__dict__.get("weight") for module in model.modules()]
        self.made: dict[int, tuple[TensorWeakRef, nn.Module]] = {}  # by id, which is only good while the tensor lives
        self.inside: list[nn.Module] = []
        """Layers and followers that run at this moment, the innermost last."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        looks = name in LOOKS or (name == "__get__" and getattr(func.__self__, "__name__", "") in FORM)
        for tensor in () if looks else tree_leaves((args, kwargs)):
            maker, owner = self.maker(tensor), self.owners.get(id(tensor))
            if maker is not None:
                self.flow.uses[maker].append(self.inside[-1] if self.inside else name)
            if owner is not None and owner not in self.inside:
                self.flow.reads[owner].append(f"code that reads its tensors in {name}")
        return func(*args, **kwargs)

    def maker(self, tensor: Any) -> nn.Module | None:
        """The layer whose output this very tensor is."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self.made:
            return None
        ref, layer = self.made[id(tensor)]
        return layer if ref() is tensor else None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of layers and followers, ahead of the hooks that read the module's own tensors."""
        self.inside.append(module)
        if self.flow.is_follower(module):
            x = args[0] if args else next(iter(kwargs.values()), None)
            layer = self.maker(x)
            self.flow.sources[module].append("something else than a layer" if layer is None else layer)
            if layer is not None:
                self.flow.uses[layer].append(module)
                self.flow.dims[module].add(x.dim())

    def after(self, module: nn.Module, args: tuple, y: Any) -> None:
        """Forward hook of the same, also called after an exception."""
        self.inside.pop()
        if not isinstance(y, Tensor):
            return
        self.made.pop(id(y), None)  # of a follower that works in place it is the layer's output no more
        if not self.flow.is_follower(module):
            self.made[id(y)] = TensorWeakRef(y), module

    def kept(self) -> list[nn.Module]:
        """Layers with an output that somebody still holds."""
        gc.collect()  # frames in cycles hold tensors too
        return [layer for ref, layer in self.made.values() if ref() is not None]


def _watched(model: nn.Module, example_inputs: Any, flow: Flow) -> None:
    watch, handles = _Watch(model, flow), []
    try:
        for module in model.modules():
            if flow.is_layer(module) or flow.is_follower(module):
                handles.append(module.register_forward_pre_hook(watch.before, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.after, always_call=True))
        with evaluating(model), watch:
            result = call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in watch.kept():
        flow.uses[layer].append("the model's result, or an attribute that keeps it")
    del result  # held until here, whatever its type is
