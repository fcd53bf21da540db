"""Let pyops layers add the residual that is added to their output, before the activation that follows the addition.

    y = act(op(x) + bias + residual)

in one pass over memory. The addition is code in some module's forward, which therefore has to change: `torch.fx` traces
that module alone, and the graph, with fused calls in it, becomes the forward of a subclass that the module is given.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pyops.edit import undoing
from pyops.flow import hooked, only_looks, passes_on
from pyops.fuse import Fused, fuse_activations_, is_pyops_layer, layer_refusal, name_of
from pyops.measure import call, check_inputs, evaluating
from pyops.trace import trace

ADDS = (operator.add, operator.iadd, torch.add)
ADD_METHODS = ("add", "add_")
PURE = frozenset({operator.getitem, operator.add, operator.mul, torch.add, F.pad})
"""Functions that write to none of their arguments."""
FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.gelu: "gelu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    **dict.fromkeys((F.sigmoid, torch.sigmoid), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh), "tanh"),
}
METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def fuse_residuals_(model: nn.Module, example_inputs: Any) -> list[Fused]:
    """`fuse_activations_`, then the additions and activations that only a module's own code shows; a row a layer.

    Found are, in the forward of any module inside the model or of the model itself: a pyops layer whose output goes
    only into `+`, `+=` or `torch.add` with a tensor of the same shape and dtype, with or without an activation behind
    it; and one whose output goes only into an activation, also a function or a module that is called elsewhere too.

    In place: the module that does the addition gets a forward generated from its trace, and a subclass of its class
    that has it; its attributes, hooks, children and `state_dict` are untouched. Such a model can be copied, but not be
    pickled as a whole. The forward must be straight code on tensors: it must not depend on values, on the mode, set
    attributes, or pass through modules with hooks. Whatever else it does in Python, such as printing, is lost, and what
    it decides by other attributes is fixed. It is checked that its trace gives what it gives itself, for every call
    while the model runs on `example_inputs`, in eval mode and without gradients. A residual that has another shape or
    dtype with other inputs, so that `+` would broadcast or promote it, raises later.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`.

    Raises:
        TypeError for arguments of a wrong type. After any exception, also one of the model's own forward, nothing is
        changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_inputs(example_inputs)
    if example_inputs is None:
        raise TypeError("example_inputs is None: the shapes of the model's tensors are needed")
    with undoing(list(model.modules())):
        rows = {row.layer: row for row in fuse_activations_(model, example_inputs)}
        names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in model.named_modules(remove_duplicate=False):
            names[module].append(name)
        blocks, failures = _blocks(names)
        if blocks:
            _check(model, example_inputs, blocks)
        changes = [(block, block.rewritten()) for block in blocks.values() if block.found]
        for layer, failure in failures.items():
            row = rows[names[layer][0]]
            if not row.fused:
                rows[row.layer] = dataclasses.replace(row, reason=f"{row.reason}; {failure}")
        for block, kind in changes:
            for found in block.found:
                act = None if found.activation == "none" else found.activation
                does = [*["the residual"] * (found.add is not None), *[f"activation {act}"] * (act is not None)]
                where = f"{names[block.module][0] or 'the model'} ({kind.__name__})"
                name = names[found.layer][0]
                rows[name] = Fused(name, act, True, f"{' and '.join(does)} in place of code in {where}")
        for block, kind in changes:  # nothing here can fail
            for found in block.found:
                found.layer.activation = found.activation
            block.module.__class__ = kind
    return list(rows.values())


@dataclasses.dataclass
class _Found:
    """A layer's call in a graph, and what it shall do in one pass with it."""

    layer: nn.Module
    call: fx.Node
    value: fx.Node
    """The last node that has the value of the call: itself, or an `nn.Identity`."""
    add: fx.Node | None
    act: fx.Node | None
    activation: str


class _Block:
    """A module whose forward is a graph."""

    def __init__(self, module: nn.Module, graph: fx.Graph, found: list[_Found]) -> None:
        self.module, self.graph, self.found = module, graph, found
        self.calls = 0

    def rewritten(self) -> type[nn.Module]:
        """The module's class with a forward in which all that is found is fused."""
        for found in self.found:
            self._fuse(found)
        self.graph.lint()
        kind, code = type(self.module), self.graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, f"<pyops.fuse_residuals_ {kind.__qualname__}>", "exec"), scope)
        body = {"forward": scope["forward"], "__doc__": kind.__doc__, "__module__": kind.__module__}
        return type(kind.__name__, (kind,), {**body, "__qualname__": kind.__qualname__})

    def _fuse(self, found: _Found) -> None:
        last, new = found.act or found.add, found.call
        if found.add is not None:
            residual = _residual(found.add, found.value)
            with self.graph.inserting_before(found.add):
                new = self.graph.call_module(found.call.target, (*found.call.args, residual))
        last.replace_all_uses_with(new)
        node = last
        while node is not new:
            before = found.value if node is found.add else next(iter(node.all_input_nodes), new)
            self.graph.erase_node(node)
            node = new if node is found.call else before


def _blocks(names: dict[nn.Module, list[str]]) -> tuple[dict[nn.Module, _Block], dict[nn.Module, str]]:
    """(modules with something to fuse in their forward, why the code around a layer is not a graph).

    The inner ones come first: they are nodes of the outer ones.
    """
    blocks: dict[nn.Module, _Block] = {}
    failures: dict[nn.Module, str] = {}
    for module in reversed(list(names)):
        layers = [m for m in module.modules() if is_pyops_layer(m) and not layer_refusal(m)]
        if not layers or type(module).__module__.startswith(("torch.nn", "pyops.nn")):
            continue
        try:
            graph = _graph(module, blocks)
        except Exception as error:  # whatever a model's own code raises on fx's proxies
            failure = f"{type(error).__name__}: {error}".strip().split("\n")[0][:100]
            for layer in layers:
                failures.setdefault(layer, f"{names[module][0] or 'the model'} cannot be traced ({failure})")
            continue
        found = _find(module, graph, names)
        if found:
            blocks[module] = _Block(module, graph, found)
    return blocks, failures


def _graph(module: nn.Module, blocks: dict[nn.Module, _Block]) -> fx.Graph:
    """The graph of its forward, where that is all there is to it; raises if not."""
    seen: dict[fx.Node, list[str]] = defaultdict(list)
    flags = [(m, m.training) for m in module.modules()]
    graphs = []
    try:
        for mode in (True, False):
            for m, _ in flags:
                m.training = mode
            graphs.append(trace(module, lambda m: m in blocks or name_of(m) is not None, seen, setting="refused"))
    finally:
        for m, training in flags:
            m.training = training
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        raise TypeError("its forward depends on the mode")
    if seen:
        raise TypeError("hooks see what is traced through")
    return graphs[0]


def _find(module: nn.Module, graph: fx.Graph, names: dict[nn.Module, list[str]]) -> list[_Found]:
    modules = dict(module.named_modules(remove_duplicate=False))
    nodes: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            nodes[modules[node.target]].append(node)
    found = []
    for layer, calls in nodes.items():
        if not is_pyops_layer(layer) or layer_refusal(layer) or len(calls) > 1:
            continue
        node = calls[0]
        inside = [f"{prefix}.".lstrip(".") for prefix in names[module]]
        if len(node.args) != 1 or node.kwargs or not all(name.startswith(tuple(inside)) for name in names[layer]):
            continue
        value, user = _end(node, modules)
        if user is None:
            continue
        if _residual(user, value) is not None and all(_writes_nothing(n, modules) for n in _between(node, user)):
            total, act = _end(user, modules)
            activation = "none" if act is None else _activation(act, total, modules)
            found.append(_Found(layer, node, value, user, act if activation != "none" else None, activation))
        elif _activation(user, value, modules) != "none":
            found.append(_Found(layer, node, value, None, user, _activation(user, value, modules)))
    # Two layers that are added up: the second adds the first.
    return list({f.add or f.act: f for f in found}.values())


def _end(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node | None]:
    """(the last node that has the value of this one, its only user); None if several use it."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_module" and passes_on(modules[user.target]):
            node = user
            continue
        return node, None if user.op == "output" else user
    return node, None


def _residual(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """What this node adds to `value`; None if it does something else."""
    function = node.op == "call_function" and node.target in ADDS
    method = node.op == "call_method" and node.target in ADD_METHODS
    if not (function or method) or node.kwargs or len(node.args) != 2 or len(set(node.all_input_nodes)) != 2:
        return None
    a, b = node.args
    if node.target in (operator.iadd, "add_") and a is not value:
        return None  # it writes to the other tensor, which someone may look at
    return b if a is value else a


def _activation(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The name of the activation that this node applies to `value`; "none" if it is none."""
    if node.args != (value,) or node.kwargs.keys() - {"inplace"}:
        return "none"
    if node.op == "call_module":
        module = modules[node.target]
        return "none" if hooked(module, inputs=True) else name_of(module) or "none"
    table = {"call_function": FUNCTIONS, "call_method": METHODS}.get(node.op, {})
    return table.get(node.target, "none")


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _writes_nothing(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """True if a layer may as well run after this node as before it."""
    if node.op == "call_module":
        module = modules[node.target]
        known = type(module).__module__.startswith(("torch.nn", "pyops.nn"))
        return known and not any(getattr(m, "inplace", False) for m in module.modules())
    if node.op == "call_function" and node.target in PURE:
        return True
    return node.op in ("get_attr", "placeholder") or only_looks(node)


# ------------------------------------------------------------------------------------------- the check by a run


class _Interpreter(fx.Interpreter):
    """Runs a block's graph and drops what cannot be fused with these shapes and dtypes."""

    def __init__(self, block: _Block) -> None:
        super().__init__(block.module, graph=block.graph)
        self.block = block
        self.adds = {found.add: found for found in block.found if found.add is not None}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.adds:
            y, r = (self.env.get(node) for node in n.all_input_nodes)
            tensors = isinstance(y, Tensor) and isinstance(r, Tensor)
            if not tensors or (y.shape, y.dtype, y.device) != (r.shape, r.dtype, r.device):
                self.block.found.remove(self.adds[n])
        return super().run_node(n)


def _check(model: nn.Module, example_inputs: Any, blocks: dict[nn.Module, _Block]) -> None:
    """Run the model; nothing stays found in blocks whose graph does anything else than their forward."""
    expected: list[Any] = []
    calls: dict[nn.Module, int] = defaultdict(int)
    checking: list[nn.Module] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if checking:
            return
        block = blocks[module]
        block.calls += 1
        checking.append(module)
        try:
            given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            given = [value.clone() for value in list(given.values())[1:]]  # anything else than a tensor raises
            if len(given) != sum(node.op == "placeholder" for node in block.graph.nodes):
                raise TypeError("the graph is of a call with all arguments")
            expected.append(_Interpreter(block).run(*given))
        except Exception:  # it cannot be called in this way, so it is not a graph of tensors
            expected.append(None)
        finally:
            checking.pop()

    def after(module: nn.Module, args: tuple, y: Any) -> None:
        if checking:
            return
        mine = expected.pop()
        same = isinstance(y, Tensor) and isinstance(mine, Tensor) and (y.shape, y.dtype) == (mine.shape, mine.dtype)
        if not same or not torch.allclose(y, mine, equal_nan=True):
            blocks[module].found.clear()

    def count(layer: nn.Module, args: tuple) -> None:
        calls[layer] += not checking

    handles = []
    try:
        for module, block in blocks.items():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, prepend=True))
            handles += [found.layer.register_forward_pre_hook(count) for found in block.found]
        with evaluating(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    for block in blocks.values():
        block.found = [found for found in block.found if calls[found.layer] == block.calls]
