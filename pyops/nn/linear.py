"""int8 linear layer: the drop-in for `torch.nn.Linear` that holds its weight in int8. The op: ops/int8_linear.py."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import nn

from pyops.nn.effective import effective, trainable
from pyops.nn.state import check_entry, foreign_keys, load_hooks_run, own_keys
from pyops.ops.epilogue import check_activation
from pyops.ops.int8_linear import (
    FLOAT_DTYPES,
    MAX_K,
    check_args,
    dispatch,
    pack_int8,
    quantize_int8,
    quantize_rows_ref,
    unpack_int8,
    wants_packed,
)


class Int8Linear(nn.Module):
    """y = act(quant(x) · weightᵀ · scales + bias + residual), each row of x quantized to int8 by its own maximum.

    Args:
        in_features, out_features, bias, device: as `torch.nn.Linear`.
        dtype: of the bias, fp32, bf16 or fp16; default torch's default dtype. The input may have any of the three.
        activation: none, relu, relu6, gelu (erf), gelu_tanh, silu, sigmoid, tanh or hardswish.

    Shapes: x [..., in_features], residual and y [..., out_features], all three in x's dtype, under autocast too.

    State: `weight` int8 [out_features, in_features], `weight_scale` fp32 [out_features], `bias` [out_features]; the
    same on every device. Where the kernels of a device read a packed form (see `pack_int8`), the layer holds that
    *instead of* the canonical weight; `weight` and `state_dict()` then unpack a copy. `.half()` and `.to(dtype)` change
    the bias only. The weight is frozen; x, residual and bias are differentiable (straight through x's rounding).

    Raises TypeError for a dtype and ValueError for a size or activation that the op does not take.
    """

    in_features: int
    out_features: int
    activation: str
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype is {dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        if not 0 <= in_features <= MAX_K:
            raise ValueError(f"in_features is {in_features}; allowed: 0 to {MAX_K}")
        check_activation(activation)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        q_w = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        # `_weight` is the canonical weight [N, K] or its packed form [panels, rows, 128]: dim() tells which.
        self.register_buffer("_weight", q_w, persistent=False)
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of `torch.nn.Linear`, quantized."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        w = torch.empty(self.out_features, self.in_features, device=self.weight_scale.device).uniform_(-bound, bound)
        q_w, scale = quantize_rows_ref(w)
        self._hold(q_w, scale)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_float(cls, linear: nn.Linear, *, activation: str = "none") -> Int8Linear:
        """The int8 form of a float layer, on its device, in its training mode; the layer itself is not changed.

        The weight and bias are the ones that the layer computes with, also where it is pruned or parametrized. The bias
        is a copy. Raises TypeError if `linear` is no `nn.Linear` or its dtype is not fp32, bf16 or fp16, ValueError if
        its weight holds NaN or Inf.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = effective(linear, "weight"), effective(linear, "bias")
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"linear has dtype {weight.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
        N, K = weight.shape
        # On meta: nothing is initialized only to be overwritten.
        layer = cls(K, N, False, "meta", weight.dtype, activation=activation)
        layer._hold(*quantize_int8(weight))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trainable(linear, "bias"))
        return layer.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """The canonical weight, int8 [out_features, in_features]; a copy if the layer holds the packed form."""
        stored = self._buffers["_weight"]
        return stored if stored.dim() == 2 else unpack_int8(stored, self.out_features, self.in_features)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        problem = check_entry("weight", value, (self.out_features, self.in_features), torch.int8)
        if problem:
            raise ValueError(problem)
        self._hold(value, self._buffers["weight_scale"])

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(x · weightᵀ + bias + residual) in x's dtype; raises TypeError or ValueError naming the argument."""
        # The dicts, not the attributes: nn.Module finds a parameter or buffer in 0.5 µs, a dict in 0.05.
        buffers, parameters = self._buffers, self._parameters
        weight, scale = buffers["_weight"], buffers["weight_scale"]
        # Not get("bias", self.bias), which would look up the attribute always; it is one where the bias is pruned.
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if (
            residual is not None
            or not isinstance(x, torch.Tensor)
            or x.dtype not in FLOAT_DTYPES
            or x.dim() == 0
            or x.shape[-1] != self.in_features
            or x.device != weight.device
        ):
            check_args(x, weight, scale, bias, residual, self.activation, None)
            if x.shape[-1] != self.in_features:  # a packed weight is padded and fits other K as well
                raise ValueError(f"x has K={x.shape[-1]}; in_features is {self.in_features}")
        return dispatch(x, weight, scale, bias, residual, self.activation, None)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return text if self.activation == "none" else f"{text}, activation={self.activation!r}"

    # ------------------------------------------------------------------------------- the two forms of the weight

    def _hold(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Hold this weight, canonical or packed, in the form that its device wants."""
        self._buffers["weight_scale"] = scale
        packed = weight.dim() == 3
        if packed != wants_packed(weight.device):
            weight = unpack_int8(weight, self.out_features, self.in_features) if packed else pack_int8(weight)
        self._buffers["_weight"] = weight

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        # fn is .to(), .half(), to_empty(), share_memory_() …: the int8 weight and the fp32 scale take its device and
        # memory, never its dtype. torch converts floating tensors only, so the scale passes as its bits.
        weight, scale = self._buffers.pop("_weight"), self._buffers.pop("weight_scale")
        try:
            super()._apply(fn, recurse)
            weight, scale = moved(weight, fn), moved(scale.view(torch.int32), fn).view(torch.float32)
        finally:
            self._hold(weight, scale)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        # Same process, same kernels: the packed form is copied as it is, not through __getstate__.
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(super().__getstate__(), memo)  # without what .compile() made for this one
        return new

    def __getstate__(self) -> dict[str, Any]:
        # A pickle is canonical: the machine that loads it may want another form.
        return {**super().__getstate__(), "_buffers": {**self._buffers, "_weight": self.weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self._buffers["_weight"], self._buffers["weight_scale"])

    # ------------------------------------------------------------------------------- state_dict

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        args = (strict, missing_keys, unexpected_keys, error_msgs)
        with load_hooks_run(self, state_dict, prefix, local_metadata, *args):
            problems = self._problems(state_dict, prefix)
            if problems:
                error_msgs += problems
            else:
                self._load(state_dict, prefix, local_metadata)
            if strict:  # torch passes True here and settles strictness later
                missing_keys += [key for key in own_keys(self, prefix) if key not in state_dict]
                unexpected_keys += foreign_keys(self, state_dict, prefix)

    def _problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Everything that is wrong with the entries that there are; if anything is, none of them is loaded."""
        N, K = self.out_features, self.in_features
        layout = {"weight": ((N, K), torch.int8), "weight_scale": ((N,), torch.float32)}
        if self._parameters.get("bias") is not None:
            layout["bias"] = ((N,), None)
        present = {name: state_dict[prefix + name] for name in layout if prefix + name in state_dict}
        problems = [check_entry(prefix + name, value, *layout[name]) for name, value in present.items()]
        if ("weight" in present) != ("weight_scale" in present) and not any(problems):
            has, lacks = ("weight", "weight_scale") if "weight" in present else ("weight_scale", "weight")
            problems.append(f"{prefix}{has} comes without {prefix}{lacks}; they are loaded together or not at all.")
        return [problem for problem in problems if problem]

    def _load(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        """Load entries that were found right."""
        errors: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, False, [], [], errors)
        if errors:
            raise RuntimeError("\n".join(errors))
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            return
        stored, scale = self._buffers["_weight"], self._buffers["weight_scale"]
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self._hold(weight, scale)
            elif stored.is_meta and not weight.is_meta:
                warnings.warn(f"{prefix}weight: copying to a meta tensor does nothing; use assign=True", stacklevel=2)
            elif stored.dim() == 2:
                stored.copy_(weight)
            else:
                stored.copy_(pack_int8(weight.to(stored.device)))


def moved(t: torch.Tensor, fn: Any) -> torch.Tensor:
    """fn(t), which `module.type(dtype)` alone may have given another dtype."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)
