"""Training on real digits ends at torch's loss, whatever the format of state and parameters."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

import pyops

load_digits = pytest.importorskip("sklearn.datasets").load_digits
SEEDS, EPOCHS = range(4), 4


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def final_loss(data, make, dtype=torch.float32, seed=0):
    """A network large enough that "int8" really keeps its largest weight's state in 8 bits."""
    torch.manual_seed(seed)
    x, y = data[0].to(dtype), data[1]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(dtype)
    optimizer = make(model.parameters())
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]).float(), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x).float(), y).item(), optimizer


@pytest.fixture(scope="module")
def torch_losses(data) -> list[float]:
    return [final_loss(data, lambda ps: torch.optim.AdamW(ps, lr=3e-3), seed=seed)[0] for seed in SEEDS]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"state_dtype": "bfloat16"}, torch.float32),
        ({"state_dtype": "int8"}, torch.float32),
        ({"stochastic_rounding": True}, torch.bfloat16),
        ({"stochastic_rounding": True, "state_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=lambda value: str(value),
)
def test_reaches_the_loss_of_torch(data, torch_losses, options, dtype):
    """In the mean over seeds, within the spread of torch's own runs."""
    losses = []
    for seed in SEEDS:
        loss, optimizer = final_loss(data, lambda ps: pyops.optim.AdamW(ps, lr=3e-3, **options), dtype, seed)
        losses.append(loss)
    noise = 2 * statistics.stdev(torch_losses)
    assert abs(statistics.mean(losses) - statistics.mean(torch_losses)) < noise, (losses, torch_losses)
    if options.get("state_dtype") == "int8":
        assert any(t.dtype == torch.uint8 for state in optimizer.state.values() for t in state.values())


def test_fp32_follows_torch_step_by_step(data):
    ours, theirs = (
        final_loss(data, lambda ps, kind=kind: kind(ps, lr=3e-3))[0] for kind in (pyops.optim.AdamW, torch.optim.AdamW)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
