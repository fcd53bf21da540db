"""Who computes the gradients of sparse_backward: ours, and dense convolution in both memory formats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.peers import Instance, Peer
from pyops.bench.sparse_conv2d_peers import FORMATS, Pyops, TorchChannelsLast, TorchNchw


def _gradients(y: torch.Tensor, of: tuple[torch.Tensor, ...], inputs: Inputs, form: torch.memory_format) -> Instance:
    grad = inputs["grad"].to(memory_format=form)
    return Instance(lambda: torch.autograd.grad(y, of, grad, retain_graph=True), lambda gradients: gradients[0])


class Backward(Pyops):
    """The backward pass of the op."""

    devices = ("cpu",)
    runs = "torch.autograd.grad through pyops.ops.sparse_conv2d, of x, the kept values and the bias"

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {name: lambda form=form: self._instance(inputs, form) for name, form in FORMATS.items()}

    def _instance(self, inputs: Inputs, memory_format: torch.memory_format) -> Instance:
        from pyops.ops import SparseWeight, sparse_conv2d

        case = inputs["case"]
        weight = SparseWeight.from_dense(inputs["w"], pattern=case.pattern)
        x = inputs["x"].to(memory_format=memory_format).detach().requires_grad_()
        bias = inputs["bias"].clone().requires_grad_()
        weight.values.requires_grad_()
        y = sparse_conv2d(x, weight, bias, stride=case.dims["stride"], padding=case.dims["pad"])
        return _gradients(y, (x, weight.values, bias), inputs, memory_format)


class _Dense(Peer):
    memory_format: torch.memory_format

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        def build() -> Instance:
            dims = inputs["case"].dims
            x, w = (inputs[name].to(memory_format=self.memory_format).detach().requires_grad_() for name in ("x", "w"))
            bias = inputs["bias"].clone().requires_grad_()
            y = torch.nn.functional.conv2d(x, w, bias, dims["stride"], dims["pad"])
            return _gradients(y, (x, w, bias), inputs, self.memory_format)

        return {"": build}


class BackwardNchw(_Dense, TorchNchw):
    """Plain PyTorch."""

    devices = ("cpu",)
    runs = "torch.autograd.grad through conv2d, dense, NCHW (oneDNN)"


class BackwardChannelsLast(_Dense, TorchChannelsLast):
    """Plain PyTorch in channels_last."""

    devices = ("cpu",)
    runs = "torch.autograd.grad through conv2d, dense, channels_last (oneDNN)"


PEERS: list[type[Peer]] = [Backward, BackwardNchw, BackwardChannelsLast]
