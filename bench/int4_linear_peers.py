"""Who else computes int4_linear. Each gets what serves it best: prepared weights, bound outputs where it has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyops.bench.case import Case, Inputs
from pyops.bench.int4_linear import quantized
from pyops.bench.int8_linear_graphs import OnnxLinear, OpenVinoLinear
from pyops.bench.int8_linear_peers import TorchBf16, TorchFp16, TorchFp32, float_linear
from pyops.bench.peers import Instance, Peer
from pyops.ops.int4_quantize import quantize_int4


class _Int4Weights(Peer):
    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel() // 2


# --------------------------------------------------------------------------------------------------------------- ours


class Pyops(_Int4Weights):
    """The module, as `pyops.swap_` puts it into a model."""

    name, role, devices = "pyops", "ours", ("cpu", "cuda")
    runs = "pyops.nn.Int4Linear"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int4Linear

        x = inputs["x"]

        def build() -> Instance:
            linear = float_linear(inputs, torch.float32)
            module = Int4Linear.from_float(linear, group_size=inputs["case"].dims["G"])
            module.to(x.dtype)  # the bias, as in a model of this dtype
            return Instance(lambda: module(x))

        return {"": build}


class PyopsFreeScales(_Int4Weights):
    """The same for weights of other libraries, whose scales are no multiples of steps."""

    name, role, devices = "pyops-free-scales", "figure", ("cpu", "cuda")
    runs, excluded = "pyops.nn.Int4Linear, scales as from another library", "ours, for weights that were loaded"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int4Linear

        x, K, G = inputs["x"], inputs["w"].shape[1], inputs["case"].dims["G"]

        def build() -> Instance:
            weight = quantize_int4(inputs["w"], G, steps=False)
            bias = inputs["bias"].to(x.dtype)
            module = Int4Linear.from_quantized(*weight, bias, in_features=K, group_size=G)
            return Instance(lambda: module(x))

        return {"": build}


class PyopsFloat(_Int4Weights):
    """The same with activations as they are."""

    name, role = "pyops-float", "figure"  # on a GPU "pyops" is this
    runs, excluded = 'pyops.nn.Int4Linear(compute="float")', "ours, exact in its activations"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int4Linear

        x = inputs["x"]

        def build() -> Instance:
            linear = float_linear(inputs, torch.float32)
            module = Int4Linear.from_float(linear, group_size=inputs["case"].dims["G"], compute="float").to(x.dtype)
            return Instance(lambda: module(x))

        return {"": build}


class PyopsInt8(Peer):
    """What our int8 takes for the same layer."""

    name, role, devices = "pyops-int8", "figure", ("cpu", "cuda")
    runs, excluded = "pyops.nn.Int8Linear", "8-bit weights: how near int4 comes to int8 for many rows"

    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel()

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.nn import Int8Linear

        def build() -> Instance:
            module = Int8Linear.from_float(float_linear(inputs, torch.float32))
            return Instance(lambda: module(inputs["x"]))

        return {"": build}


# -------------------------------------------------------------------------------------------------------------- torch


class TorchInt4Pack(_Int4Weights):
    """PyTorch's own int4 kernel, which torchao calls on CPUs."""

    name = "torch-int4pack"
    runs = "torch.ops.aten._weight_int4pack_mm_for_cpu + bias, fp32 or bf16 activations and scales"

    @classmethod
    def covers(cls, case: Case) -> bool:
        return case.dims["N"] % 16 == 0  # others it refuses

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        from pyops.ops.int4_weight import unpack_nibbles

        G, K = inputs["case"].dims["G"], inputs["w"].shape[1]
        w_q, scale, zero = quantized(inputs)
        codes = unpack_nibbles(w_q, K).int()
        s = scale.float().t()
        both = torch.stack([s, (8 - zero.t().float()) * s], dim=-1)  # it computes (q - 8) · s + z

        def builder(dtype: torch.dtype) -> Callable[[], Instance]:
            def build() -> Instance:
                packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
                x, bias, table = (t.to(dtype) for t in (inputs["x"], inputs["bias"], both.contiguous()))
                return Instance(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, G, table).add_(bias))

            return build

        return {"fp32": builder(torch.float32), "bf16": builder(torch.bfloat16)}


# ------------------------------------------------------------------------------------------------------------- graphs


class OnnxRuntimeInt4(OnnxLinear, _Int4Weights):
    """ONNX Runtime's MatMulNBits."""

    runs = "com.microsoft.MatMulNBits with bias, accuracy_level 4 (int8 activations) or 0 (fp32), fastest of them"

    def _model(self, options: str, inputs: Inputs) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        from pyops.ops.int4_weight import pack_nibbles

        (N, K), G = inputs["w"].shape, inputs["case"].dims["G"]
        w_q, scale, zero = quantized(inputs)
        tensors = {
            "w": w_q.view(N, K // G, G // 2),
            "scale": scale.float(),
            "zero": pack_nibbles(zero),
            "bias": inputs["bias"],
        }
        attributes = {"K": K, "N": N, "bits": 4, "block_size": G, "accuracy_level": int(options)}
        graph = helper.make_graph(
            [
                helper.make_node(  # "": no g_idx
                    "MatMulNBits",
                    ["x", "w", "scale", "zero", "", "bias"],
                    ["y"],
                    domain="com.microsoft",
                    **attributes,
                )
            ],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
            [numpy_helper.from_array(t.contiguous().numpy(), name) for name, t in tensors.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {
            "int8 activations, bound output": lambda layers=1: self._build(inputs, "4", True, layers),
            "fp32 activations, bound output": lambda layers=1: self._build(inputs, "0", True, layers),
        }


class OpenVinoInt4(OpenVinoLinear, _Int4Weights):
    """OpenVINO with u4 weights, as its compression makes them."""

    name = "openvino"
    runs = "MatMul, u4 weights with zero points in groups; activations int8 in groups, or default precision"

    def __init__(self, device: torch.device, threads: int) -> None:
        super().__init__(device, threads)
        self._codes: list[Any] = []  # what OpenVINO's tensors look at: one of u4 does not keep its array alive

    def _weights(self, inputs: Inputs, layers: int) -> list:
        import numpy as np
        import openvino
        from openvino import opset13 as op

        N, G = inputs["w"].shape[0], inputs["case"].dims["G"]
        w_q, scale, zero = quantized(inputs)
        groups = scale.shape[1]
        codes = w_q.view(N, groups, G // 2)
        s = op.convert(op.constant(scale.half()[..., None].numpy()), "f32")
        z = op.convert(op.constant(zero[..., None].numpy()), "f32")
        nodes = []
        for i in range(layers):
            packed = np.ascontiguousarray(codes.roll(i, 0).numpy())
            u4 = op.constant(openvino.Tensor(packed, openvino.Shape([N, groups, G]), openvino.Type.u4))
            self._codes.append(packed)
            grouped = op.multiply(op.subtract(op.convert(u4, "f32"), z), s)
            nodes.append(op.reshape(grouped, op.constant(np.array([N, groups * G], dtype=np.int64)), False))
        return nodes

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        G = inputs["case"].dims["G"]
        dynamic = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": G}
        both = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": G}
        return {
            "int8 activations": lambda layers=1: self._build(inputs, False, dynamic, layers),
            "default precision": lambda layers=1: self._build(inputs, False, {}, layers),
            "default precision, int8 activations": lambda layers=1: self._build(inputs, False, both, layers),
        }


PEERS: list[type[Peer]] = [
    Pyops,
    PyopsFreeScales,
    PyopsFloat,
    PyopsInt8,
    TorchFp32,
    TorchBf16,
    TorchFp16,
    TorchInt4Pack,
    OnnxRuntimeInt4,
    OpenVinoInt4,
]
