"""One of two ranks that train a sparse layer under DDP; `test_sparse_module.py` starts it with a rank and a folder."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import cases
import torch
import torch.distributed as dist
from torch import nn

from pyops.nn import SparseConv2d, SparseLinear

RANKS = 2


def model() -> nn.Module:
    """A convolution and a linear layer with fill-in, the same on every rank and in the test."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(10 * 9, 5))
    for layer in (dense[0], dense[3]):
        nn.utils.prune.l1_unstructured(layer, "weight", amount=0.6)
    return nn.Sequential(
        SparseConv2d.from_dense(dense[0], pattern="oc_block4"),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear.from_dense(dense[3]),
    )


def batch() -> torch.Tensor:
    """The images of all ranks."""
    return torch.randn(2 * RANKS, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def train(net: nn.Module, images: torch.Tensor, steps: int = 3) -> None:
    """Adam, whose moments would show a gradient of a dropped position."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net)
    train(wrapped, batch().chunk(RANKS)[rank])
    torch.save(net.state_dict(), folder / f"{rank}.pt")
    del wrapped
    cases.end_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
