"""Sparse convolution layers: the drop-ins for a pruned `torch.nn.Conv2d` or `Conv1d`. The op: ops/sparse_conv2d.py."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from pyops.nn.sparse import SparseLayer
from pyops.ops.sparse_checks import check_args, check_padding, check_pair

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Size = int | tuple[int, ...]


class _SparseConv(SparseLayer):
    """What Conv1d and Conv2d share; an image of Conv1d is one row high."""

    dims: ClassVar[int]
    dense_type: ClassVar[type[nn.Module]]

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
        pattern: str = "unstructured",
        activation: str = "none",
    ) -> None:
        dims = self.dims
        groups = check_pair("groups", groups, 1, 1)[0]
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if size < 0 or size % groups:
                raise ValueError(f"{name} is {size}; it must be divisible by groups={groups} and not negative")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={padding_mode!r} is not one of {', '.join(PADDING_MODES)}")
        kernel_size = check_pair("kernel_size", kernel_size, 1, dims)
        stride, dilation = check_pair("stride", stride, 1, dims), check_pair("dilation", dilation, 1, dims)
        shape = (out_channels, in_channels // groups, *(1,) * (2 - dims), *kernel_size)
        dense_shape = (*shape[:2], *kernel_size)
        super().__init__(shape, dense_shape, groups, bias, device, dtype, pattern, activation)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.dilation, self.padding_mode = stride, dilation, padding_mode
        if not isinstance(padding, str):
            both_sides = isinstance(padding, (tuple, list)) and len(padding) == 2 * dims
            padding = check_pair("padding", padding, 0, 2 * dims if both_sides else dims)
        self.padding = padding
        # The same as an image: of Conv1d one row high.
        rows = 2 - dims
        self._stride, self._dilation = (1,) * rows + stride, (1,) * rows + dilation
        if dims == 1 and not isinstance(padding, str):
            padding = (0, 0, padding[0], padding[-1])
        self._padding = check_padding(padding, shape[2:], self._stride, self._dilation)

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        pattern: str = "unstructured",
        mask: torch.Tensor | None = None,
        activation: str = "none",
    ) -> _SparseConv:
        """The sparse form of a pruned layer, on its device, in its training mode; the layer itself is not changed.

        The weight and bias are those that the layer computes with, pruned or parametrized in any way, as copies. It
        keeps what `mask` (the weight's shape) says; by default the weights that are not 0, and those that a mask in the
        layer keeps (see `find_mask`). Raises TypeError if `module` is no dense layer of this kind, ValueError for a
        mask that does not fit.
        """
        if not isinstance(module, cls.dense_type):
            raise TypeError(f"module must be a torch.nn.{cls.dense_type.__name__}, got {type(module).__name__}")
        # On meta: nothing is initialized only to be overwritten.
        layer = cls(
            *cls._arguments(module),
            False,
            module.padding_mode,
            "meta",
            module.weight.dtype,
            pattern=pattern,
            activation=activation,
        )
        return layer._take(module, mask)

    def to_dense(self) -> nn.Module:
        """torch's layer with the same weight, zeros written out; the activation is not part of it."""
        return self._fill(
            self.dense_type(*self._arguments(self), self.bias is not None, self.padding_mode, "meta", self.values.dtype)
        )

    @staticmethod
    def _arguments(module: Any) -> tuple[Any, ...]:
        sizes = (module.in_channels, module.out_channels, module.kernel_size)
        return *sizes, module.stride, module.padding, module.dilation, module.groups

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(conv(x) + bias + residual) in x's dtype; raises TypeError or ValueError naming the argument."""
        single = isinstance(x, torch.Tensor) and x.dim() == self.dims + 1
        image, r = self._as_images(x, single), self._as_images(residual, single)
        padding = self._padding
        if self.padding_mode != "zeros" and isinstance(image, torch.Tensor) and image.dim() == 4:
            top, bottom, left, right = padding
            sides = (left, right, top, bottom)[: 2 * self.dims]
            if any(sides):
                image = self._wrapped(image, sides)
            padding = (0, 0, 0, 0)
        window = (self._stride, padding, self._dilation)
        check_args(image, self.weight_shape, self.bias, r, *window, self.groups, self.activation)
        y = self._convolve(image, r, *window)
        if self.dims == 1:
            y = y.squeeze(2)
        return y.squeeze(0) if single else y

    def _as_images(self, t: Any, single: bool) -> Any:
        """t [N, C, H, W], of Conv1d [N, C, 1, L]; what is no tensor or of other dimensions is left for the checks."""
        if not isinstance(t, torch.Tensor) or t.dim() != self.dims + 2 - single:
            return t
        if single:
            t = t.unsqueeze(0)
        return t.unsqueeze(2) if self.dims == 1 else t

    def _wrapped(self, image: torch.Tensor, sides: tuple[int, ...]) -> torch.Tensor:
        if self.dims == 1:
            return F.pad(image.squeeze(2), sides, self.padding_mode).unsqueeze(2)
        return F.pad(image, sides, self.padding_mode)

    def extra_repr(self) -> str:
        """The arguments of the constructor, and the sparsity."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0,) * self.dims), ("dilation", (1,) * self.dims), ("groups", 1)):
            value = getattr(self, name)
            text += "" if value == default else f", {name}={value!r}"
        text += "" if self.bias is not None else ", bias=False"
        text += "" if self.padding_mode == "zeros" else f", padding_mode={self.padding_mode!r}"
        return f"{text}, {self._repr_tail()}"


class SparseConv2d(_SparseConv):
    """y = act(conv2d(x, W) + bias + residual), with a weight W [O, C/groups, R, S] that keeps some blocks only.

    Args:
        in_channels … padding_mode, device, dtype: as `torch.nn.Conv2d`; dtype fp32, bf16, fp16 or fp64. `padding` may
            also be (top, bottom, left, right).
        pattern: a name of `pyops.ops.sparse_weight.PATTERNS`. A new layer keeps all that the pattern allows;
            `from_dense` keeps what a mask says.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Shapes: x [N, C, H, W] or [C, H, W], residual and y [N, O, OH, OW] or [O, OH, OW], all three in x's dtype, under
    autocast too; y is channels_last if x is.

    State, training and loading: see `SparseLayer`. Raises TypeError for a dtype, ValueError for a size or name.
    """

    dims = 2
    dense_type = nn.Conv2d


class SparseConv1d(_SparseConv):
    """y = act(conv1d(x, W) + bias + residual), with a weight W [O, C/groups, S] that keeps some blocks only.

    Arguments, state, training and loading: as `SparseConv2d`, after `torch.nn.Conv1d`. Shapes: x [N, C, L] or [C, L],
    residual and y [N, O, OL] or [O, OL].
    """

    dims = 1
    dense_type = nn.Conv1d
