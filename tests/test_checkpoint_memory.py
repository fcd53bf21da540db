"""Loading takes the memory of what is loaded, and of one layer while it is made."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import AWQ, GPTQ, PACKED, words
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyops
from pyops.checkpoints import load_quantized_

SIZE, LAYERS = 1024, 6
FLOAT_LAYER = 4 * SIZE * SIZE


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once. Resident memory would show what malloc keeps, too."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and not t.is_meta}
        out = func(*args, **(kwargs or {}))
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not t.is_meta and id_of(t) not in given:
                storage = t.untyped_storage()
                self.made[id_of(t)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


def id_of(t):
    return t.untyped_storage()._cdata


def test_a_temporary_is_seen():
    x = torch.ones(1000)
    with Live() as live:
        y = (x + 1).view(10, 100).exp()
        assert live.peak == 8000
        del y
        x * 2
        (x * 2)[5:].add_(1)
    assert live.peak == 8000


def model():
    with pyops.empty_weights():
        return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))


def state(kind):
    G, order = 128, torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for i in range(LAYERS):
        groups = {"scales": torch.ones(SIZE // G, SIZE).half(), "qzeros": words(SIZE // G, SIZE // 8, seed=i)}
        packed = words(SIZE, SIZE // 8, seed=i)
        made = {
            "gptq": {"qweight": packed.T.contiguous(), **groups, "g_idx": (torch.arange(SIZE) // G).int()[order]},
            "awq": {"qweight": packed, **groups},
            "compressed-tensors": {
                "weight_packed": packed,
                "weight_scale": torch.ones(SIZE, SIZE // G).half(),
                "weight_zero_point": words(SIZE // 8, SIZE // G, seed=i),
                "weight_shape": torch.tensor([SIZE, SIZE]),
            },
        }[kind]
        tensors |= {f"{i}.{local}": t for local, t in made.items()}
    return tensors


CONFIGS = {"gptq": {**GPTQ, "group_size": 128}, "awq": {**AWQ, "group_size": 128}}
CONFIGS["compressed-tensors"] = {
    **PACKED,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 128},
        }
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_peak(kind):
    tensors, made = state(kind), model()
    with Live() as live:
        load_quantized_(made, tensors, config=CONFIGS[kind])
    held = sum(t.numel() * t.element_size() for t in (*made.parameters(), *made.buffers()))
    assert held < LAYERS * FLOAT_LAYER / 7
    assert held <= live.peak < held + FLOAT_LAYER
