"""Data and helpers for the tests of `pyops.optim`: every class with every option that torch.optim gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import torch

import pyops.optim


def randn(*shape: int, **options) -> torch.Tensor:
    """`cases.randn`, also of shape []."""
    return cases.randn(*shape, **options) if shape else cases.randn(1, **options).reshape(())


OPTIONS: dict[str, list[dict]] = {
    "SGD": [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        {},
        {"amsgrad": True, "betas": (0.5, 0.3)},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3},
    ],
    "AdamW": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True, "betas": (0.0, 0.9)}],
    "NAdam": [
        {},
        {"weight_decay": 0.1, "maximize": True, "momentum_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "RAdam": [
        {},  # five steps are not yet adaptive
        {"betas": (0.9, 0.6), "weight_decay": 0.1},  # never adaptive
        {"betas": (0.9, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ],
    "Adamax": [{}, {"weight_decay": 0.1, "maximize": True}],
    "RMSprop": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True, "maximize": True},
        {"centered": True, "momentum": 0.9, "alpha": 0.5},
    ],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}, {"initial_accumulator_value": 0.5}],
    "Adadelta": [{}, {"rho": 0.5, "weight_decay": 0.1, "maximize": True}],
}
"""What is compared with the class of the same name in torch.optim."""

NAMES = tuple(OPTIONS)
ALL = (*NAMES, "Lion", "LAMB")
CASES = [(name, options) for name in NAMES for options in OPTIONS[name]]
RICH = [(name, OPTIONS[name][-1]) for name in NAMES] + [("Lion", {"weight_decay": 0.1}), ("LAMB", {})]
"""One for each class."""


def case_id(value) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "plain"
    return str(value)


def ours(name: str) -> type:
    return getattr(pyops.optim, name)


def theirs(name: str) -> type:
    return getattr(torch.optim, name)


def torch_options(options: dict) -> dict:
    """The single-tensor implementation: its fused one is wrong for gradients of other strides."""
    return {**options, "foreach": False}


# Each makes a parameter, before requires_grad: every kind of memory layout.
LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "0-dim": lambda: randn(),
    "empty": lambda: randn(0),
    "one": lambda: randn(1),
    "seven": lambda: randn(7),
    "matrix": lambda: randn(33, 65),
    "transposed": lambda: randn(9, 5).T,
    "channels last": lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other column": lambda: randn(5, 12)[:, ::2],
    "columns of a wider one": lambda: randn(6, 9)[:, 1:4],
}


def make_params(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Parameters of every layout; in pairs from two calls, equal."""
    return [_typed(make(), dtype).requires_grad_() for make in LAYOUTS.values()]


def _typed(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.empty_strided(t.shape, t.stride(), dtype=dtype)  # .to() would make what is not dense dense
    return wide.copy_(t)


def groups_of(params: list[torch.Tensor]) -> list[dict]:
    """Two groups, the second with its own learning rate and decay."""
    return [{"params": params[:4]}, {"params": params[4:], "lr": 0.02, "weight_decay": 0.05}]


def set_grads(params: list[torch.Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients of this step: in the odd parameters with strides of their own, and none for some in the first steps."""
    for i, p in enumerate(params):
        g = randn(*p.shape, seed=100 * step + i, scale=scale).to(p.dtype)
        if p.is_complex():
            g = torch.complex(g.real, randn(*p.shape, seed=100 * step + i + 50).to(g.real.dtype))
        if i % 2 and p.dim() > 1:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        elif p.dim() > 0:
            g = torch.empty_like(p).copy_(g)  # as autograd lays it out
        p.grad = None if i % 4 == 3 and step < 2 else g


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every state, in the order of the parameters."""
    for index, state in sorted(optimizer.state_dict()["state"].items()):
        for name in sorted(state):
            yield f"{index}.{name}", state[name]


def assert_equal_states(a: torch.optim.Optimizer, b: torch.optim.Optimizer, **tolerance) -> None:
    left, right = dict(states_of(a)), dict(states_of(b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], check_stride=False, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def copy_of(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [_typed(p.detach(), p.dtype).requires_grad_() for p in params]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> list[float]:
    """Fit a fixed random function; returns the losses."""
    width = next(m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear))
    x = randn(64, width, seed=seed + 1).to(next(model.parameters()).dtype)
    y = torch.sin(x.sum(1, keepdim=True).float())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def value_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Everything that a step may change."""
    state = [t.clone() for s in optimizer.state.values() for t in s.values()]
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]] + state


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
