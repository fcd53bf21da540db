"""The quantized linear layers, as data for tests that all of them pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyops import backend, ops
from pyops.nn import Fp8Linear, Int4Linear, Int8Linear
from pyops.nn.linear import QuantLinear

N, K = 33, 70


@dataclasses.dataclass(frozen=True)
class Kind:
    """One quantized linear layer with its options."""

    name: str
    module: type[QuantLinear]
    options: dict[str, Any]
    """Of the constructor."""
    how: dict[str, Any] | None
    """Of `from_float`, each a value or a function of in_features; None if `assemble` makes it, of a float layer."""
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor | None, ...]]
    """What `from_float` makes of a weight."""
    call: Callable[..., torch.Tensor]
    """The op on a layer's canonical tensors: call(layer, x, residual=None)."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Shape and dtype of the canonical tensors of an N x K layer."""
    assemble: Callable[..., QuantLinear] | None = None
    """assemble(linear, **options): by `from_quantized`, from what `linear` holds."""

    def new(self, k: int = K, n: int = N, *args, **options) -> QuantLinear:
        """A layer by its constructor."""
        return self.module(k, n, *args, **{**self.options, **options})

    def arguments(self, k: int = K) -> dict[str, Any]:
        """The keyword arguments of `from_float` for a layer of k inputs."""
        return {name: value(k) if callable(value) else value for name, value in self.how.items()}

    def make(self, n: int = N, k: int = K, bias: bool = True, **options) -> QuantLinear:
        """A layer of a float one."""
        torch.manual_seed(0)
        linear = nn.Linear(k, n, bias)
        if self.how is not None:
            return self.module.from_float(linear, **{**self.arguments(k), **options})
        return self.assemble(linear, **options)


def assemble_int4(linear: nn.Linear, **options) -> Int4Linear:
    """An Int4Linear in act-order."""
    order = torch.randperm(linear.in_features, dtype=torch.int32)
    tensors = quantize_ordered(linear.weight[:, order.long()])
    sizes = {"in_features": linear.in_features, "group_size": -1}
    return Int4Linear.from_quantized(*tensors, linear.bias, **sizes, input_order=order, **options)


def quantize_ordered(w: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of the weight with its columns in order."""
    return ops.quantize_int4(w, -1, scale_dtype=F32)


def assemble_fp8(linear: nn.Linear, **options) -> Fp8Linear:
    """An Fp8Linear with a static scale, at which normal inputs do not saturate."""
    scale = torch.tensor([6 / 448])
    return Fp8Linear.from_quantized(*ops.quantize_fp8(linear.weight), linear.bias, input_scale=scale, **options)


def call_int8(layer: Int8Linear, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`ops.int8_linear` on what an Int8Linear holds."""
    head = (x, layer.weight, layer.weight_scale, layer.bias)
    if layer.mode == "weight_only":
        return ops.int8_weight_linear(*head, residual=residual, activation=layer.activation)
    more = {"x_scale": layer.input_scale, "smooth": layer.smooth}
    return ops.int8_linear(*head, residual=residual, activation=layer.activation, **more)


def call_int4(layer: Int4Linear, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`ops.int4_linear` on what an Int4Linear holds."""
    return ops.int4_linear(
        x,
        layer.weight,
        layer.weight_scale,
        layer.weight_zero,
        layer.bias,
        group_size=layer.group_size,
        residual=residual,
        activation=layer.activation,
        order=layer.input_order,
        compute=layer.compute,
    )


def call_fp8(layer: Fp8Linear, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`ops.fp8_linear` on what an Fp8Linear holds."""
    options = {"residual": residual, "activation": layer.activation, "x_scale": layer.input_scale}
    return ops.fp8_linear(x, layer.weight, layer.weight_scale, layer.bias, **options)


U8, I8, I32, F32, F8 = torch.uint8, torch.int8, torch.int32, torch.float32, torch.float8_e4m3fn
GROUPED = {"group_size": 32}
SYMMETRIC = {"group_size": 64, "symmetric": True, "scale_dtype": torch.float16, "compute": "float"}


def smooth(k: int = K) -> torch.Tensor:
    """What the columns of k inputs are divided by."""
    return torch.linspace(0.5, 2.0, k)


ORDERED = {"group_size": -1, "scale_dtype": F32}
KINDS = (
    Kind(
        name="int8",
        module=Int8Linear,
        options={},
        how={},
        quantize=ops.quantize_int8,
        call=call_int8,
        layout={"weight": ((N, K), I8), "weight_scale": ((N,), F32)},
    ),
    Kind(
        name="int8_static",
        module=Int8Linear,
        options={"mode": "static"},
        how={"mode": "static", "input_scale": 0.03},
        quantize=lambda w: (*ops.quantize_int8(w), torch.tensor(0.03)),
        call=call_int8,
        layout={"weight": ((N, K), I8), "weight_scale": ((N,), F32), "input_scale": ((), F32)},
    ),
    Kind(
        name="int8_static_smooth",
        module=Int8Linear,
        options={"mode": "static", "smooth": True},
        how={"mode": "static", "input_scale": 0.02, "smooth": smooth},
        quantize=lambda w: (*ops.quantize_int8(w * smooth()), torch.tensor(0.02), smooth()),
        call=call_int8,
        layout={"weight": ((N, K), I8), "weight_scale": ((N,), F32), "input_scale": ((), F32), "smooth": ((K,), F32)},
    ),
    Kind(
        name="int8_smooth",
        module=Int8Linear,
        options={"smooth": True},
        how={"smooth": smooth},
        quantize=lambda w: (*ops.quantize_int8(w * smooth()), smooth()),
        call=call_int8,
        layout={"weight": ((N, K), I8), "weight_scale": ((N,), F32), "smooth": ((K,), F32)},
    ),
    Kind(
        name="int8_weight_only",
        module=Int8Linear,
        options={"mode": "weight_only"},
        how={"mode": "weight_only"},
        quantize=ops.quantize_int8,
        call=call_int8,
        layout={"weight": ((N, K), I8), "weight_scale": ((N,), F32)},
    ),
    Kind(
        name="int4",
        module=Int4Linear,
        options=GROUPED,
        how=GROUPED,
        quantize=lambda w: ops.quantize_int4(w, 32),
        call=call_int4,
        layout={"weight": ((N, 35), U8), "weight_scale": ((N, 3), torch.bfloat16), "weight_zero": ((N, 3), U8)},
    ),
    Kind(
        name="int4_symmetric",
        module=Int4Linear,
        options=SYMMETRIC,
        how=SYMMETRIC,
        quantize=lambda w: ops.quantize_int4(w, 64, symmetric=True, scale_dtype=torch.float16),
        call=call_int4,
        layout={"weight": ((N, 35), U8), "weight_scale": ((N, 2), torch.float16)},
    ),
    Kind(
        name="int4_ordered",
        module=Int4Linear,
        options={**ORDERED, "act_order": True},
        how=None,
        quantize=quantize_ordered,
        call=call_int4,
        layout={
            "weight": ((N, 35), U8),
            "weight_scale": ((N, 1), F32),
            "weight_zero": ((N, 1), U8),
            "input_order": ((K,), I32),
        },
        assemble=assemble_int4,
    ),
    Kind(
        name="fp8",
        module=Fp8Linear,
        options={},
        how={},
        quantize=ops.quantize_fp8,
        call=call_fp8,
        layout={"weight": ((N, K), F8), "weight_scale": ((N,), F32)},
    ),
    Kind(
        name="fp8_block",
        module=Fp8Linear,
        options={"granularity": "block"},
        how={"granularity": "block"},
        quantize=lambda w: ops.quantize_fp8(w, "block"),
        call=call_fp8,
        layout={"weight": ((N, K), F8), "weight_scale": ((1, 1), F32)},
    ),
    Kind(
        name="fp8_static",
        module=Fp8Linear,
        options={"static": True},
        how=None,
        quantize=ops.quantize_fp8,
        call=call_fp8,
        layout={"weight": ((N, K), F8), "weight_scale": ((N,), F32), "input_scale": ((1,), F32)},
        assemble=assemble_fp8,
    ),
)
FROM_FLOAT = tuple(kind for kind in KINDS if kind.how is not None)


def same(a: dict, b: dict) -> bool:
    """True if two states hold equal tensors of the same dtypes under the same keys."""
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True for the same dtype and values; `torch.equal` does not know float8, whose bytes are compared."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(a.view(U8), b.view(U8)) if a.dtype == F8 else torch.equal(a, b)


def held_form_is_right(layer: QuantLinear) -> None:
    """One copy, in the form that the kernels of this device want."""
    held = dict(layer.named_buffers())
    names = {f"_{name}" if name in layer.packs else name for name in layer.layout()}
    assert held.keys() == names
    packed = backend.native is not None and held["_weight"].device.type == "cpu" and not isinstance(layer, Fp8Linear)
    assert held["_weight"].dim() == (3 if packed else 2)
