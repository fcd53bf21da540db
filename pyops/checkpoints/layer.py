"""What a quantized layer of any checkpoint becomes: canonical tensors, and the module that computes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyops.memory import chunks
from pyops.nn import Fp8Linear, Int4Linear, Int8Linear
from pyops.ops.int4_weight import (
    LEVELS,
    check_group_size,
    dequantize_int4,
    group_count,
    pack_nibbles,
    unpack_nibbles,
)
from pyops.sizes import ceil_div

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8_MODES = {"dynamic": "dynamic", "static": "static", "none": "weight_only"}
"""What `Int8Linear` calls the ways in which activations are treated."""
FP8_BLOCK = 128
"""Rows and columns of a block of `Fp8Linear`."""


@dataclasses.dataclass
class Int4Layer:
    """w[n, order[k]] = scale[n, g] · (q[n, k] − zero[n, g]), g = k // group_size; see ops/int4_weight.py."""

    w_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    in_features: int
    group_size: int
    order: torch.Tensor | None = None
    compute: str = "auto"
    note: str = ""
    choice = "int4_weight"

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] in fp32, exact, its columns in the order of x."""
        w = dequantize_int4(self.w_q, self.scale, self.zero, self.in_features, self.group_size)
        return w if self.order is None else torch.empty_like(w).index_copy_(1, self.order.long(), w)

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device, compute: str) -> nn.Module:
        """An `Int4Linear` on `device`; `compute` "auto" leaves what the checkpoint asks for."""
        zero, order = (None if t is None else t.to(device) for t in (self.zero, self.order))
        return Int4Linear.from_quantized(
            self.w_q.to(device),
            self.scale.to(device),
            zero,
            bias,
            in_features=self.in_features,
            group_size=self.group_size,
            input_order=order,
            compute=self.compute if compute == "auto" else compute,
        )


@dataclasses.dataclass
class Int8Layer:
    """w[n, k] = scale[n] · w_q[n, k]; activations "dynamic", "static" (by x_scale) or "none" (weight only)."""

    w_q: torch.Tensor
    scale: torch.Tensor
    activations: str
    x_scale: torch.Tensor | None = None
    note: str = ""

    @property
    def choice(self) -> str:
        """As the configs of `swap_` are called."""
        return "int8_weight" if self.activations == "none" else f"int8_{self.activations}"

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] in fp32."""
        return self.w_q.float() * self.scale[:, None]

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device, compute: str) -> nn.Module:
        """An `Int8Linear` on `device`."""
        N, K = self.w_q.shape
        module = Int8Linear(K, N, bias is not None, "meta", dtype, mode=INT8_MODES[self.activations])
        state = {"weight": self.w_q, "weight_scale": self.scale}
        state |= {} if self.x_scale is None else {"input_scale": self.x_scale}
        state = {name: t.to(device) for name, t in state.items()}
        module.load_state_dict(state if bias is None else {**state, "bias": bias}, assign=True)
        return module


@dataclasses.dataclass
class Fp8Layer:
    """w[n, k] = scale[n // bn, k // bk] · w_q[n, k] in float8_e4m3fn; block (N, K) is one scale for the tensor."""

    w_q: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int]
    activations: str
    x_scale: torch.Tensor | None = None
    note: str = ""
    choice = "fp8_dynamic"

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] in fp32."""
        N, K = self.w_q.shape
        scale = self.scale.float().repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return self.w_q.float() * scale[:N, :K]

    def module(self, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device, compute: str) -> nn.Module:
        """An `Fp8Linear` on `device`."""
        N, K = self.w_q.shape
        blocks = (FP8_BLOCK, FP8_BLOCK)
        # One block may be the whole weight, so that the activations say which of the two it is.
        by_row = self.block in ((1, max(K, 1)), (max(N, 1), max(K, 1)))
        fits = {
            "dynamic-token": by_row,
            "static-tensor": by_row,
            f"dynamic-group of {FP8_BLOCK}": self.block == blocks,
        }
        if not fits.get(self.activations):
            raise ValueError(
                f"float8 weights by blocks of {self.block}, activations {self.activations!r}; allowed: a scale for "
                f"each channel or the tensor with dynamic-token or static-tensor, {blocks} with dynamic-group of "
                f"{FP8_BLOCK}"
            )
        x_scale = None if self.x_scale is None else self.x_scale.to(device)
        return Fp8Linear.from_quantized(self.w_q.to(device), self.scale.to(device), bias, input_scale=x_scale)


QuantizedLayer = Int4Layer | Int8Layer | Fp8Layer


# ------------------------------------------------------------------------------------------------ shared by the formats


def usable_group_size(group_size: int, K: int) -> tuple[int, str | None]:
    """The group size that `Int4Linear` is to have, and why there is none."""
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size == 0 or group_size < -1:
        return -1, f"group_size {group_size!r} is no positive number and not -1"
    if group_size == -1 or group_size == K:
        return -1, None
    try:
        check_group_size(group_size)
    except ValueError as error:
        return -1, str(error)
    return group_size, None


def bytes_of_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] → uint8 [R, 4·C], the lowest byte first. A byte holds two nibbles, the lower one first."""
    # Flat first: a dimension of size 1 may have any stride, which view(dtype) does not take.
    return words.reshape(-1).contiguous().view(torch.uint8).view(words.shape[0], 4 * words.shape[1])


def words_of_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `bytes_of_words`; rows are padded with zeros to whole words."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.reshape(-1).contiguous().view(torch.int32).view(padded.shape[0], padded.shape[1] // 4)


def canonical_nibbles(packed: torch.Tensor, K: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes of consecutive nibbles [N, ≥ K/2] as a canonical w_q [N, ⌈K/2⌉], its column k taken from column order[k].

    A tensor of its own; nothing is left of the padding.
    """
    packed = packed[:, : ceil_div(K, 2)]
    if order is None:
        w_q = packed.clone(memory_format=torch.contiguous_format)
        if K % 2:
            w_q[:, -1] &= LEVELS
        return w_q
    w_q = torch.empty(packed.shape, dtype=torch.uint8, device=packed.device)
    for a, b in chunks(w_q.shape[0], K, w_q.device):  # unpacked they take twice the memory
        w_q[a:b] = pack_nibbles(unpack_nibbles(packed[a:b], K).index_select(1, order.long()))
    return w_q


def group_order(g_idx: torch.Tensor, K: int, group_size: int) -> tuple[torch.Tensor | None, str | None]:
    """(order, problem): the order that sorts the columns by group, None if they are sorted already.

    Each group must have exactly its group_size of columns, the last one what is left.
    """
    G, count = (group_size if group_size > 0 else max(K, 1)), group_count(K, group_size)
    g_idx = g_idx.long()
    low, high = (int(v) for v in g_idx.aminmax()) if K else (0, 0)
    if low < 0 or high >= max(count, 1):
        return None, f"holds {low if low < 0 else high}; there are scales for the groups 0 to {count - 1}"
    wanted = torch.arange(K, device=g_idx.device) // G
    if torch.equal(g_idx, wanted):
        return None, None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], wanted):
        sizes = torch.bincount(g_idx, minlength=count)
        right = torch.bincount(wanted, minlength=count)
        g = int((sizes != right).nonzero()[0])
        return None, f"gives group {g} {int(sizes[g])} columns instead of {int(right[g])}"
    return order.to(torch.int32), None


def wrong_types(config: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], what: str) -> list[str]:
    """A problem for each field that is not of its type and not None; True and False are no int."""
    problems = []
    for key, kinds in types.items():
        value, kinds = config.get(key), kinds if isinstance(kinds, tuple) else (kinds,)
        fits = type(value) in kinds if isinstance(value, bool) else isinstance(value, kinds)
        if value is not None and not fits:
            allowed = " or ".join(kind.__name__ for kind in kinds)
            problems.append(f"{what}: {key}={value!r} is a {type(value).__name__}, not {allowed}")
    return problems


def unknown_fields(config: dict, known: set[str], what: str) -> list[str]:
    """A problem for each field of a config that has a value and is not known."""
    return [
        f"{what}: field {key}={value!r} is not understood"
        for key, value in config.items()
        if key not in known and value not in (None, False, {}, [], "")
    ]


def keeps_its_own_state(module: nn.Module) -> bool:
    """Its part of a state_dict is not its parameters and buffers. (What changes loading alone, as batch norm, is.)"""
    cls = type(module)
    return (
        cls._save_to_state_dict is not nn.Module._save_to_state_dict
        or cls.get_extra_state is not nn.Module.get_extra_state
    )
