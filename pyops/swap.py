"""Replace the layers of a model that one already has: `swap_(model, config)`.

Nothing is touched before everything has worked: layers are converted and measured beside the model, and only then put
into their places, which cannot fail. Where memory counts more than that, they are replaced one by one.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from pyops.config import Config, FilterFn, Layer
from pyops.measure import Captured, captured_inputs, check_inputs, evaluating
from pyops.memory import give_back_freed
from pyops.progress import progress_wanted, with_progress
from pyops.prune.shrink import undoing
from pyops.quantize import Int8Dynamic as Int8Dynamic
from pyops.reads import reads_weight
from pyops.replacing import commit, names_of_weights, nbytes, parents_of, weight_and_bias
from pyops.report import UNCHANGED, Report, Row


def swap_(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
    one_by_one: bool = False,
) -> Report:
    """Replace in place the layers that `config` is for; returns a report with a row for each of them.

    Args:
        model: any module that holds layers.
        config: what to do, such as `Int8Dynamic()` or `Int4Weight()`.
        filter_fn: called as filter_fn(module, qualified_name) for each layer that could be replaced; False leaves it
            as it is.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments for `model`. With them the model
            runs, in eval mode and without gradients, and each layer is measured against its replacement on its real
            input. It runs once, or a few times where the inputs of all layers would take much memory. Without example
            inputs times and SQNR are None.
        progress: show bars on stderr; by default where layers are measured or calibrated and stderr is a terminal.
            Needs tqdm.
        one_by_one: put each layer into its place as soon as it is made, and let go of the one before: while `swap_`
            runs, hardly more than one layer is there twice. By default all layers are made beside the model, which then
            takes the memory of both. Where the model runs more than once, later layers are measured on what the layers
            replaced so far give.

    A layer found under several names is replaced once, at all of them, if the filter takes them all. Device, training
    flag, forward and backward hooks and the bias (the same Parameter) are kept; pruning and parametrizations are baked
    into the weight. A weight that is tied to another parameter is cut from it: the other one stays as it is.
    `nn.TransformerEncoderLayer` reads the weights of its layers in its own inference kernel, which is switched off for
    the layers that hold a replaced one.

    Raises:
        TypeError for arguments of a wrong type, ValueError if the model itself is the layer to replace (its caller
        holds it, so it cannot be replaced in place), if a weight holds NaN or Inf, or if the config lacks example
        inputs, or changes more than layers with one_by_one. After any exception, also one of the model's own forward or
        Ctrl-C, the model is exactly as it was. With one_by_one, weights and arguments are looked at before the first
        layer is replaced; after an exception that comes later, layers replaced so far stay replaced, at all places.
    """
    _check(model, config, filter_fn)
    _check_one_by_one(one_by_one, config)
    check_inputs(example_inputs)
    config.check(example_inputs)
    names = _found(model, config)
    rows = {module: _row(module, found) for module, found in names.items()}
    report = Report(list(rows.values()))
    swap = _swap_one_by_one if one_by_one else _swap_together
    with progress_wanted(progress):
        swap(model, config, filter_fn, example_inputs, names, rows)
    names.clear()  # the last to hold what was replaced
    rows.clear()
    give_back_freed()
    return report


def _swap_together(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    example_inputs: Any,
    names: dict[nn.Module, list[str]],
    rows: dict[nn.Module, Row],
) -> None:
    """Make and measure all layers beside the model, then put them into their places."""
    training = {module: module.training for module in names}
    with config.prepared(model, filter_fn, example_inputs) as changed:
        for module, what in changed.items():
            row, held = rows[module], weight_and_bias(module)
            row.bytes_after, row.reason = nbytes(held), what
            if tuple(held[0].shape) != row.shape:
                row.choice = "fewer_channels"
        with evaluating(model):
            replacements = _replaced(model, config, filter_fn, example_inputs, names, rows)
        tied = names_of_weights(model, names)
        for module, new in replacements.items():
            new.train(training[module])
            config.complete(module, new, rows[module], names[module], tied[module])
        modules = list(model.modules())
        with undoing(modules):
            commit(modules, replacements, rows)
            done = config.finish(model, example_inputs)
        for row in rows.values():
            if row.name in done:
                row.add(done[row.name])


def _found(model: nn.Module, config: Config) -> dict[nn.Module, list[str]]:
    """The layers that the config is for, with all their names."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if config.matches(module):
            names[module].append(name)
    return names


def _taken(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    names: Mapping[nn.Module, list[str]],
    rows: Mapping[nn.Module, Row],
) -> list[nn.Module]:
    """The layers to replace; the rows of the others say why they stay."""
    taken = []
    for module, found in names.items():
        refusal = config.refusal(module) or _read_by_parent(model, found) or _filtered(module, found, filter_fn)
        if refusal:
            rows[module].add(refusal)
        else:
            taken.append(module)
    return taken


def _replaced(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    example_inputs: Any,
    names: dict[nn.Module, list[str]],
    rows: dict[nn.Module, Row],
) -> dict[nn.Module, nn.Module]:
    """The replacement of each layer that gets one, made and measured beside the model."""
    taken = _taken(model, config, filter_fn, names, rows)
    measured = example_inputs is not None
    inputs = captured_inputs(model, taken, example_inputs) if measured else ((module, None) for module in taken)
    replacements, shared = {}, {}
    for module, captured in with_progress(inputs, len(taken), measured, "pyops.swap_", "layer"):
        new = _made(config, module, names[module][0], rows[module], captured, measured, shared)
        if new is not None:
            replacements[module] = new
    return replacements


def _swap_one_by_one(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None,
    example_inputs: Any,
    names: dict[nn.Module, list[str]],
    rows: dict[nn.Module, Row],
) -> None:
    """Make, measure and place one layer after the other; takes each out of `names` and `rows`, so that it is freed."""
    taken = _taken(model, config, filter_fn, names, rows)
    _check_layers(config, taken, names)
    tied, parents = names_of_weights(model, taken), parents_of(model, taken)
    flags = {module: module.training for module in taken}
    measured, count, shared = example_inputs is not None, len(taken), {}
    # Both let go of each layer that they hand out.
    inputs = captured_inputs(model, iter(taken), example_inputs) if measured else _one_after_the_other(taken)
    del taken
    placed: list[tuple[nn.Module, bool]] = []
    try:
        with config.prepared(model, filter_fn, example_inputs), evaluating(model):
            for module, captured in with_progress(inputs, count, measured, "pyops.swap_", "layer"):
                found, row, flag = names.pop(module), rows.pop(module), flags.pop(module)
                same, around = tied.pop(module), parents.pop(module)
                new = _made(config, module, found[0], row, captured, measured, shared)
                if new is not None:
                    new.train(False)  # as the rest of the model, until all are done
                    config.complete(module, new, row, found, same)
                    with undoing(around):
                        commit(around, {module: new}, {module: row})
                    placed.append((new, flag))
                del module, captured
    finally:
        for new, flag in placed:
            new.train(flag)


def _check_layers(config: Config, layers: list[nn.Module], names: Mapping[nn.Module, list[str]]) -> None:
    for module in layers:
        with _naming(names[module][0]):
            config.check_layer(module)


def _one_after_the_other(layers: list[nn.Module]) -> Iterator[tuple[nn.Module, None]]:
    while layers:
        yield layers.pop(0), None


def _made(
    config: Config,
    module: nn.Module,
    name: str,
    row: Row,
    captured: Captured | None,
    measured: bool,
    shared: dict[str, Any],
) -> nn.Module | None:
    """What takes the place of one layer; None if it stays."""
    if captured is not None:
        row.input_shape = tuple(captured.x.shape)
    if captured is not None and captured.x.is_meta:
        row.input_shape = captured = None
    elif captured is None and measured:
        row.add("not called with these example_inputs")
    with _naming(name):
        return config.replace(Layer(module, name, row, captured, shared))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """TypeError and ValueError tell the layer."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"layer {name!r}: {error}") from error


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


def _check_one_by_one(one_by_one: Any, config: Config) -> None:
    if not isinstance(one_by_one, bool):
        raise TypeError(f"one_by_one must be True or False, got {one_by_one!r}")
    if one_by_one and config.whole_model():
        raise ValueError(f"one_by_one=True cannot be done for {config!r}, which changes more than single layers")


def _row(module: nn.Module, found: list[str]) -> Row:
    cls = type(module)
    kind = cls.__bases__[0] if nn.utils.parametrize.is_parametrized(module) else cls
    weight, bias = weight_and_bias(module)
    shape = () if weight is None else tuple(weight.shape)
    size = nbytes([weight, bias])
    return Row(found[0], kind.__name__, UNCHANGED, "", shape, size, size)


def _read_by_parent(model: nn.Module, found: list[str]) -> str | None:
    """Why it must stay because a parent uses its weight, under any of its names."""
    for name in found:
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if reads_weight(parent, child):
            return f"its parent ({type(parent).__name__}) reads its weight instead of only calling the layer"
    return None


def _filtered(module: nn.Module, found: list[str], filter_fn: Callable | None) -> str | None:
    refused = [name for name in found if filter_fn is not None and not filter_fn(module, name)]
    if not refused:
        return None
    return "filter_fn" if len(found) == 1 else f"filter_fn refuses it as {', '.join(refused)}; it is also {found}"
