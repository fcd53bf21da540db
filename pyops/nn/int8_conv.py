"""int8 sparse convolution layer: a pruned `torch.nn.Conv2d` with an int8 weight. The op: ops/int8_sparse_conv2d.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pyops.nn.conv import Size, SparseConv2d, _SparseConv
from pyops.nn.linear import moved
from pyops.nn.sparse_state import CANONICAL, Found
from pyops.nn.state import check_entry
from pyops.ops.int8_linear import FLOAT_DTYPES
from pyops.ops.int8_sparse_conv2d import PATTERN, check_int8_weight, quantize_sparse, with_packed
from pyops.ops.sparse_weight import SparseWeight, scatter_blocks


class Int8SparseConv2d(_SparseConv):
    """y = act(dequant(conv2d(quant(x), W)) + bias + residual), each image quantized to int8 by its own maximum.

    The weight W keeps some blocks of 1 output × 4 input channels only, in int8.

    Args:
        in_channels … padding_mode, device: as `torch.nn.Conv2d`. `padding` may also be (top, bottom, left, right).
        dtype: of the bias, fp32, bf16, fp16 or fp64; default torch's default dtype.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Shapes: x [N, C, H, W] or [C, H, W] in fp32, bf16 or fp16, residual and y [N, O, OH, OW] or [O, OH, OW], all three
    in x's dtype, under autocast too; y is channels_last if x is.

    State, the same on every device: `values` int8 [B, 1, 4], `crow_indices` and `col_indices` int32, `weight_scale`
    fp32 [O], the Parameter `bias`. `.half()` and `.to(dtype)` change the bias only. The weight is frozen; x, residual
    and bias are differentiable (straight through x's rounding). `load_state_dict` takes the structure from the
    checkpoint and checks everything before anything is changed.

    Raises TypeError for a dtype, ValueError for a size or name.
    """

    dims = 2
    dense_type = nn.Conv2d
    weight_scale: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        super().__init__(*sizes, bias, padding_mode, device, dtype, pattern=PATTERN, activation=activation)

    @classmethod
    def from_sparse(cls, layer: SparseConv2d) -> Int8SparseConv2d:
        """The int8 form of a sparse layer of any pattern, with its activation, on its device, in its training mode.

        The layer itself is not changed. Blocks of another shape than 1 × 4 are stored with fill-in. Raises TypeError if
        `layer` is no `SparseConv2d`, ValueError if its weight holds NaN or Inf or has too large a K.
        """
        if not isinstance(layer, SparseConv2d):
            raise TypeError(f"layer must be a pyops.nn.SparseConv2d, got {type(layer).__name__}")
        sizes = cls._arguments(layer)
        # On meta: nothing is initialized only to be overwritten.
        new = cls(*sizes, False, layer.padding_mode, "meta", layer.values.dtype, activation=layer.activation)
        new._hold(layer.sparse_weight)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        return new.train(layer.training)

    @classmethod
    def from_dense(
        cls, module: nn.Conv2d, *, mask: torch.Tensor | None = None, activation: str = "none"
    ) -> Int8SparseConv2d:
        """The int8 form of a pruned `nn.Conv2d`; arguments and errors as `SparseConv2d.from_dense`."""
        return cls.from_sparse(SparseConv2d.from_dense(module, pattern=PATTERN, mask=mask, activation=activation))

    def to_dense(self) -> nn.Conv2d:
        """torch's fp32 layer with the dequantized weight, frozen; the activation is not part of it."""
        sizes = self._arguments(self)
        return self._fill(nn.Conv2d(*sizes, self.bias is not None, self.padding_mode, "meta", torch.float32))

    def reset_parameters(self) -> None:
        """The initial values of `torch.nn.Conv2d`, quantized."""
        if self.values.is_meta:
            return
        fan_in = math.prod(self.weight_shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        w = torch.empty(self.weight_shape, device=self.values.device).uniform_(-bound, bound)
        mask = torch.ones_like(w, dtype=torch.bool)
        self._hold(SparseWeight.from_dense(w, mask, pattern=PATTERN, groups=self.groups))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> torch.Tensor:
        """A dense fp32 copy of the weight, dequantized."""
        structure = (self.crow_indices, self.col_indices, self.weight_shape, self.block, self.groups)
        return scatter_blocks(self.values.float(), *structure) * self.weight_scale[:, None, None, None]

    def _hold(self, weight: SparseWeight) -> None:
        q, scale = quantize_sparse(weight)
        check_int8_weight(q, scale)
        for name, t in (("values", q.values), ("crow_indices", q.crow_indices), ("col_indices", q.col_indices)):
            self.register_buffer(name, t)
        self.register_buffer("block_mask", None)  # a frozen weight needs none
        self.register_buffer("weight_scale", scale)
        self._packed.clear()

    def _convolve(self, x, residual, stride, padding, dilation) -> torch.Tensor:
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"x has dtype {x.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        buffers, parameters = self._buffers, self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        names = ("values", "weight_scale", "crow_indices", "col_indices")
        structure = (*(buffers[name] for name in names), self.weight_shape)
        window = (stride, padding, dilation, self.groups)
        return with_packed(self._packed, x, *structure, bias, residual, *window, self.activation)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8SparseConv2d:
        # The scale takes the device and memory that fn gives, never its dtype, so it passes as its bits.
        scale = self._buffers.pop("weight_scale")
        try:
            super()._apply(fn, recurse)
            scale = moved(scale.view(torch.int32), fn).view(torch.float32)
        finally:
            self._buffers["weight_scale"] = scale
        return self

    def _read(self, state_dict: dict[str, Any], prefix: str) -> Found:
        names = (*CANONICAL, "weight_scale")
        found = Found()
        present = {name: state_dict[prefix + name] for name in (*names, "bias") if prefix + name in state_dict}
        lacking = [name for name in names if name not in present]
        if lacking and len(lacking) < len(names):
            has = next(name for name in names if name in present)
            found.problems.append(
                f"{prefix}{has} comes without {prefix}{lacking[0]}; they are loaded together or not at all."
            )
        O = self.weight_shape[0]
        for name, value in present.items():
            shape = tuple(value.shape) if name in CANONICAL and isinstance(value, torch.Tensor) else (O,)
            dtype = {"values": torch.int8, "weight_scale": torch.float32, "bias": None}.get(name, torch.int32)
            problem = None if name == "bias" and self.bias is None else check_entry(prefix + name, value, shape, dtype)
            found.problems += [problem] if problem else []
        if not lacking and not found.problems:
            values, crow, col = (present[name] for name in CANONICAL)
            try:
                SparseWeight(values, crow, col, self.weight_shape, self.block, self.groups, pattern=PATTERN)
            except ValueError as error:
                found.problems.append(f"{prefix}{error}.")
            else:
                found.tensors.update({name: present[name] for name in names})
        return found
