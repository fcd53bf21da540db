"""The numbers that a step is made of: each rule's coefficients, and those of weight decay, L1 and averages.

They depend on the step counts of the parameters and on hyper-parameters, and are computed in double precision where
these are: on the host once for all parameters that agree, on the device for all at once and without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.optim import FIRST_EMA, FIRST_STATE
from ..ops.optim_rules import Hyper, Number, Rule
from .optim_tables import upload

COEFFICIENTS = 8
DECAY, L1, EMA_WEIGHT = 8, 9, 10
"""Positions behind the rule's c0 … c7. With decoupled weight decay the first is the factor of p."""
COUNT = 11
STARTS = 2.0
"""In place of the weight of an average: it becomes p."""


class Numbers(NamedTuple):
    """The numbers of a launch, COUNT of them."""

    same: tuple[float, ...]
    """Those that are known here and the same for all parameters."""
    in_table: tuple[int, ...]
    """For each the row of `table` that has it instead, or -1."""
    table: Tensor | None  # [rows, parameters] fp32


def on_host(t: Tensor) -> bool:
    """True if reading `t` waits for nothing."""
    return t.is_cpu


def weight_decay(rule: Rule, h: Hyper) -> str:
    """How weight decay acts before the rule: "none", "decoupled" or "l2"."""
    if not h["weight_decay"] or rule.decays:
        return "none"
    return "decoupled" if h["decoupled"] else "l2"


def count_step(rule: Rule, h: Hyper, scalars: Sequence[Tensor], found_inf: Tensor | None) -> dict[str, Number]:
    """Advance `scalars`, those of one parameter after the other, unless `found_inf` on the device says no.

    Returns their new values by name: a float if they are on the host and equal, else fp64 [parameters].
    """
    by_name = {name: list(scalars[j :: len(rule.scalars)]) for j, name in enumerate(rule.scalars)}
    old: dict[str, Number] = {}
    for name, tensors in by_name.items():
        if len({on_host(t) for t in tensors}) != 1:
            raise ValueError(f"scalars: {name!r} of some parameters is on the CPU, of others is not")
        if on_host(tensors[0]):
            values = [t.item() for t in tensors]
            old[name] = values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=torch.float64)
        else:
            old[name] = torch.stack(tensors).double()
    new = rule.advance(h, old)
    for name, tensors in by_name.items():
        value = new[name]
        if not isinstance(value, Tensor):
            torch._foreach_copy_(tensors, [torch.tensor(value, dtype=tensors[0].dtype)] * len(tensors))
            continue
        if found_inf is not None:
            value = torch.where(found_inf.reshape(()) != 0, old[name], value)
        torch._foreach_copy_(tensors, list(value.to(tensors[0].dtype).unbind()))
    return new


def numbers(
    rule: Rule, h: Hyper, new: dict[str, Number], first: Sequence[int], parameters: int, device: torch.device
) -> Numbers:
    """The numbers of `parameters` with scalars `new`; `first` says which have states or averages made in this step."""
    if isinstance(h["lr"], Tensor):
        new = {name: upload(value, device) if isinstance(value, Tensor) else value for name, value in new.items()}
    c = rule.coefficients(h, new)
    if rule.first and any(f & FIRST_STATE for f in first):
        fresh = [bool(f & FIRST_STATE) for f in first]
        c = tuple(_choose(fresh, yes, no) for yes, no in zip(rule.first(c), c, strict=True))
    decay = 1 - h["lr"] * h["weight_decay"] if weight_decay(rule, h) == "decoupled" else h["weight_decay"]
    l1 = h["lr"] * h["l1"] if h["l1"] else 0.0
    average = _choose([bool(f & FIRST_EMA) for f in first], STARTS, 1 - h["ema_decay"])
    entries = [*c, *[0.0] * (COEFFICIENTS - len(c)), decay, l1, average]

    vectors = [entry for entry in entries if isinstance(entry, Tensor)]
    same = tuple(0.0 if isinstance(entry, Tensor) else float(entry) for entry in entries)
    if not vectors:
        return Numbers(same, (-1,) * COUNT, None)
    places = iter(range(COUNT))
    in_table = tuple(next(places) if isinstance(entry, Tensor) else -1 for entry in entries)
    if all(vector.device.type == "cpu" for vector in vectors):
        table = upload(torch.stack([vector.expand(parameters) for vector in vectors]).float(), device)
    else:
        table = torch.stack([upload(vector, device).expand(parameters) for vector in vectors]).float()
    return Numbers(same, in_table, table)


def _choose(flags: list[bool], yes: Number, no: Number) -> Number:
    """`yes` for the parameters whose flag is set, `no` for the others."""
    if not any(flags):
        return no
    if all(flags):
        return yes
    tensor = next((x for x in (yes, no) if isinstance(x, Tensor)), None)
    if tensor is not None:
        return torch.where(upload(torch.tensor(flags), tensor.device), yes, no)
    return no if yes == no else torch.tensor([yes if flag else no for flag in flags], dtype=torch.float64)
