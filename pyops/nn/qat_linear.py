"""The linear layer of quantization-aware training: float parameters, the rounding of a quantized layer in forward."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pyops.nn.effective import origin
from pyops.nn.linear import moved
from pyops.ops.int8_linear import FLOAT_DTYPES

if TYPE_CHECKING:
    from pyops.quantize import LinearConfig


class QatLinear(nn.Linear):
    """y = x̂ · Ŵᵀ + bias, with x̂ and Ŵ as the layer that `config` makes would round them; made by `prepare_qat_`.

    It holds what the `nn.Linear` held, the same Parameter objects under the same names: optimizers and checkpoints of
    the float model go on to work (for `Int8Static` the buffers `input_scale` and perhaps `smooth` join them). Weight
    and input are rounded at each call, in training and in eval mode alike, by the functions that the kernels are tested
    against; the product is computed in fp32. Gradients go straight through the rounding to x and the weight (see
    `pyops.ops.fake_quantize`).

    Shapes: x [..., in_features] fp32, bf16 or fp16, y [..., out_features] in x's dtype, under autocast too, as the
    quantized layer gives it. Raises TypeError for another dtype, ValueError for another size. NaN or Inf in the weight
    gives NaN.
    """

    config: LinearConfig
    _scales: tuple[str, ...] = ()
    """The buffers that the config needs."""

    @classmethod
    def from_float(
        cls, linear: nn.Linear, config: LinearConfig, buffers: Mapping[str, torch.Tensor] | None = None
    ) -> QatLinear:
        """The trainable form of a layer, which shares all that the layer holds: parameters, buffers, hooks, pruning.

        `buffers` are what the config needs beside the weight: for `Int8Static` "input_scale" and perhaps "smooth".
        Raises TypeError if `linear` is no `nn.Linear`, ValueError if it is parametrized
        or a buffer is lacking.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if parametrize.is_parametrized(linear):
            raise ValueError(f"linear has a {unshared(linear)}")
        lacking = [name for name in config.needs if name not in (buffers or {})]
        if lacking:
            raise ValueError(f"buffers have no {lacking[0]!r}, which {config!r} needs")
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)  # the same dicts: handles of hooks and pruning go on to work
        layer.__dict__.pop("_compiled_call_impl", None)  # of linear.compile(): it calls that one
        layer.config = config.without_data()
        if buffers:
            layer._buffers = dict(linear._buffers)  # its own: nothing shows in `linear`
            layer._scales = tuple(buffers)
            for name, t in buffers.items():
                layer.register_buffer(name, t)
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> QatLinear:
        # fn is .to(), .half() …: what the config needs keeps its dtype, as in the quantized layer.
        kept = {name: t for name, t in self._buffers.items() if name in self._scales}
        for name in kept:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
            kept = {name: moved(t, fn) for name, t in kept.items()}
        finally:
            self._buffers.update(kept)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ · Ŵᵀ + bias in x's dtype."""
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOAT_DTYPES:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"x is {got}; allowed: tensors of {', '.join(map(str, FLOAT_DTYPES))}")
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}; the last dimension must be in_features, {self.in_features}")
        device = x.device.type
        known = torch.amp.is_autocast_available(device)  # not of meta
        with torch.autocast(device, enabled=False) if known else contextlib.nullcontext():
            x_hat, w_hat = self.config.fake_quantize(self, x)
            y = nn.functional.linear(x_hat, w_hat, None if self.bias is None else self.bias.float())
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor and the config."""
        return f"{super().extra_repr()}, config={self.config!r}"


def unshared(linear: nn.Linear) -> str | None:
    """What keeps a layer's tensors from being shared with a `QatLinear`; None if nothing does."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(linear, name):  # a property of a class of its own
            remove = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
            return f"{name} {origin(linear, name)}: {remove} first"
    return None
