"""Averages of the parameters in the parameters' place, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pyops.optim import distributed

if TYPE_CHECKING:
    from pyops.optim.base import FusedOptimizer

KEY = "ema"


def begun(state: dict[str, Any]) -> bool:
    """True if the state of a parameter has an average. Adagrad's states are there before its first step."""
    step = state.get("step")
    return state.get(KEY) is not None and (step is None or step.device.type != "cpu" or step.item() != 0)


@contextmanager
def averaged_parameters(optimizer: FusedOptimizer) -> Iterator[None]:
    """See `FusedOptimizer.averaged_parameters`."""
    if optimizer.options.ema_decay is None:
        raise RuntimeError("averaged_parameters: there are no averages; pass ema_decay to the optimizer")
    averages = {p: s[KEY] for p, s in optimizer.state.items() if isinstance(s, dict) and begun(s)}
    if not averages:
        raise RuntimeError("averaged_parameters: no step was made yet, so that there are no averages")
    with torch.no_grad():
        own = {p: p.detach().clone(memory_format=torch.preserve_format) for p in averages}
    try:
        _copy(averages)
        yield
    finally:
        _copy(own)


@torch.no_grad()
def _copy(values: dict[torch.Tensor, torch.Tensor]) -> None:
    for p, value in values.items():
        p.copy_(value)
    distributed.reshard(values)
