"""What the tests of `pyops.swap_(model, pyops.Sparse())` share: fake times and a pruned model."""

from __future__ import annotations

import torch
from cases import randn
from torch import nn

import pyops

BLOCKS = ("oc_block16", "oc_block8", "oc_block4")


class FakeTimes:
    """In the place of `measure.times`: `ms[name]` is a number or a function of the call's number."""

    def __init__(self):
        self.calls, self.captured = [], []
        self.ms = {"dense": 1.0, "dense_channels_last": 1.0, "dense_contiguous": 1.0, "thinned": 2.0, "blocked": 2.0}
        self.ms |= dict.fromkeys(("unstructured", "2:4", "ic_block4", "int8"), 3.0) | dict.fromkeys(BLOCKS, 2.0)

    def __call__(self, functions, captured):
        self.calls.append(list(functions))
        self.captured.append(captured)
        values = {name: self.ms[name] for name in functions}
        return {name: v(len(self.calls)) if callable(v) else v for name, v in values.items()}


def net():
    """Pruned in blocks, at random, not at all, depthwise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 16, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 3),
    )
    pyops.prune.oc_block(model[0], 0.75, 16)
    pyops.prune.magnitude(model[2], 0.9)
    return model


X = randn(2, 4, 9, 9)
DENSITY = 51 / 512
"""What is kept of net()[2]."""


def swap(model=None, *args, x=X, **arguments):
    model = net() if model is None else model
    report = pyops.swap_(model, pyops.Sparse(**arguments), *args, example_inputs=x)
    return model, {row.name: row for row in report.rows}
