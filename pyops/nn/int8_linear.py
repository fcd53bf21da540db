"""int8 linear layer: the drop-in for `torch.nn.Linear` that holds its weight in int8. The op: ops/int8_linear.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyops.memory import has_values
from pyops.nn.effective import effective
from pyops.nn.linear import Layout, QuantLinear, Tensors, canonical_tensor
from pyops.ops.int8_linear import (
    MAX_K,
    PANEL_N,
    SMALLEST_AMAX,
    check_args,
    dispatch,
    pack_int8,
    quantize_int8,
    quantize_rows_ref,
    unpack_int8,
    wants_packed,
)
from pyops.ops.int8_weight_linear import dispatch as weight_dispatch

MODES = ("dynamic", "static", "weight_only")


class Int8Linear(QuantLinear):
    """y = act(quant(x) · weightᵀ · scales + bias + residual), with x quantized to int8 in one of three ways.

    Args:
        in_features, out_features, bias, device: as `torch.nn.Linear`.
        dtype: of the bias, fp32, bf16 or fp16; default torch's default dtype. The input may have any of the three.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.
        mode: "dynamic" quantizes each row of x by its own maximum, "static" by `input_scale`, beyond ±127 times which x
            saturates; "weight_only" computes with x as it is (`ops.int8_weight_linear`).
        smooth: the layer has a tensor `smooth`, by which the columns of x are divided before they are quantized; its
            weight is the original one times it. Not with "weight_only".

    Shapes: x [..., in_features], residual and y [..., out_features], all three in x's dtype, under autocast too.

    State: `weight` int8 [out_features, in_features], `weight_scale` fp32 [out_features], `bias` [out_features]; if the
    layer is static `input_scale` fp32 [], with smooth `smooth` fp32 [in_features]; the same on every device. A state is
    loaded into a layer that has the same of these. A dynamic and a weight-only layer hold the same weight and load each
    other's. Where the kernels of a device read a packed form (see `pack_int8`), the layer holds that *instead of* the
    canonical weight; `weight` and `state_dict()` then unpack a copy. `.half()` and `.to(dtype)` change the bias only.
    The weight is frozen; x, residual and bias are differentiable (straight through x's rounding).

    Raises TypeError for a dtype and ValueError for a size, mode or activation that the op does not take.
    """

    optional = {"input_scale": "another mode than 'static'", "smooth": "smooth=False"}  # noqa: RUF012
    max_in_features = MAX_K
    piece_rows = PANEL_N
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    smooth: torch.Tensor | None
    weight = canonical_tensor(
        "weight", "The canonical weight, int8 [out_features, in_features]; a copy if the layer holds the packed form."
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
        mode: str = "dynamic",
        smooth: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, activation)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}")
        if smooth and mode == "weight_only":
            raise ValueError("smooth is of use where x is quantized; mode='weight_only' does not")
        self.mode, self._smoothed = mode, bool(smooth)
        self._make(bias, device, dtype)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        activation: str = "none",
        mode: str = "dynamic",
        input_scale: float | torch.Tensor | None = None,
        smooth: torch.Tensor | None = None,
    ) -> Int8Linear:
        """The int8 form of a float layer, on its device, in its training mode; the layer itself is not changed.

        `input_scale`, a positive number or a tensor of one, is given if and only if the mode is "static"; with a tensor
        `smooth` [in_features], it is that of x / smooth. The weight and bias are the ones that the layer computes with,
        also where it is pruned or parametrized. The bias is a copy. Raises TypeError if `linear` is no `nn.Linear` or
        its dtype is not fp32, bf16 or fp16, ValueError if its weight holds NaN or Inf, or for a scale or smooth that is
        not finite and at least 2**-119.
        """
        if (input_scale is not None) != (mode == "static"):
            raise ValueError(
                f"input_scale is {input_scale!r}; mode={mode!r} {'needs' if mode == 'static' else 'has'} "
                f"{'one' if mode == 'static' else 'none'}"
            )
        extra: Tensors = {}
        if isinstance(linear, nn.Linear):  # else _made_from says so
            device, K = effective(linear, "weight").device, linear.in_features
            if input_scale is not None:
                extra["input_scale"] = torch.as_tensor(input_scale, dtype=torch.float32).detach().reshape(()).to(device)
            if smooth is not None:
                if not isinstance(smooth, torch.Tensor) or smooth.shape != (K,):
                    got = tuple(smooth.shape) if isinstance(smooth, torch.Tensor) else type(smooth).__name__
                    raise ValueError(f"smooth is {got}; in_features={K} needs a tensor of ({K},)")
                extra["smooth"] = smooth.detach().to(device, torch.float32, copy=True)
            for text in _wrong_divisors(extra, ""):
                raise ValueError(text)
        factors = extra.get("smooth")

        def quantize(w: torch.Tensor) -> Tensors:
            return _named(quantize_int8(w if factors is None else w.float() * factors))

        layer = cls._made_from(linear, quantize, activation=activation, mode=mode, smooth=smooth is not None)
        layer._hold(layer._held() | extra)
        return layer

    def layout(self) -> dict[str, Layout]:
        """`weight` and `weight_scale`; of a static layer `input_scale`, of one with smooth `smooth`."""
        N, K = self.out_features, self.in_features
        layout = {"weight": Layout((N, K), (torch.int8,)), "weight_scale": Layout((N,), (torch.float32,))}
        if self.mode == "static":
            layout["input_scale"] = Layout((), (torch.float32,))
        if self._smoothed:
            layout["smooth"] = Layout((K,), (torch.float32,))
        return layout

    def _quantize(self, w: torch.Tensor) -> Tensors:
        ones = {
            name: torch.ones(layout.shape, device=w.device)
            for name, layout in self.layout().items()
            if name in self.optional
        }
        return _named(quantize_rows_ref(w)) | ones

    def _wrong_values(self, tensors: Tensors, prefix: str) -> list[str]:
        return _wrong_divisors(tensors, prefix)

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if self.mode != "dynamic":
            options["mode"] = self.mode
        return options | ({"smooth": True} if self._smoothed else {})

    def _pack(self, tensors: Tensors) -> Tensors:
        return {"weight": pack_int8(tensors["weight"])}

    def _unpack(self, tensors: Tensors) -> Tensors:
        return {"weight": unpack_int8(tensors["weight"], self.out_features, self.in_features)}

    def _wants_packed(self, device: torch.device) -> bool:
        return wants_packed(device)

    def _call(self, x, tensors, bias, residual):
        weight, w_scale = tensors["_weight"], tensors["weight_scale"]
        if self.mode == "weight_only":
            return weight_dispatch(x, weight, w_scale, bias, residual, self.activation)
        # The scales were looked at when they were loaded.
        more = (tensors["input_scale"], tensors["smooth"])
        return dispatch(x, weight, w_scale, bias, residual, self.activation, *more)

    def _check(self, x, tensors, bias, residual):
        more = (tensors["input_scale"], tensors["smooth"])
        check_args(x, tensors["_weight"], tensors["weight_scale"], bias, residual, self.activation, *more)


def _named(quantized: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    return dict(zip(("weight", "weight_scale"), quantized, strict=True))


def _wrong_divisors(tensors: Tensors, prefix: str) -> list[str]:
    """What is wrong with the values that x is divided by."""
    wrong = []
    for name in ("input_scale", "smooth"):
        t = tensors.get(name)
        if t is not None and t.numel() and has_values(t):
            bad = t[~((t >= SMALLEST_AMAX) & t.isfinite())]
            if bad.numel():
                wrong.append(f"{prefix}{name} is {bad[0].item()}; it must be finite and at least 2**-119.")
    return wrong
