"""Who else computes int8_linear. Each gets what serves it best: prepared weights, bound outputs where it has them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.int8_linear_graphs import OnnxRuntime, OpenVino, OpenVinoStatic
from pyops.bench.peers import Instance, Peer


def float_linear(inputs: Inputs, dtype: torch.dtype) -> torch.nn.Linear:
    """The layer in this dtype, with a weight of its own."""
    N, K = inputs["w"].shape
    linear = torch.nn.Linear(K, N, device="meta")
    linear.weight = torch.nn.Parameter(inputs["w"].to(dtype, copy=True), requires_grad=False)
    linear.bias = torch.nn.Parameter(inputs["bias"].to(dtype, copy=True), requires_grad=False)
    return linear


class Int8Weights(Peer):
    """A peer that reads a byte a weight."""

    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel()


# --------------------------------------------------------------------------------------------------------------- ours


class Pyops(Int8Weights):
    """The op, as a user calls it."""

    name, role, devices = "pyops", "ours", ("cpu", "cuda")
    runs = "pyops.ops.int8_linear on a weight from pyops.ops.pack_int8"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.ops import int8_linear, pack_int8, quantize_int8
        from pyops.ops.int8_linear import wants_packed

        x, bias = inputs["x"], inputs["bias"]
        q_w, scale = quantize_int8(inputs["w"])

        def build() -> Instance:
            weight = pack_int8(q_w) if wants_packed(x.device) else q_w.clone()
            return Instance(lambda: int8_linear(x, weight, scale, bias))

        return {"": build}


class PyopsModule(Int8Weights):
    """The module, as `pyops.swap_` puts it into a model."""

    name, role, devices = "pyops-module", "ours", ("cpu", "cuda")
    runs = "pyops.nn.Int8Linear"

    @classmethod
    def missing(cls, device: str) -> str | None:
        found = importlib.util.find_spec("pyops.nn")
        if found and hasattr(importlib.import_module("pyops.nn"), "Int8Linear"):
            return None
        return "this build has no pyops.nn.Int8Linear"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32))
            return Instance(lambda: module(inputs["x"]))

        return {"": build}


class PyopsStatic(Int8Weights):
    """The module with a static scale."""

    name, role, devices = "pyops-static", "figure", ("cpu", "cuda")
    runs = 'pyops.nn.Int8Linear(mode="static"), input_scale = max|x| / 127 of the very x that is timed'
    excluded = "the activations' scale was known beforehand"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        x = inputs["x"]
        scale = x.abs().max().float() / 127

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32), mode="static", input_scale=scale)
            return Instance(lambda: module(x))

        return {"": build}


# -------------------------------------------------------------------------------------------------------------- torch


class _TorchFloat(Peer):
    role, dtype = "baseline", torch.float32

    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel() * self.dtype.itemsize

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        x = inputs["x"].to(self.dtype)  # a model in this dtype gets such activations, so the cast is not timed

        def build() -> Instance:
            linear = float_linear(inputs, self.dtype)
            return Instance(lambda: linear(x))

        return {"": build}


class TorchFp32(_TorchFloat):
    """Plain PyTorch."""

    name, runs, devices = "torch-fp32", "torch.nn.Linear, float32", ("cpu", "cuda")


class TorchBf16(_TorchFloat):
    """PyTorch in bfloat16, activations too."""

    name, runs, devices, dtype = "torch-bf16", "torch.nn.Linear, bfloat16 in and out", ("cpu", "cuda"), torch.bfloat16


class TorchFp16(_TorchFloat):
    """PyTorch in float16, activations too."""

    name, runs, devices, dtype = "torch-fp16", "torch.nn.Linear, float16 in and out", ("cuda",), torch.float16


class IntMM(Int8Weights):
    """The bare int8 matrix product of PyTorch."""

    name, role, devices = "torch-int_mm", "figure", ("cpu", "cuda")
    runs = "torch._int_mm on int8 activations, int32 out"
    excluded = "kernel only: no quantization, scales or bias"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.ops.int8_linear import quantize_int8, quantize_rows_ref

        q_w, s_w = quantize_int8(inputs["w"])
        q_x, s_x = quantize_rows_ref(inputs["x"])

        def build() -> Instance:
            weight = q_w.clone().t()
            return Instance(
                lambda: torch._int_mm(q_x, weight),
                lambda acc: acc * (s_x[:, None] * s_w) + inputs["bias"],  # so that it can be checked; not timed
            )

        return {"": build}


class Fbgemm(Int8Weights):
    """The dynamic quantization that PyTorch has always had."""

    name = "fbgemm"
    runs = "torch.ao.quantization.quantize_dynamic(nn.Linear, qint8), its default qconfig (per-tensor weights)"
    # The per-channel qconfig takes the same time (within 3 %) and gains 1 dB; what users get is the default.

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from torch.ao.quantization import quantize_dynamic

        x = inputs["x"]

        def build() -> Instance:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated in favour of torchao, still what most programs call
                float_model = torch.nn.Sequential(float_linear(inputs, torch.float32))
                model = quantize_dynamic(float_model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)[0]
            return Instance(lambda: model(x))

        return {"": build}


class TorchAO(Int8Weights):
    """PyTorch's quantization library, W8A8 dynamic."""

    name, module, package, devices = "torchao", "torchao", "torchao", ("cpu", "cuda")
    runs = "torchao quantize_(Int8DynamicActivationInt8WeightConfig), eager"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        x = inputs["x"]

        def build() -> Instance:
            model = torch.nn.Sequential(float_linear(inputs, x.dtype))
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
            return Instance(lambda: model[0](x))

        return {"": build}


PEERS: list[type[Peer]] = [
    Pyops,
    PyopsModule,
    PyopsStatic,
    TorchFp32,
    TorchBf16,
    TorchFp16,
    Fbgemm,
    OnnxRuntime,
    OpenVino,
    TorchAO,
    IntMM,
    OpenVinoStatic,
]
