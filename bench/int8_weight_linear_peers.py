"""Who else computes int8_weight_linear. Each gets what serves it best: prepared weights, bound outputs where it can."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.int8_linear_graphs import Int8OpenVino
from pyops.bench.int8_linear_peers import Int8Weights, TorchBf16, TorchFp16, TorchFp32, float_linear
from pyops.bench.peers import Instance, Peer
from pyops.ops.int8_linear import quantize_int8


class Pyops(Int8Weights):
    """The module, as `pyops.swap_` puts it into a model."""

    name, role, devices = "pyops", "ours", ("cpu", "cuda")
    runs = 'pyops.nn.Int8Linear(mode="weight_only")'

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        x = inputs["x"]

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32), mode="weight_only")
            module.to(x.dtype)  # the bias, as in a model of this dtype
            return Instance(lambda: module(x))

        return {"": build}


class PyopsBf16(Int8Weights):
    """The same in a bf16 model, which is what torch-bf16 computes."""

    name, role = "pyops-bf16", "figure"  # on a GPU "pyops" is this
    runs, excluded = 'pyops.nn.Int8Linear(mode="weight_only"), bf16 activations', "ours, bf16 rows instead of fp32"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        x = inputs["x"].bfloat16()

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32), mode="weight_only").bfloat16()
            return Instance(lambda: module(x))

        return {"": build}


class PyopsDynamic(Int8Weights):
    """What the same layer takes if it quantizes x."""

    name, role, devices = "pyops-dynamic", "figure", ("cpu", "cuda")
    runs, excluded = "pyops.nn.Int8Linear", "8-bit activations: what keeping x as it is costs"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32))
            return Instance(lambda: module(inputs["x"]))

        return {"": build}


class TorchInt8Pack(Int8Weights):
    """PyTorch's own kernel, which inductor calls on CPUs for torchao's weight-only layers."""

    name = "torch-int8pack"
    runs = "torch.ops.aten._weight_int8pack_mm + bias, fp32 or bf16 activations and scales"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        q_w, s_w = quantize_int8(inputs["w"])

        def builder(dtype: torch.dtype) -> Callable[[], Instance]:
            def build() -> Instance:
                weight = q_w.clone()
                x, scale, bias = (t.to(dtype) for t in (inputs["x"], s_w, inputs["bias"]))
                return Instance(lambda: torch.ops.aten._weight_int8pack_mm(x, weight, scale).add_(bias))

            return build

        return {"fp32": builder(torch.float32), "bf16": builder(torch.bfloat16)}


class TorchAOWeightOnly(Int8Weights):
    """PyTorch's quantization library, W8A16."""

    name, module, package, devices = "torchao", "torchao", "torchao", ("cpu", "cuda")
    runs = "torchao quantize_(Int8WeightOnlyConfig), eager"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        x = inputs["x"]

        def build() -> Instance:
            model = torch.nn.Sequential(float_linear(inputs, x.dtype))
            quantize_(model, Int8WeightOnlyConfig())
            return Instance(lambda: model[0](x))

        return {"": build}


class OpenVinoWeightOnly(Int8OpenVino):
    """OpenVINO with compressed weights, activations in float."""

    name = "openvino"
    runs = "MatMul, int8 weights; activations fp32 (no dynamic quantization), or default precision"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        # Group size 0 says that activations are not to be quantized, which is what a CPU does by default.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        default = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        return {
            "fp32": lambda layers=1: self._build(inputs, False, exact, layers),
            "default precision": lambda layers=1: self._build(inputs, False, default, layers),
        }


PEERS: list[type[Peer]] = [
    Pyops,
    PyopsBf16,
    PyopsDynamic,
    TorchFp32,
    TorchBf16,
    TorchFp16,
    TorchInt8Pack,
    TorchAOWeightOnly,
    OpenVinoWeightOnly,
]
