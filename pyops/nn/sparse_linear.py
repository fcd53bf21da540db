"""Sparse linear layer: the drop-in for a pruned `torch.nn.Linear`. The op: ops/sparse_conv2d.py."""

from __future__ import annotations

import torch
from torch import nn

from pyops.nn.sparse import SparseLayer
from pyops.ops.sparse_checks import check_linear_args
from pyops.ops.sparse_conv2d import image_as_rows, rows_as_image


class SparseLinear(SparseLayer):
    """y = act(x · Wᵀ + bias + residual), with a weight W [out_features, in_features] that keeps some blocks only.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`; dtype fp32, bf16, fp16 or fp64.
        pattern: a name of `pyops.ops.sparse_weight.PATTERNS`. A new layer keeps all that the pattern allows;
            `from_dense` keeps what a mask says.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Shapes: x [..., in_features], residual and y [..., out_features], all three in x's dtype, under autocast too.

    State, training and loading: see `SparseLayer`. Raises TypeError for a dtype, ValueError for a size or name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: str = "unstructured",
        activation: str = "none",
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 0:
                raise ValueError(f"{name} is {size}; allowed: 0 and more")
        shape = (out_features, in_features, 1, 1)
        super().__init__(shape, shape[:2], 1, bias, device, dtype, pattern, activation)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        pattern: str = "unstructured",
        mask: torch.Tensor | None = None,
        activation: str = "none",
    ) -> SparseLinear:
        """The sparse form of a pruned layer, on its device, in its training mode; the layer itself is not changed.

        The weight and bias are those that the layer computes with, pruned or parametrized in any way, as copies. It
        keeps what `mask` (the weight's shape) says; by default the weights that are not 0, and those that a mask in the
        layer keeps (see `find_mask`). Raises TypeError if `module` is no `nn.Linear`, ValueError for a mask that does
        not fit.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module must be a torch.nn.Linear, got {type(module).__name__}")
        sizes = (module.in_features, module.out_features)
        # On meta: nothing is initialized only to be overwritten.
        layer = cls(*sizes, False, "meta", module.weight.dtype, pattern=pattern, activation=activation)
        return layer._take(module, mask)

    def to_dense(self) -> nn.Linear:
        """A `torch.nn.Linear` with the same weight, zeros written out; the activation is not part of it."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.values.dtype)
        return self._fill(dense)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(x · Wᵀ + bias + residual) in x's dtype; raises TypeError or ValueError naming the argument."""
        check_linear_args(x, self.weight_shape, self.bias, residual, self.activation)
        r = None if residual is None else rows_as_image(residual)
        y = self._convolve(rows_as_image(x), r, (1, 1), (0, 0, 0, 0), (1, 1))
        return image_as_rows(y, x.shape[:-1])

    def extra_repr(self) -> str:
        """The arguments of the constructor, and the sparsity."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._repr_tail()}"
