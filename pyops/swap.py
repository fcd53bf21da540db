"""Replace the layers of a model that one already has: `swap_(model, config)`.

Nothing is touched before everything has worked: layers are converted and measured beside the model, and only then put
into their places, which cannot fail. Where memory counts more than that, they are replaced one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pyops.config import Config, FilterFn
from pyops.edit import Edit, ModelState, undoing
from pyops.measure import captured_inputs, check_inputs, evaluating
from pyops.memory import give_back_freed
from pyops.progress import progress_wanted, with_progress
from pyops.quantize import Int8Dynamic as Int8Dynamic
from pyops.replacing import commit, names_of_weights, nbytes, parents_of, weight_and_bias
from pyops.report import Report
from pyops.swapping import Swap, naming, new_swap
from pyops.tune import measured_on
from pyops.whole import device_of


def swap_(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any = None,
    progress: bool | None = None,
    one_by_one: bool = False,
    dry_run: bool = False,
    revertible: bool | None = None,
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
        dry_run: make and measure everything, say it in the report, and leave the model as it was.
        revertible: keep what was replaced in the report, so that `report.revert_(model)` puts it back: as long as the
            report lives, the memory of both. By default of `Auto()` alone.

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
    revertible = config.revertible if revertible is None else revertible
    _check_flags(config, one_by_one=one_by_one, dry_run=dry_run, revertible=revertible)
    check_inputs(example_inputs)
    config.check(example_inputs)
    swap = new_swap(model, config, filter_fn, example_inputs)
    machine = measured_on(device_of(model, example_inputs)) if swap.measured else {}
    report = Report(list(swap.rows.values()), dry_run=dry_run, machine=machine)
    if one_by_one:
        with progress_wanted(progress):
            _swap_one_by_one(swap)
        del swap
        give_back_freed()
        return report
    state = ModelState(model)
    try:
        with progress_wanted(progress):
            report.edit = _swap_together(swap, state, dry_run, revertible)
        report.whole = swap.whole
        if not revertible:
            state = None
        del swap  # the last to hold what was replaced
        give_back_freed()
        return report
    except BaseException:
        if state is not None:
            state.restore()  # again, for an interrupt that came while the model was put back
        raise


def _swap_together(swap: Swap, state: ModelState, dry_run: bool, revertible: bool) -> Edit | None:
    """Make and measure all layers beside the model, then put them into their places; what `revert_` undoes."""
    swap.original = state.modules
    try:
        _prepare_and_place(swap)
        edit = state.modules.changes() if revertible and not dry_run else None
        if dry_run:
            state.restore()
        else:
            state.restore_buffers()
        return edit
    except BaseException:
        state.restore()
        raise


def _prepare_and_place(swap: Swap) -> None:
    config, rows = swap.config, swap.rows
    with config.prepared(swap) as changed:
        for module, what in changed.items():
            row, held = rows[module], weight_and_bias(module)
            row.bytes_after, row.reason = nbytes(held), what
            if tuple(held[0].shape) != row.shape:
                row.choice = "fewer_channels"
        swap.choose(swap.taken())
        with undoing(list(swap.model.modules())) as swap.dense:
            swap.place()
            done = config.finish(swap)
        for row in rows.values():
            if row.name in done:
                row.add(done[row.name])


def _swap_one_by_one(swap: Swap) -> None:
    """Make, measure and place one layer after the other, and let go of each, so that it is freed."""
    model, config, taken = swap.model, swap.config, swap.taken()
    _check_layers(config, taken, swap.names)
    tied, parents = names_of_weights(model, taken), parents_of(model, taken)
    count = len(taken)
    # Both let go of each layer that they hand out.
    inputs = captured_inputs(model, iter(taken), swap.example_inputs) if swap.measured else _one_after_the_other(taken)
    del taken
    placed: list[tuple[nn.Module, bool]] = []
    try:
        with config.prepared(swap), evaluating(model):
            for module, captured in with_progress(inputs, count, swap.measured, "pyops.swap_", "layer"):
                new = swap.make(module, captured)
                found, row, flag = swap.names.pop(module), swap.rows.pop(module), swap.training.pop(module)
                same, around = tied.pop(module), parents.pop(module)
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
        with naming(names[module][0]):
            config.check_layer(module)


def _one_after_the_other(layers: list[nn.Module]) -> Iterator[tuple[nn.Module, None]]:
    while layers:
        yield layers.pop(0), None


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


def _check_flags(config: Config, one_by_one: Any, **others: Any) -> None:
    for name, flag in {"one_by_one": one_by_one, **others}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if one_by_one and config.whole_model():
        raise ValueError(f"one_by_one=True cannot be done for {config!r}, which changes more than single layers")
    for name, flag in others.items():
        if one_by_one and flag:
            raise ValueError(f"one_by_one=True lets go of the layers that it replaces, which {name}=True needs")
