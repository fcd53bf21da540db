"""ONNX Runtime and OpenVINO as peers of linear layers: they run graphs, so cold weights are a graph of many layers."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.peers import Instance, Peer


class _Int8Weights(Peer):
    graph = True

    def weight_bytes(self, inputs: Inputs) -> int:
        return inputs["w"].numel()


# -------------------------------------------------------------------------------------------------------- ONNX Runtime


GRAPH_FIELDS = ("node", "initializer", "input", "output")


class OnnxLinear(Peer):
    """ONNX Runtime on a graph of linear layers."""

    graph = True
    name, module, package = "onnxruntime", "onnxruntime", "onnxruntime"

    def __init__(self, device: torch.device, threads: int) -> None:
        super().__init__(device, threads)
        import onnxruntime

        # One pool for all sessions, so that only one set of threads spins.
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
        onnxruntime.set_default_logger_severity(3)
        logging.getLogger().setLevel(logging.ERROR)
        self._models: dict[tuple[str, tuple[int, ...]], bytes] = {}

    @classmethod
    def missing(cls, device: str) -> str | None:
        if super().missing(device) is None and importlib.util.find_spec("onnx") is None:
            return "not installed: pip install onnx (its models are made with it)"
        return super().missing(device)

    def _model(self, options: str, inputs: Inputs) -> bytes:
        """The serialized model of one layer, x [M, K] → y [M, N]; initializers of several dimensions are weights."""
        raise NotImplementedError

    def _build(self, inputs: Inputs, model_options: str, bound: bool, layers: int) -> Instance:
        import numpy
        import onnx
        import onnxruntime
        from onnx import compose, numpy_helper

        x = inputs["x"].numpy()
        y = torch.empty(x.shape[0], inputs["w"].shape[0]).numpy()  # from torch: aligned to 64 bytes, as ORT's own are
        model = onnx.load_from_string(self._model(model_options, inputs))
        single = onnx.GraphProto()
        single.CopyFrom(model.graph)
        for field in GRAPH_FIELDS:
            model.graph.ClearField(field)
        for i in range(layers):  # an input for each layer: with a common one ORT would quantize it once for all layers
            layer = compose.add_prefix_graph(single, f"{i}_")
            for tensor in layer.initializer:  # weights of its own: ORT keeps equal packed weights once
                if i and len(tensor.dims) >= 2:
                    rolled = numpy.roll(numpy_helper.to_array(tensor), i, axis=0)
                    tensor.CopyFrom(numpy_helper.from_array(rolled, tensor.name))
            for field in GRAPH_FIELDS:
                getattr(model.graph, field).extend(getattr(layer, field))
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        if not bound:
            feed = {f"{i}_x": x for i in range(layers)}
            return Instance(lambda: session.run(None, feed), lambda value: torch.from_numpy(value[0]))
        binding = session.io_binding()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in (x, y)]
        for i in range(layers):
            binding.bind_ortvalue_input(f"{i}_x", values[0])
            binding.bind_ortvalue_output(f"{i}_y", values[1])
        # The instance holds `values`, and with them the memory.
        return Instance(lambda: session.run_with_iobinding(binding), lambda _: torch.from_numpy(values[1].numpy()))


class OnnxRuntime(OnnxLinear, _Int8Weights):
    """ONNX Runtime with its dynamic quantizer."""

    runs = "MatMul + Add through onnxruntime.quantization.quantize_dynamic(per_channel=True)"

    def _model(self, weight_type: str, inputs: Inputs) -> bytes:
        """The quantized model; quantizing takes seconds, so that of the last shape is kept (M is dynamic)."""
        from onnx import TensorProto, helper, numpy_helper
        from onnxruntime.quantization import QuantType, quantize_dynamic

        key = (weight_type, tuple(inputs["w"].shape))
        if key in self._models:
            return self._models[key]
        self._models = {k: v for k, v in self._models.items() if k[1] == key[1]}
        N, K = inputs["w"].shape
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["product"]), helper.make_node("Add", ["product", "bias"], ["y"])],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", N])],
            [
                numpy_helper.from_array(inputs["w"].t().contiguous().numpy(), "w"),
                numpy_helper.from_array(inputs["bias"].numpy(), "bias"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "quantized.onnx")
            quantize_dynamic(model, path, weight_type=QuantType[weight_type], per_channel=True)
            with open(path, "rb") as file:
                self._models[key] = file.read()
        return self._models[key]

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {
            "QInt8 weights, bound output": lambda layers=1: self._build(inputs, "QInt8", True, layers),
            "QInt8 weights": lambda layers=1: self._build(inputs, "QInt8", False, layers),
            "QUInt8 weights, bound output": lambda layers=1: self._build(inputs, "QUInt8", True, layers),
        }


# ------------------------------------------------------------------------------------------------------------ OpenVINO


class OpenVinoLinear(Peer):
    """A graph of linear layers; what it holds as weights is up to the subclass."""

    graph = True
    module, package = "openvino", "openvino"

    def __init__(self, device: torch.device, threads: int) -> None:
        super().__init__(device, threads)
        import openvino

        self._core = openvino.Core()

    def _weights(self, inputs: Inputs, layers: int) -> list:
        """For each layer the node that gives the weight [N, K] in fp32, from constants that no two layers share."""
        raise NotImplementedError

    def _build(self, inputs: Inputs, static: bool, options: dict[str, object], layers: int) -> Instance:
        """x [M, K] → (FakeQuantize) → MatMul → Add, compiled for `threads`."""
        import numpy as np
        import openvino
        from openvino import opset13 as op

        bias = op.constant(inputs["bias"][None].numpy())
        weights = self._weights(inputs, layers)
        xs, ys = [], []
        for i in range(layers):
            x = op.parameter(list(inputs["x"].shape), np.float32)
            xs.append(x)
            if static:  # symmetric, for the range of the very activations that are timed: the best calibration there is
                high = np.float32(inputs["x"].abs().max())
                low = np.float32(-high * 128 / 127)
                x = op.fake_quantize(x, low, high, low, high, 256)
            ys.append(op.add(op.matmul(x, weights[i], False, True), bias))
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            **options,
        }
        request = self._core.compile_model(openvino.Model(ys, xs), "CPU", options).create_infer_request()
        memory = [inputs["x"].numpy(), torch.empty(inputs["x"].shape[0], inputs["w"].shape[0]).numpy()]
        source, target = (openvino.Tensor(array, shared_memory=True) for array in memory)
        for i in range(layers):
            request.set_input_tensor(i, source)
            request.set_output_tensor(i, target)
        # The instance holds `memory`: a tensor with shared memory does not keep its array alive.
        return Instance(request.infer, lambda _: torch.from_numpy(memory[1].copy()))


class Int8OpenVino(OpenVinoLinear, _Int8Weights):
    """OpenVINO on our int8 weights, with a scale for each output channel."""

    def _weights(self, inputs: Inputs, layers: int) -> list:
        from openvino import opset13 as op

        from pyops.ops.int8_linear import quantize_int8

        q_w, scale = quantize_int8(inputs["w"])
        scale = op.constant(scale[:, None].numpy())
        # Rolled, so that no layer has the constant of another, which it might share.
        return [op.multiply(op.convert(op.constant(q_w.roll(i, 0).numpy()), "f32"), scale) for i in range(layers)]


class OpenVino(Int8OpenVino):
    """OpenVINO, activations quantized inside the call."""

    name = "openvino"
    runs = "MatMul, int8 weights; activations int8 per row (DYNAMIC_QUANTIZATION_GROUP_SIZE = K) or default precision"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        # Activations are quantized only if the rest runs in fp32: with the default hint a CPU with AMX or AVX512_BF16
        # expands the weights to bf16 instead, which is faster for large M and therefore the second variant.
        dynamic = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": inputs["w"].shape[1]}
        return {
            "dynamic int8 activations": lambda layers=1: self._build(inputs, False, dynamic, layers),
            "default precision": lambda layers=1: self._build(inputs, False, {}, layers),
        }


class OpenVinoStatic(Int8OpenVino):
    """OpenVINO, activation range known beforehand."""

    name, role = "openvino-static", "figure"
    runs = "FakeQuantize on the activations with a known range, int8 weights: the int8 kernels of a calibrated model"
    excluded = "static activation scale, calibrated beforehand"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {"": lambda layers=1: self._build(inputs, True, {}, layers)}
