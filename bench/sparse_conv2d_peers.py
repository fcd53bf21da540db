"""Who else computes sparse_conv2d: dense convolution, in the two memory formats that PyTorch has."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from pyops.bench.case import Inputs
from pyops.bench.peers import Instance, Peer

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Pyops(Peer):
    """The op, as a user calls it: the weight keeps its packed form from one call to the next."""

    name, role, devices = "pyops", "ours", ("cpu", "cuda")
    runs = "pyops.ops.sparse_conv2d or int8_sparse_conv2d on a SparseWeight; x in the memory format that is faster"

    @classmethod
    def missing(cls, device: str) -> str | None:
        found = importlib.util.find_spec("pyops.ops.sparse_conv2d")
        if found and hasattr(importlib.import_module("pyops.ops"), "sparse_conv2d"):
            return super().missing(device)
        return "this build has no pyops.ops.sparse_conv2d"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {name: lambda form=form: self._instance(inputs, form) for name, form in FORMATS.items()}

    def _instance(self, inputs: Inputs, memory_format: torch.memory_format) -> Instance:
        from pyops.ops import SparseWeight, int8_sparse_conv2d, quantize_sparse, sparse_conv2d

        case = inputs["case"]
        window = {"stride": case.dims["stride"], "padding": case.dims["pad"]}
        x = inputs["x"].to(memory_format=memory_format)
        # Tensors that were made in inference mode have no version, so no packed form of them could be kept.
        with torch.inference_mode(False):
            weight = SparseWeight.from_dense(inputs["w"].clone(), pattern=case.pattern)
            bias = inputs["bias"].clone()
            if case.int8:
                q, scale = quantize_sparse(weight)
                return Instance(lambda: int8_sparse_conv2d(x, q, scale, bias, **window))
        return Instance(lambda: sparse_conv2d(x, weight, bias, **window))


class _Torch(Peer):
    devices = ("cpu", "cuda")
    memory_format: torch.memory_format

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        def build() -> Instance:
            dims, w = inputs["case"].dims, inputs["w"]
            x: Tensor = inputs["x"].to(memory_format=self.memory_format)
            conv = torch.nn.Conv2d(
                dims["C"], dims["O"], dims["R"], dims["stride"], dims["pad"], device=w.device, dtype=w.dtype
            )
            conv.weight.data.copy_(w)
            conv.bias.data.copy_(inputs["bias"])
            conv.to(memory_format=self.memory_format)
            return Instance(lambda: conv(x))

        return {"": build}


class TorchNchw(_Torch):
    """PyTorch as it comes."""

    name, role, memory_format = "torch-nchw", "baseline", torch.contiguous_format
    runs = "torch.nn.Conv2d, dense, NCHW (on a CPU oneDNN)"


class TorchChannelsLast(_Torch):
    """PyTorch with the model and its input in channels_last."""

    name, memory_format = "torch-channels_last", torch.channels_last
    runs = "torch.nn.Conv2d, dense, channels_last (on a CPU oneDNN)"


PEERS: list[type[Peer]] = [Pyops, TorchNchw, TorchChannelsLast]
