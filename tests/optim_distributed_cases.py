"""What the checks of `optim_distributed_*.py` share: their registry, digits, a model of odd sizes, a training step.

A check runs on every rank of a group of two, and raises where it fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pyops import backend

RANKS = 2
CHECKS: dict[str, Callable[[Path], None]] = {}
"""By name, in the order in which they are run. The argument is a folder that both ranks and the test share."""


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Put a function among `CHECKS`."""
    CHECKS[function.__name__] = function
    return function


class Batch(NamedTuple):
    """Digits of 8x8, x from 0 to 1."""

    x: Tensor
    y: Tensor

    def mine(self) -> Batch:
        """The part of this rank: every other digit, so that both have as many."""
        rank = dist.get_rank()
        return Batch(self.x[rank::RANKS], self.y[rank::RANKS])


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x) / 16, torch.from_numpy(y)


def batch(step: int, size: int = 32) -> Batch:
    """A batch in the default dtype, another one at each step."""
    x, y = digits()
    at = torch.arange(step * size, (step + 1) * size) % len(y)
    return Batch(x[at].to(torch.get_default_dtype()), y[at])


class Net(nn.Module):
    """Sizes that two ranks cannot share evenly, and a layer of one row, of which the second rank has nothing."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.deep = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(80)
        self.hidden = nn.Linear(80, 71)  # 5680 elements: worth 8-bit states
        self.gate = nn.Linear(71, 1)
        self.head = nn.Linear(71, 10)
        self.extra = nn.Linear(71, 10) if extra else None

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        x = self.deep(self.conv(x.view(-1, 1, 8, 8)).relu())
        x = nn.functional.gelu(self.hidden(self.norm(x.flatten(1))))
        logits = self.head(x) * (1 + self.gate(x).tanh())
        return logits + self.extra(x) if extra else logits


def loss_of(model: nn.Module, data: Batch, extra: bool = False) -> Tensor:
    return nn.functional.cross_entropy(model(data.x, extra).to(torch.get_default_dtype()), data.y)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, clip: float | None = None, extra: bool = False
) -> Tensor | None:
    """A step on this rank's part of a batch, on all of it in a model that is on one process; the norm if clipped."""
    data = batch(step)
    optimizer.zero_grad()
    parallel = isinstance(model, (DistributedDataParallel, FSDPModule))
    loss_of(model, data.mine() if parallel else data, extra).backward()
    norm = None if clip is None else full(nn.utils.clip_grad_norm_(model.parameters(), clip))
    optimizer.step()
    return norm


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Train; the mean losses of both ranks, in bf16 if the model is."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        data = batch(step).mine()
        optimizer.zero_grad()
        loss = loss_of(model, data._replace(x=data.x.to(dtype)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / RANKS).tolist()


def full(t: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; without grad."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def assert_same_model(model: nn.Module, other: nn.Module, **tolerance) -> None:
    """Raise AssertionError, with the name, unless all parameters are close; they may be sharded."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        a, b = full(p), full(q)
        torch.testing.assert_close(a, b, **tolerance, msg=f"{name}: {{}}".format)


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tolerance) -> None:
    """Raise AssertionError, with the name, unless the states are; those of `a` may be sharded."""
    pairs = [(a.state[p], b.state[q]) for p, q in zip(params_of(a), params_of(b), strict=True)]
    for index, (s, t) in enumerate(pairs):
        assert s.keys() == t.keys(), (index, s.keys(), t.keys())
        for name in s:
            msg = f"{index}.{name}: {{}}".format
            torch.testing.assert_close(full(s[name]), full(t[name]), **tolerance, msg=msg)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_replicas_agree(tensors: Iterator[Tensor] | list[Tensor]) -> None:
    """Raise AssertionError unless both ranks have the same bits."""
    for i, t in enumerate(tensors):
        mine = t.detach().contiguous().view(-1).view(torch.uint8)
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), i


def assert_table(optimizer: torch.optim.Optimizer) -> None:
    """Raise AssertionError unless the compiled kernels, where they are in use, step by the kept table."""
    assert (optimizer._table is not None) == (backend.native is not None)


@contextmanager
def double() -> Iterator[None]:
    """fp64 by default. Optimizers count in it, too, so that what differs from torch is a mistake, not rounding."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


EXACT = {"rtol": 1e-9, "atol": 1e-11}
"""In fp64: two ranks add up gradients in another order than one process; Adam's root makes that up to 1e4 larger."""
