"""Swapped models in several threads and processes: the same answers, bit for bit."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pyops

CONFIGS = {
    "int8_dynamic": pyops.Int8Dynamic(),
    "int8_weight": pyops.Int8Weight(),
    "int4": pyops.Int4Weight(group_size=32),
    "fp8": pyops.Fp8Dynamic(),
    "sparse": pyops.Sparse(pattern="oc_block16", measure=False),
}
THREADS, CALLS = 8, 12


def swapped(kind):
    """No layer of it stays dense: oneDNN's gradients differ in the last bit from one thread to another."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, 10)]
    model = nn.Sequential(*(convs if kind == "sparse" else []), *head).eval()
    if kind == "sparse":
        pyops.prune.oc_block(model, 0.5, block=16)
    report = pyops.swap_(model, CONFIGS[kind])
    assert all(row.swapped for row in report.rows)
    return model


def batches(count):
    generator = torch.Generator().manual_seed(1)
    # Sizes differ: threads must not get into each other's scratch memory. Four: of more shapes, a sparse layer keeps
    # packed forms of the first four alone, and the last bit of a gradient tells which those are.
    return [torch.randn(1 + i % 4, 3, 8, 8, generator=generator) for i in range(count)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_model_in_many_threads(kind, gradients):
    model, xs = swapped(kind), batches(THREADS * CALLS)

    def run(x):
        with torch.set_grad_enabled(gradients):
            x = x.clone().requires_grad_(gradients)
            y = model(x)
            return (y.detach(), *(torch.autograd.grad(y.square().sum(), x) if gradients else ()))

    expected = [run(x) for x in xs]
    model = swapped(kind)  # one whose weights are packed by whichever thread comes first
    with ThreadPoolExecutor(THREADS) as pool:
        for found, wanted in zip(pool.map(run, xs), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Answers(Dataset):
    """What a model says of each of its inputs."""

    def __init__(self, model, xs):
        self.model, self.xs = model, xs

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(self.xs[i])


@pytest.mark.parametrize("start", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
def test_workers_of_a_data_loader(start):
    for kind in ("int8_dynamic", "int4", "sparse"):
        model, xs = swapped(kind), batches(6)
        expected = [model(x).detach() for x in xs]  # the kernels have run in the parent before it forks
        loader = DataLoader(Answers(model, xs), batch_size=None, num_workers=2, multiprocessing_context=start)
        for found, wanted in zip(loader, expected, strict=True):
            assert torch.equal(found, wanted), kind
