"""Prune more and more while a model trains.

    s_t = s_f + (s_i - s_f) (1 - (t - t₀)/(n Δt))³    for t in t₀, t₀ + Δt, ..., t₀ + n Δt

s sparsity, from s_i to s_f; t optimizer steps. Fast while there is much to choose from, slow at the end. Source: Zhu &
Gupta 2017, "To prune, or not to prune", arXiv:1710.01878.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pyops.prune.functions import n_m
from pyops.prune.layers import Pruned
from pyops.prune.methods import check_positive, check_sparsity


class GradualSchedule:
    """Prunes `model` with `method`, from `initial` to `sparsity` in `count` equal intervals of optimizer steps.

        schedule = GradualSchedule(model, functools.partial(prune.oc_block, block=8), 0.9, interval=100, count=50)
        for x, y in loader:
            ...
            optimizer.step()
            schedule.step()

    The first pruning, to `initial`, is at the step `start` (0: with the first call of `step`), the last, to `sparsity`,
    at the step start + count·interval. In between masks only grow, and nothing is touched.

    Args:
        model: what is pruned, as the first argument of `method`.
        method: called as method(model, sparsity): `magnitude`, `oc_block`, `ic_block` or `channels`, with its other
            arguments bound by `functools.partial`, or a function of one's own.
        sparsity: s_f, in [0, 1).
        initial: s_i, in [0, sparsity].
        start: t₀, steps before the first pruning.
        interval: Δt, steps from one pruning to the next.
        count: n, prunings after the first.

    To resume, prune the new model once (to 0.0 with the same method) so that it has the keys weight_orig and
    weight_mask, then load both state_dicts.

    Raises:
        TypeError, ValueError naming the argument. The model is not touched before `step`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Callable[[nn.Module, float], list[Pruned]],
        sparsity: float,
        *,
        initial: float = 0.0,
        start: int = 0,
        interval: int = 100,
        count: int = 10,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(method) or isinstance(method, type):
            got = method.__name__ if isinstance(method, type) else type(method).__name__
            raise TypeError(f"method must be callable as method(model, sparsity), such as prune.magnitude, got {got}")
        if (method.func if isinstance(method, functools.partial) else method) is n_m:
            raise TypeError("method is n_m, which has a pattern and no sparsity to increase: call it once")
        self.model, self.method = model, method
        self.final, self.initial = check_sparsity(sparsity), check_sparsity(initial, "initial")
        if self.initial > self.final:
            raise ValueError(f"initial must be at most sparsity, got {initial} above {sparsity}")
        if isinstance(start, bool) or not isinstance(start, int):
            raise TypeError(f"start must be an int, got {type(start).__name__}")
        if start < 0:
            raise ValueError(f"start must be 0 or more, got {start}")
        self.start = start
        self.interval, self.count = check_positive("interval", interval), check_positive("count", count)
        self._step = 0

    def sparsity_at(self, step: int) -> float:
        """s_t after `step` optimizer steps, that of the last pruning; 0 before the first."""
        due = self._due(step)
        return 0.0 if due < 0 else self.final + (self.initial - self.final) * (1 - due / self.count) ** 3

    @property
    def sparsity(self) -> float:
        """The total sparsity that was asked for so far."""
        return self.sparsity_at(self._step) if self._step else 0.0

    @property
    def finished(self) -> bool:
        """True once the last pruning is done."""
        return self._step > 0 and self._due(self._step) == self.count

    def step(self) -> list[Pruned]:
        """Call after each optimizer step; returns what `method` does where a pruning was due, else an empty list.

        Raises:
            what `method` raises; the step does not count then.
        """
        step = self._step + 1
        due = self._due(step) > (self._due(self._step) if self._step else -1)
        report = self.method(self.model, self.sparsity_at(step)) if due else []
        self._step = step
        return report

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far, with the numbers of the schedule."""
        return {"step": self._step, **self._numbers()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the step of `state_dict`. The masks are in the state_dict of the model.

        Numbers of the schedule that are missing in it are not compared: {"step": 500} is enough.

        Raises:
            TypeError, ValueError if it is not the state_dict of a schedule with the same numbers; nothing is loaded.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        step = state_dict.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"state_dict must have an int 'step' of 0 or more, got {step!r}")
        numbers = self._numbers()
        unknown = sorted(state_dict.keys() - numbers.keys() - {"step"})
        if unknown:
            raise ValueError(f"state_dict has keys that no schedule has: {', '.join(unknown)}")
        for name, value in numbers.items():
            if state_dict.get(name, value) != value:
                raise ValueError(f"state_dict is of a schedule with {name}={state_dict[name]}, this one has {value}")
        self._step = step

    def _numbers(self) -> dict[str, Any]:
        return {
            "sparsity": self.final,
            "initial": self.initial,
            "start": self.start,
            "interval": self.interval,
            "count": self.count,
        }

    def _due(self, step: int) -> int:
        """The number of the last pruning that is due at this step; -1 before the first."""
        return -1 if step < self.start else min((step - self.start) // self.interval, self.count)
