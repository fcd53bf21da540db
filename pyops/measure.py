"""A layer against its replacements, on the inputs that the layer really sees: time, and error of the output."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

TURN_S, BUDGET_S = 0.002, 0.08
"""Length of one turn, and what the turns of one pair may take together."""
STATE_BUDGET_S = 0.5
"""The same of a pair of states of a whole model."""
MIN_TURNS, MAX_TURNS = 5, 20
HOPELESS = 4.0
"""How many times slower than the fastest a function must be at its first calls to get no turns of its own."""
CLEAR = 1.15
"""How many times slower than the fastest a function must be after `MIN_TURNS` turns to get no more."""

HELD_BYTES = 16 * 2**20
"""Inputs that are held at once."""


@dataclasses.dataclass
class Captured:
    """The input of a layer's first call, and the autocast dtype that it was called under."""

    x: torch.Tensor
    autocast: torch.dtype | None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, without gradients and with the random state put back at the end."""
    # The flags themselves: a model's own train() may do more than set them. Layers may be replaced meanwhile.
    flags = [(weakref.ref(module), module.training) for module in model.modules()]
    try:
        for module in model.modules():
            module.training = False
        devices = {t.device for t in model.parameters() if t.is_cuda}
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for reference, training in flags:
            module = reference()
            if module is not None:
                module.training = training


def captured_inputs(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: Any
) -> Iterator[tuple[nn.Module, Captured | None]]:
    """Each layer with the input of its first call, in the order of the calls; then, with None, those not called.

    The model runs several times if that is what it takes to hold only `HELD_BYTES` of inputs, or a fifth of them. A
    layer that was handed out is not held: it may be replaced and freed.
    """
    waiting, held_bytes = list(layers), HELD_BYTES
    del layers
    while waiting:
        found, left = _capture(model, waiting, example_inputs, held_bytes)
        held_bytes = max(held_bytes, sum(left) // 5)
        waiting = [layer for layer in waiting if layer not in found]
        while found:
            yield _pop_first(found)
        if not left:
            break
    while waiting:
        yield waiting.pop(0), None


def _pop_first(found: dict[nn.Module, Captured]) -> tuple[nn.Module, Captured]:
    layer = next(iter(found))
    return layer, found.pop(layer)


def _capture(
    model: nn.Module, layers: Iterable[nn.Module], example_inputs: Any, held_bytes: int
) -> tuple[dict[nn.Module, Captured], list[int]]:
    """Run the model once; (inputs of so many bytes, the first one whatever its size; the bytes of each other one)."""
    found: dict[nn.Module, Captured] = {}
    sizes: dict[nn.Module, int] = {}

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs.get("input")
        if layer in sizes or not isinstance(x, torch.Tensor):
            return
        sizes[layer] = x.numel() * x.element_size()
        if found and sum(sizes.values()) > held_bytes:
            return
        device = x.device.type
        enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if enabled else None
        found[layer] = Captured(x.detach().clone(), autocast)  # the model may go on to change it in place

    # Registered last, they see what the layer's own pre-hooks made of the input.
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found, [size for layer, size in sizes.items() if layer not in found]


def check_inputs(example_inputs: Any) -> None:
    """Raise TypeError for what `call` does not take; None is none."""
    if example_inputs is not None and not isinstance(example_inputs, (torch.Tensor, tuple, Mapping)):
        kind = type(example_inputs).__name__
        raise TypeError(
            f"example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, got {kind}"
        )


def call(model: nn.Module, example_inputs: Any) -> Any:
    """model(tensor), model(*tuple) or model(**mapping)."""
    if isinstance(example_inputs, torch.Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, tuple):
        return model(*example_inputs)
    return model(**example_inputs)


def compare(before: Callable, after: Callable, captured: Captured) -> tuple[float, float, float]:
    """(ms of before, ms of after, SQNR in dB of after's output), the two taking turns."""
    ms = times({"before": before, "after": after}, captured)
    with autocasting(captured):
        return ms["before"], ms["after"], sqnr_db(before(captured.x), after(captured.x))


def times(functions: Mapping[str, Callable], captured: Captured) -> dict[str, float]:
    """ms of one call of each function on the captured input: the least of several turns, which they take by turns.

    What other processes do only makes a turn longer, so the least is what the function itself takes. Who is clearly
    slower than the fastest gets no more turns, and when one is left the race is over.
    """
    with autocasting(captured):
        return _time(functions, captured.x)


def autocasting(captured: Captured) -> contextlib.AbstractContextManager:
    """The autocast that the layer was called under."""
    if captured.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(captured.x.device.type, dtype=captured.autocast)


def sqnr_db(y: torch.Tensor, approximate: torch.Tensor) -> float:
    """10·log10(‖y‖² / ‖y − ŷ‖²); inf if they are equal, -inf if only y is zero, nan with NaN in either."""
    signal = y.double().square().sum().item()
    noise = (y.double() - approximate.double()).square().sum().item()
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def times_of_states(
    run: Callable[[], Any], states: Mapping[str, Callable[[], None]], device: torch.device
) -> dict[str, float]:
    """ms of `run` in each of several states, which the functions of `states` bring about; measured as in `times`."""

    def seconds(name: str, repeats: int) -> float:
        states[name]()
        return _seconds(lambda _: run(), torch.empty(0, device=device), repeats)

    return _race(list(states), seconds, STATE_BUDGET_S)


def _time(functions: Mapping[str, Callable], x: torch.Tensor) -> dict[str, float]:
    return _race(list(functions), lambda name, repeats: _seconds(functions[name], x, repeats), BUDGET_S)


def _race(names: list[str], seconds: Callable[[str, int], float], budget_s: float) -> dict[str, float]:
    """ms by name; seconds(name, repeats) times one turn, of a call."""
    for name in names:
        seconds(name, 1)  # warm: allocations, lazy initialization, compilation
    # The better of two: a single call can be late for any reason.
    once = {name: min(seconds(name, 1), seconds(name, 1)) for name in names}
    first, fastest = names[0], min(once.values())
    sides = [name for name in names if name == first or once[name] <= HOPELESS * fastest]
    repeats = {name: max(1, int(TURN_S / max(once[name], 1e-7))) for name in sides}
    round_s = sum(once[name] * repeats[name] for name in sides)
    budget_s *= max(len(sides), 2) / 2
    turns = min(MAX_TURNS, max(MIN_TURNS, int(budget_s / max(round_s, 1e-7))))
    least = once | dict.fromkeys(sides, math.inf)
    for turn in range(turns):
        for name in sides if turn % 2 == 0 else sides[::-1]:  # so that a drift of the clock favours none
            least[name] = min(least[name], seconds(name, repeats[name]))
        if turn + 1 >= MIN_TURNS:
            fastest = min(least[name] for name in sides)
            sides = [name for name in sides if least[name] <= CLEAR * fastest]
            if len(sides) == 1:
                break
    return {name: least[name] * 1e3 for name in names}


def _seconds(function: Callable, x: torch.Tensor, repeats: int) -> float:
    cuda = x.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    for _ in range(repeats):
        function(x)
    if cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / repeats
