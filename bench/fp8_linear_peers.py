"""Who else computes fp8_linear. Each gets what serves it best: prepared weights, and a bias that it can add."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.int8_linear_peers import TorchBf16, TorchFp16, float_linear
from pyops.bench.peers import Instance, Peer


class _Fp8Weights(Peer):
    devices = ("cuda",)

    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel()


class Pyops(_Fp8Weights):
    """The module, as `pyops.swap_` puts it into a model."""

    name, role, devices = "pyops", "ours", ("cpu", "cuda")
    runs = "pyops.nn.Fp8Linear"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Fp8Linear

        x = inputs["x"]
        granularity = "block" if inputs["case"].dims["by_block"] else "row"

        def build() -> Instance:
            module = Fp8Linear.from_float(float_linear(inputs, x.dtype), granularity=granularity).to(x.device)
            return Instance(lambda: module(x))

        return {"": build}


class ScaledMM(_Fp8Weights):
    """PyTorch's fp8 matrix product alone."""

    name, role = "torch-scaled_mm", "figure"
    runs = "torch._scaled_mm by row on codes that are there, bf16 out"
    excluded = "kernel only: no quantization"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.ops.fp8_linear import quantize_fp8

        (codes, s_x), (w_q, s_w) = quantize_fp8(inputs["x"]), quantize_fp8(inputs["w"])
        scales = s_x[:, None], s_w[None, :]
        bias = inputs["bias"].bfloat16()

        def build() -> Instance:
            weight = w_q.clone().t()
            return Instance(lambda: torch._scaled_mm(codes, weight, *scales, bias, out_dtype=torch.bfloat16))

        return {"": build}


class TorchAO(_Fp8Weights):
    """PyTorch's quantization library."""

    name, module, package = "torchao", "torchao", "torchao"
    runs = "torchao quantize_(Float8DynamicActivationFloat8WeightConfig(PerRow())), eager"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        x = inputs["x"]

        def build() -> Instance:
            model = torch.nn.Sequential(float_linear(inputs, x.dtype))
            quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
            return Instance(lambda: model[0](x))

        return {"": build}


PEERS: list[type[Peer]] = [Pyops, TorchBf16, TorchFp16, ScaledMM, TorchAO]
