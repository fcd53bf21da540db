"""fp8 linear layer: `torch.nn.Linear` with its weight in e4m3. The op: ops/fp8_linear.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyops.memory import has_values
from pyops.nn.linear import Layout, QuantLinear, Tensors, canonical_tensor
from pyops.nn.state import wrong_type
from pyops.ops.fp8_linear import (
    FP8,
    MAX_K,
    SMALLEST_SCALE,
    check_args,
    check_granularity,
    dispatch,
    quantize_fp8,
    scale_shape,
)
from pyops.ops.int8_linear import FLOAT_DTYPES


class Fp8Linear(QuantLinear):
    """y = act(dequant(quant(x) · weightᵀ) + bias + residual), weight and x in e4m3.

    Args:
        in_features, out_features, bias, device: as `torch.nn.Linear`.
        dtype: of the bias, fp32, bf16 or fp16; default torch's default dtype. The input may have any of the three.
        granularity: "row": a scale for each output channel, and for each row of x. "block": for each 128 × 128 of the
            weight, and for each 128 columns of a row of x, as in DeepSeek-V3: more exact where the magnitudes of a row
            span more than e4m3's 2¹⁵.
        static: x is quantized with `input_scale`, what it saturates at divided by 448, instead of by its own maxima;
            with granularity "row" only. A new layer has an `input_scale` of 1: load or set the one that was calibrated.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Shapes: x [..., in_features], residual and y [..., out_features], all three in x's dtype, under autocast too.

    State, the same on every device: `weight` float8_e4m3fn [out_features, in_features]; `weight_scale` fp32
    [out_features] or [⌈out_features/128⌉, ⌈in_features/128⌉]; `input_scale` fp32 [1] with static only; `bias`
    [out_features]. The buffer behind `weight` holds it as bytes. `.half()` and `.to(dtype)` change the bias only. The
    weight is frozen; x, residual and bias are differentiable (straight through x's rounding).

    It is fast on GPUs with e4m3 tensor cores (compute capability 8.9 and above). A CPU computes it to the same codes,
    slower than fp32: there it is for checking what a GPU will give.

    Raises TypeError for a dtype and ValueError for a size or name that the op does not take.
    """

    optional = {"input_scale": "static=False"}  # noqa: RUF012
    max_in_features = MAX_K
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    weight = canonical_tensor("weight", "The weight, float8_e4m3fn [out_features, in_features].")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: str = "row",
        static: bool = False,
        activation: str = "none",
    ) -> None:
        super().__init__(in_features, out_features, activation)
        check_granularity(granularity)
        if static and granularity != "row":
            raise ValueError(f"static goes with granularity 'row', not {granularity!r}: blocks have their own maxima")
        self.granularity, self.static = granularity, bool(static)
        self._make(bias, device, dtype)
        self._hold(self._held())

    @classmethod
    def from_float(cls, linear: nn.Linear, *, granularity: str = "row", activation: str = "none") -> Fp8Linear:
        """The fp8 form of a float layer, on its device, in its training mode; the layer itself is not changed.

        The weight and bias are the ones that the layer computes with, also where it is pruned or parametrized. The bias
        is a copy. Raises TypeError if `linear` is no `nn.Linear` or its dtype is not fp32, bf16 or fp16, ValueError if
        its weight holds NaN or Inf or for an unknown granularity.
        """
        options = {"granularity": granularity, "activation": activation}
        return cls._made_from(linear, lambda w: _named(quantize_fp8(w, granularity)), **options)

    @classmethod
    def from_quantized(
        cls,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        input_scale: torch.Tensor | None = None,
        activation: str = "none",
    ) -> Fp8Linear:
        """A layer that holds this weight, as checkpoints have it; static if there is an `input_scale`.

        `weight` is float8_e4m3fn [N, K]. `weight_scale` is fp32, bf16 or fp16: [N] or [N, 1], one element for the whole
        weight, or [⌈N/128⌉, ⌈K/128⌉]; `input_scale` has one element. The weight and the bias are not copied. Raises
        TypeError for what is no tensor or has a dtype that is not allowed; ValueError for a wrong shape, for NaN in the
        weight, scales that are not finite, an `input_scale` that is no positive number, and tensors on different
        devices.
        """
        for name, t, dtypes in (
            ("weight", weight, FP8),
            ("weight_scale", weight_scale, FLOAT_DTYPES),
            *([] if bias is None else [("bias", bias, FLOAT_DTYPES)]),
            *([] if input_scale is None else [("input_scale", input_scale, FLOAT_DTYPES)]),
        ):
            problem = wrong_type(name, t, dtypes)
            if problem:
                raise TypeError(problem)
        if weight.dim() != 2:
            raise ValueError(f"weight is {tuple(weight.shape)}; expected [out_features, in_features]")
        N, K = weight.shape
        if bias is not None and (tuple(bias.shape) != (N,) or bias.device != weight.device):
            raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}; expected ({N},) on {weight.device}")
        by_row = weight_scale.numel() == 1 or tuple(weight_scale.shape) in ((N,), (N, 1))
        granularity = "row" if by_row else "block"
        scale = weight_scale.reshape(-1).expand(N) if by_row else weight_scale
        given = {"weight": weight, "weight_scale": scale.to(torch.float32, copy=True).contiguous()}
        if input_scale is not None:
            if input_scale.numel() != 1:
                raise ValueError(f"input_scale has {input_scale.numel()} elements; expected one")
            given["input_scale"] = input_scale.reshape(1).to(torch.float32, copy=True)
        options = {"granularity": granularity, "static": input_scale is not None, "activation": activation}
        layer = cls(K, N, False, "meta", **options)
        layer._take(given)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    def layout(self) -> dict[str, Layout]:
        """`weight`, `weight_scale` and, where the layer is static, `input_scale`."""
        N, K = self.out_features, self.in_features
        scales = scale_shape(N, K, self.granularity)
        layout = {"weight": Layout((N, K), (FP8,)), "weight_scale": Layout(scales, (torch.float32,))}
        if self.static:
            layout["input_scale"] = Layout((1,), (torch.float32,))
        return layout

    def _quantize(self, w: torch.Tensor) -> Tensors:
        tensors = _named(quantize_fp8(w, self.granularity))
        return tensors | {"input_scale": torch.ones(1, device=w.device)} if self.static else tensors

    def _wrong_values(self, tensors: Tensors, prefix: str) -> list[str]:
        problems = []
        weight, scale = tensors.get("weight"), tensors.get("input_scale")
        if weight is not None and has_values(weight) and bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
            problems.append(f"{prefix}weight holds NaN.")
        if scale is not None and has_values(scale) and not float(scale) >= SMALLEST_SCALE:
            problems.append(f"{prefix}input_scale is {float(scale)}; it must be at least 2**-126.")
        return problems

    def _call(self, x, tensors, bias, residual):
        scale = tensors["weight_scale"]
        return dispatch(x, tensors["_weight"], scale, bias, residual, self.activation, tensors["input_scale"])

    def _check(self, x, tensors, bias, residual):
        weight, scale = tensors["_weight"].view(FP8), tensors["weight_scale"]
        check_args(x, weight, scale, bias, residual, self.activation, tensors["input_scale"])

    # ------------------------------------------------------------------------------- held as bytes

    # What handles buffers often does not know float8: gloo broadcasts them for DistributedDataParallel, pickle loads
    # them (torch 2.13). So the buffer holds the same memory as uint8, and the op takes it like that.

    def _hold(self, tensors: Tensors) -> None:
        super()._hold(_as(torch.uint8, tensors))

    def _canonical(self) -> Tensors:
        return _as(FP8, super()._canonical())

    def _copy(self, tensors: Tensors, held: Tensors) -> None:
        super()._copy(_as(torch.uint8, tensors), held)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state | {"_buffers": state["_buffers"] | {"_weight": self._buffers["_weight"]}}

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"granularity": self.granularity}
        return options | ({"static": True} if self.static else {}) | super()._options()


def _as(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    """The same tensors, with the weight's memory read as `dtype`."""
    return tensors | {"weight": tensors["weight"].view(dtype)}


def _named(quantized: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    return dict(zip(("weight", "weight_scale"), quantized, strict=True))
