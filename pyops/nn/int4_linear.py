"""int4 linear layer: the drop-in for `torch.nn.Linear` that holds its weight in int4. The op: ops/int4_linear.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyops.memory import has_values
from pyops.nn.linear import Layout, QuantLinear, Tensors, canonical_tensor
from pyops.nn.state import wrong_type
from pyops.ops.int4_linear import COMPUTES, MAX_K, check_args, check_order, dispatch, wants_packed
from pyops.ops.int4_quantize import quantize_int4
from pyops.ops.int4_weight import (
    MOST_ZERO,
    PANEL_N,
    SCALE_DTYPES,
    check_group_size,
    group_count,
    pack_unchecked,
    unpack_int4,
)
from pyops.ops.int8_linear import FLOAT_DTYPES
from pyops.sizes import ceil_div

NAMES = ("weight", "weight_scale", "weight_zero")


class Int4Linear(QuantLinear):
    """y = act(x · Wᵀ + bias + residual), W[n, k] = s[n, g] · (q[n, k] - z[n, g]) with q of 4 bits in groups along k.

    Args:
        in_features, out_features, bias, device: as `torch.nn.Linear`.
        dtype: of the bias, fp32, bf16 or fp16; default torch's default dtype. The input may have any of the three.
        group_size: 32, a multiple of 64, or -1 for one group over all inputs; the last group may be shorter.
        symmetric: no zero points: z is 8 everywhere.
        scale_dtype: fp32, bf16 or fp16.
        act_order: the columns of the weight are sorted by group, as GPTQ's "act-order" needs it, and `input_order` says
            to which input each belongs.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        compute: "int8" quantizes each row of x by its own maximum, "float" computes with x as it is; "auto" is int8 on
            the CPU, float elsewhere.

    Shapes: x [..., in_features], residual and y [..., out_features], all three in x's dtype, under autocast too.

    State, the same on every device: `weight` uint8 [out_features, ⌈in_features/2⌉], two values in a byte;
    `weight_scale` [out_features, groups] fp32, bf16 or fp16; `weight_zero` uint8 of that shape, 0 … 16, unless
    symmetric; `input_order` int32 [in_features], a permutation, with act_order only; `bias` [out_features]. Loading
    takes scales of any of the three dtypes as they are: the layer has the checkpoint's from then on, and nothing is
    rounded. Where the kernels of a device read a packed form (see `pack_int4`), the layer holds that *instead of* the
    canonical weight, scales and zero points; these attributes and `state_dict()` then unpack copies. `.half()` and
    `.to(dtype)` change the bias only. The weight is frozen; x, residual and bias are differentiable (straight through
    x's rounding).

    Raises TypeError for a dtype and ValueError for a size or name that the op does not take.
    """

    packs = NAMES
    optional = {"weight_zero": "symmetric=True", "input_order": "act_order=False"}  # noqa: RUF012
    max_in_features = MAX_K
    piece_rows = PANEL_N
    input_order: torch.Tensor | None
    weight = canonical_tensor("weight", "The canonical weight; a copy if the layer holds the packed form.")
    weight_scale = canonical_tensor("weight_scale", "The scales [out_features, groups]; a copy if held packed.")
    weight_zero = canonical_tensor("weight_zero", "The zero points of that shape, a copy if held packed, or None.")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
        act_order: bool = False,
        activation: str = "none",
        compute: str = "auto",
    ) -> None:
        super().__init__(in_features, out_features, activation)
        check_group_size(group_size)
        if scale_dtype not in SCALE_DTYPES:
            raise TypeError(f"scale_dtype is {scale_dtype}; allowed: {', '.join(map(str, SCALE_DTYPES))}")
        if compute not in COMPUTES:
            raise ValueError(f"compute={compute!r} is not one of {', '.join(COMPUTES)}")
        self.group_size, self.symmetric, self.act_order = group_size, bool(symmetric), bool(act_order)
        self.compute = compute
        self._scale_dtypes = (scale_dtype, *(dtype for dtype in SCALE_DTYPES if dtype != scale_dtype))
        self._make(bias, device, dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        method: str = "rtn",
        scale_dtype: torch.dtype = torch.bfloat16,
        activation: str = "none",
        compute: str = "auto",
    ) -> Int4Linear:
        """The int4 form of a float layer, on its device, in its training mode; the layer itself is not changed.

        The weight and bias are the ones that the layer computes with, also where it is pruned or parametrized. The bias
        is a copy. `method` is "rtn" or "mse", see `quantize_int4`. Raises TypeError if `linear` is no `nn.Linear` or
        its dtype is not fp32, bf16 or fp16, ValueError if its weight holds NaN or Inf or for an unknown name or size.
        """

        def quantize(w: torch.Tensor) -> Tensors:
            how = {"symmetric": symmetric, "method": method, "scale_dtype": scale_dtype}
            return dict(zip(NAMES, quantize_int4(w, group_size, **how), strict=True))

        options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
        return cls._made_from(linear, quantize, **options, activation=activation, compute=compute)

    @classmethod
    def from_quantized(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zero: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        *,
        in_features: int,
        group_size: int,
        input_order: torch.Tensor | None = None,
        activation: str = "none",
        compute: str = "auto",
    ) -> Int4Linear:
        """A layer that holds these canonical tensors (see the class), symmetric if there are no zero points.

        The tensors are not copied where the device's kernels read them as they are. Raises TypeError for what is no
        tensor or has a dtype that is not allowed; ValueError for a wrong shape, scales that are not finite, zero points
        above 16, an `input_order` that is no permutation, and tensors on different devices.
        """
        given = {"weight": weight, "weight_scale": weight_scale}
        for name, t, dtypes in (
            ("weight", weight, torch.uint8),
            ("weight_scale", weight_scale, SCALE_DTYPES),
            *([] if bias is None else [("bias", bias, FLOAT_DTYPES)]),
        ):
            problem = wrong_type(name, t, dtypes)
            if problem:
                raise TypeError(problem)
        if weight.dim() != 2:
            raise ValueError(f"weight is {tuple(weight.shape)}; expected [out_features, ⌈in_features/2⌉]")
        given |= {} if weight_zero is None else {"weight_zero": weight_zero}
        given |= {} if input_order is None else {"input_order": input_order}
        N = weight.shape[0]
        if bias is not None and (tuple(bias.shape) != (N,) or bias.device != weight.device):
            raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}; expected ({N},) on {weight.device}")
        layer = cls(
            in_features,
            N,
            False,
            "meta",
            group_size=group_size,
            symmetric=weight_zero is None,
            scale_dtype=weight_scale.dtype,
            act_order=input_order is not None,
            activation=activation,
            compute=compute,
        )
        layer._take(given)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    def layout(self) -> dict[str, Layout]:
        """`weight`, `weight_scale` and, where the layer has them, `weight_zero` and `input_order`."""
        N, K = self.out_features, self.in_features
        groups = (N, group_count(K, self.group_size))
        layout = {
            "weight": Layout((N, ceil_div(K, 2)), (torch.uint8,)),
            "weight_scale": Layout(groups, self._scale_dtypes),
        }
        if not self.symmetric:
            layout["weight_zero"] = Layout(groups, (torch.uint8,))
        if self.act_order:
            layout["input_order"] = Layout((K,), (torch.int32,))
        return layout

    def _quantize(self, w: torch.Tensor) -> Tensors:
        quantized = quantize_int4(w, self.group_size, symmetric=self.symmetric, scale_dtype=self._scale_dtypes[0])
        tensors: Tensors = dict(zip(NAMES, quantized, strict=True))
        if self.act_order:
            tensors["input_order"] = torch.arange(self.in_features, dtype=torch.int32, device=w.device)
        return tensors

    def _pack(self, tensors: Tensors) -> Tensors:
        packed = pack_unchecked(*(tensors[name] for name in NAMES), self.in_features, self.group_size)
        return dict(zip(NAMES, packed, strict=True))

    def _unpack(self, tensors: Tensors) -> Tensors:
        sizes = (self.out_features, self.in_features, self.group_size)
        return dict(zip(NAMES, unpack_int4(*(tensors[name] for name in NAMES), *sizes), strict=True))

    def _wants_packed(self, device: torch.device) -> bool:
        return wants_packed(device)

    def _wrong_values(self, tensors: Tensors, prefix: str) -> list[str]:
        problems = []
        zero, order = tensors.get("weight_zero"), tensors.get("input_order")
        if zero is not None and zero.numel() and has_values(zero) and int(zero.max()) > MOST_ZERO:
            problems.append(f"{prefix}weight_zero holds {int(zero.max())}; zero points are 0 to {MOST_ZERO}.")
        if order is not None and has_values(order):
            try:
                check_order(order.cpu(), self.in_features)  # once, here: not at every call
            except ValueError as error:
                problems.append(f"{prefix}input_{error}.")
        return problems

    def _call(self, x, tensors, bias, residual):
        compute = self.compute
        if compute == "auto":
            compute = "int8" if x.is_cpu else "float"
        return dispatch(
            x,
            tensors["_weight"],
            tensors["_weight_scale"],
            tensors["_weight_zero"],
            bias,
            residual,
            self.activation,
            self.group_size,
            self.out_features,
            tensors["input_order"],
            compute,
        )

    def _check(self, x, tensors, bias, residual):
        weight = (tensors["_weight"], tensors["_weight_scale"], tensors["_weight_zero"])
        sizes = (self.group_size, self.out_features)
        check_args(x, *weight, bias, residual, self.activation, *sizes, None, self.compute)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"group_size": self.group_size, "symmetric": self.symmetric}
        options |= {"act_order": True} if self.act_order else {}
        options |= super()._options()
        return options if self.compute == "auto" else options | {"compute": self.compute}
