"""A whole model before and after: what it gives, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyops.measure import call, evaluating, sqnr_db, times_of_states

SEED = 0


class WholeModel:
    """A model with its example inputs; runs in eval mode, without gradients, and with the same random numbers."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs

    def outputs(self) -> list[Tensor]:
        """Its floating-point outputs, in order: tensors within tuples, dicts and dataclasses."""
        with evaluating(self.model):
            torch.manual_seed(SEED)
            return [t.detach().clone() for t in tree_leaves(self._result()) if _has_figures(t)]

    def times(self, states: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        """ms of one call in each state that these functions bring the model into; it stays in any of them."""
        with evaluating(self.model):
            return times_of_states(lambda: call(self.model, self.example_inputs), states, self.device())

    def device(self) -> torch.device:
        """Where it computes."""
        return device_of(self.model, self.example_inputs)

    def _result(self) -> Any:
        result = call(self.model, self.example_inputs)
        # A dataclass is a leaf to pytree unless somebody has registered it.
        fields = getattr(result, "__dataclass_fields__", None)
        return [getattr(result, name) for name in fields] if fields else result


def device_of(model: nn.Module, example_inputs: Any) -> torch.device:
    """That of the model's first parameter, else of the first tensor of the inputs, else the CPU."""
    tensors = (t for t in tree_leaves(example_inputs) if isinstance(t, Tensor))
    first = next(model.parameters(), next(tensors, None))
    return torch.device("cpu") if first is None else first.device


def worst_sqnr_db(expected: list[Tensor], found: list[Tensor]) -> float | None:
    """The least SQNR of several outputs, nan before all; None if there are none. -inf if they are not comparable."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return -math.inf
    each = [sqnr_db(a, b) for a, b in zip(expected, found, strict=True)]
    return min(each, key=lambda value: -math.inf if math.isnan(value) else value, default=None)


def _has_figures(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and not t.is_sparse and t.numel() > 0
