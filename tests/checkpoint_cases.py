"""A small model, checkpoints for it in every format, and a check that nothing in a model changed."""

from __future__ import annotations

import contextlib

import torch
from cases import randint, randn
from torch import nn

GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": True,
    "sym": False,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["head"],
}
INT = {
    **PACKED,
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": TOKEN,
        }
    },
}
FLOAT = {
    **PACKED,
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {**TOKEN, "type": "float"},
        }
    },
}


class Net(nn.Module):
    """Two layers that the checkpoints have quantized, and what else a model has; head and embed may be tied."""

    def __init__(self, tied: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 64, dtype=dtype)
        self.up = nn.Linear(64, 96, dtype=dtype)
        self.norm = nn.LayerNorm(96, dtype=dtype)
        self.down = nn.Linear(96, 64, bias=False, dtype=dtype)
        self.head = nn.Linear(64, 12, bias=False, dtype=dtype)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.arange(4.0), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(ids))).relu()))


SIZES = {"up": (96, 64), "down": (64, 96)}
IDS = torch.arange(12).view(2, 6)


def words(*shape: int, seed: int) -> torch.Tensor:
    """int32 of random bits: any are a packed weight."""
    return randint(-(2**31), 2**31 - 1, *shape, dtype=torch.int64, seed=seed).to(torch.int32)


def others(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """What is not quantized."""
    return {
        "embed.weight": randn(12, 64, seed=1).to(dtype),
        "up.bias": randn(96, seed=2).to(dtype),
        "norm.weight": randn(96, seed=3).to(dtype),
        "norm.bias": randn(96, seed=4).to(dtype),
        "count": torch.tensor([1, 2, 3]),
    }


def gptq_state() -> dict[str, torch.Tensor]:
    """Act-order in one layer, not in the other."""
    state = others()
    for seed, (name, (N, K)) in enumerate(SIZES.items()):
        state |= {
            f"{name}.qweight": words(K // 8, N, seed=seed),
            f"{name}.qzeros": words(K // 32, N // 8, seed=seed + 9),
            f"{name}.scales": randn(K // 32, N, seed=seed).half() / 16,
            f"{name}.g_idx": (torch.arange(K) // 32).int(),
        }
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    state["down.g_idx"] = state["down.g_idx"][order]
    return state


def awq_state() -> dict[str, torch.Tensor]:
    state = others()
    for seed, (name, (N, K)) in enumerate(SIZES.items()):
        state |= {
            f"{name}.qweight": words(K, N // 8, seed=seed),
            f"{name}.qzeros": words(K // 32, N // 8, seed=seed + 9),
            f"{name}.scales": randn(K // 32, N, seed=seed).half() / 16,
        }
    return state


def packed_state() -> dict[str, torch.Tensor]:
    state = others()
    for seed, (name, (N, K)) in enumerate(SIZES.items()):
        state |= {
            f"{name}.weight_packed": words(N, K // 8, seed=seed),
            f"{name}.weight_zero_point": words(N // 8, K // 32, seed=seed + 9),
            f"{name}.weight_scale": randn(N, K // 32, seed=seed).half() / 16,
            f"{name}.weight_shape": torch.tensor([N, K]),
        }
    return state


def int_state() -> dict[str, torch.Tensor]:
    state = others()
    for seed, (name, (N, K)) in enumerate(SIZES.items()):
        state |= {
            f"{name}.weight": randint(-127, 127, N, K, seed=seed),
            f"{name}.weight_scale": randn(N, 1, seed=seed).half().abs() / 64,
        }
    return state


def float_state() -> dict[str, torch.Tensor]:
    state = others()
    for seed, (name, (N, K)) in enumerate(SIZES.items()):
        state |= {
            f"{name}.weight": randn(N, K, seed=seed, scale=40.0).to(torch.float8_e4m3fn),
            f"{name}.weight_scale": randn(N, 1, seed=seed).half().abs() / 64,
        }
    return state


CHECKPOINTS = {
    "gptq": (gptq_state, GPTQ),
    "awq": (awq_state, AWQ),
    "pack-quantized": (packed_state, PACKED),
    "int-quantized": (int_state, INT),
    "float-quantized": (float_state, FLOAT),
}


@contextlib.contextmanager
def unchanged(model: nn.Module):
    """Fails if a module, parameter or buffer of the model is another one afterwards, or has other values."""
    modules, tensors = _seen(model)
    values = {name: t.detach().clone() for name, t in tensors.items()}
    memory = {name: None if t.is_meta else t.data_ptr() for name, t in tensors.items()}
    training = {name: m.training for name, m in modules.items()}
    yield
    after, now = _seen(model)
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert {name: m.training for name, m in after.items()} == training
    assert now.keys() == tensors.keys()
    assert all(now[name] is tensors[name] for name in tensors)
    assert {name: None if t.is_meta else t.data_ptr() for name, t in now.items()} == memory
    assert all(t.is_meta or torch.equal(t, values[name]) for name, t in now.items())


def _seen(model):
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return dict(model.named_modules(remove_duplicate=False)), tensors
