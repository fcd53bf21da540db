"""Configs for `pyops.swap_` that make quantized layers of `nn.Linear`."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from pyops import calibrate
from pyops.config import Config, FilterFn, Layer
from pyops.memory import all_finite, has_values
from pyops.nn.conv1d import as_linear, conv1d_class, is_linear
from pyops.nn.effective import effective
from pyops.nn.fp8_linear import Fp8Linear
from pyops.nn.int4_linear import Int4Linear
from pyops.nn.int8_linear import Int8Linear
from pyops.nn.linear import QuantLinear
from pyops.nn.qat_linear import QatLinear
from pyops.ops.fake_quantize import fake_fp8_input, fake_fp8_weight, fake_int4, fake_int8_rows
from pyops.ops.fp8_linear import check_granularity
from pyops.ops.int4_linear import COMPUTES, resolve_compute
from pyops.ops.int4_quantize import METHODS
from pyops.ops.int4_weight import check_group_size
from pyops.ops.int8_linear import FLOAT_DTYPES, QMAX, SMALLEST_AMAX
from pyops.refusal import layer_refusal
from pyops.swapping import Swap


class LinearConfig(Config):
    """Every `nn.Linear` to one kind of `QuantLinear`; the fields of the dataclass are arguments of its `from_float`."""

    module: ClassVar[type[QuantLinear]]
    needs: ClassVar[tuple[str, ...]] = ()
    """The `buffers` that a `QatLinear` cannot do without."""
    too_wide: ClassVar[str] = "could overflow the int32 sum"
    """What in_features above the `max_in_features` of `module` would do."""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `from_float`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def matches(self, module: nn.Module) -> bool:
        """An `nn.Linear` or a subclass of it; transformers' Conv1D, which is one with its weight transposed."""
        return is_linear(module)

    def refusal(self, module: nn.Module) -> str | None:
        """Why the quantized layer cannot stand in its place."""
        if isinstance(module, QatLinear):
            return "prepared for training: pyops.convert_ makes the quantized layer"
        reason = layer_refusal(module, conv1d_class(module) or nn.Linear, FLOAT_DTYPES)
        most = self.module.max_in_features
        if reason is None and effective(as_linear(module), "weight").shape[1] > most:
            return f"in_features above {most} {self.too_wide}"
        return reason

    def check_layer(self, module: nn.Module) -> None:
        """Raise ValueError for a weight with NaN or Inf."""
        weight = effective(module, "weight").detach()
        if has_values(weight) and not all_finite(weight):
            raise ValueError("w holds NaN or Inf and cannot be quantized")

    def by_hand(self, module: nn.Module) -> str:
        """`from_float` of the quantized layer."""
        arguments = "".join(f", {name}={value!r}" for name, value in self.options().items())
        return f"pyops.nn.{self.module.__name__}.from_float(model{arguments})"

    def convert(self, module: nn.Module) -> nn.Module:
        """`from_float` of the quantized layer."""
        return self.module.from_float(as_linear(module), **self.options())

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the quantized layer would multiply: (x̂ [..., K], ŵ [N, K]), fp32, gradients straight through.

        `layer` is the `QatLinear` that trains for it.
        """
        raise NotImplementedError

    def buffers(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """What a `QatLinear` for this layer needs beside the weight; asked for inside of `prepared`."""
        return {}

    def without_data(self) -> LinearConfig:
        """An equal config to be kept in a layer, copied and pickled with it."""
        return self

    def lacking(self, module: nn.Module) -> str | None:
        """Why this layer has to stay, known inside of `prepared` only; None if it need not."""
        return None

    def untrainable(self) -> str | None:
        """Why `prepare_qat_` cannot train for this config; None if it can."""
        if type(self).fake_quantize is LinearConfig.fake_quantize:
            return "it has no fake quantization"
        return None


@dataclasses.dataclass(frozen=True)
class Int8Dynamic(LinearConfig):
    """Every `nn.Linear` to `pyops.nn.Int8Linear`: int8 weight a channel, activations quantized a row at each call."""

    choice = "int8_dynamic"
    module = Int8Linear

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of both."""
        return fake_int8_rows(x), fake_int8_rows(layer.weight)


@dataclasses.dataclass(frozen=True)
class Int8Weight(LinearConfig):
    """Every `nn.Linear` to a weight-only `pyops.nn.Int8Linear`: int8 weight a channel, activations as they are."""

    choice = "int8_weight"
    module = Int8Linear
    too_wide = "are more than an Int8Linear takes"

    def options(self) -> dict[str, Any]:
        """Weight-only."""
        return {"mode": "weight_only"}

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the weight."""
        return x.float(), fake_int8_rows(layer.weight)


@dataclasses.dataclass(frozen=True)
class Int8Static(LinearConfig):
    """Every `nn.Linear` to a static `pyops.nn.Int8Linear`: one scale for all inputs of a layer, found beforehand.

    Args:
        calibration: batches that the model is run on, in eval mode and without gradients, to see what the inputs of its
            layers are like: a DataLoader, a list, any iterable. A batch is a tensor, a tuple of arguments or a dict of
            keyword arguments; a list, as a DataLoader makes of (inputs, targets), is [inputs, …], of which only the
            inputs are taken. Batches are not moved: they lie on the model's device.
        observer: the magnitude that 127 stands for is the largest ("minmax"), that of a percentile ("percentile"), or
            that of the least squared error ("mse"); what lies beyond saturates.
        percentile: of "percentile", above 0 and at most 100.
        smooth: None, or SmoothQuant's α from 0 to 1: outliers in the columns of x are moved into the weight, the more
            the larger α is; 0.5 is usual. With another observer than "minmax" the batches are gone through twice.
        batches: how many batches are taken at most; None for all.

    A layer that no batch reaches, or only with zeros, stays as it is. `swap_` raises ValueError if there is no batch,
    or if the input of a layer holds NaN or Inf. Raises TypeError or ValueError for other arguments.
    """

    calibration: Iterable = dataclasses.field(compare=False, repr=False)
    observer: str = "minmax"
    percentile: float = 99.99
    smooth: float | None = None
    batches: int | None = None

    choice = "int8_static"
    module = Int8Linear
    needs = ("input_scale",)

    def __post_init__(self) -> None:
        calibrate.check_calibration(self.calibration)
        if self.observer not in calibrate.OBSERVERS:
            raise ValueError(f"observer={self.observer!r} is not one of {', '.join(calibrate.OBSERVERS)}")
        _check_number("percentile", self.percentile)
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it must be above 0 and at most 100")
        if self.smooth is not None:
            _check_number("smooth", self.smooth)
            if not 0 <= self.smooth <= 1:
                raise ValueError(f"smooth is {self.smooth}; it must be None or from 0 to 1")
        if self.batches is not None:
            if not isinstance(self.batches, int) or isinstance(self.batches, bool):
                raise TypeError(f"batches must be an int or None, got {type(self.batches).__name__}")
            if self.batches < 1:
                raise ValueError(f"batches is {self.batches}; it must be at least 1")
        if self._twice() and isinstance(self.calibration, Iterator):
            raise ValueError(
                f"calibration can be gone through once only; smooth with observer={self.observer!r} needs it twice: "
                "give a list or a DataLoader"
            )

    def _twice(self) -> bool:
        return self.smooth is not None and self.observer != "minmax"

    def options(self) -> dict[str, Any]:
        """Static; the scale is each layer's own."""
        return {"mode": "static"}

    def by_hand(self, module: nn.Module) -> str:
        """`from_float`, with a scale that is up to the user."""
        return "pyops.nn.Int8Linear.from_float(model, mode='static', input_scale=...)"

    def whole_model(self) -> bool:
        """`prepared` only looks: all layers are calibrated before the first is replaced, one by one or not."""
        return False

    @contextlib.contextmanager
    def prepared(self, swap: Swap) -> Iterator[Mapping[nn.Module, str]]:
        """Calibrate: what was found lasts as long as the context."""
        token = _calibrated.set(self._calibrate(swap.model, self._layers(swap.model, swap.filter_fn)))
        try:
            yield {}
        finally:
            _calibrated.reset(token)

    def _layers(self, model: nn.Module, filter_fn: FilterFn | None) -> dict[nn.Module, str]:
        return {
            module: name
            for name, module in model.named_modules()
            if self.matches(module) and not self.refusal(module) and (filter_fn is None or filter_fn(module, name))
        }

    def _calibrate(self, model: nn.Module, layers: Mapping[nn.Module, str]) -> dict[nn.Module, dict[str, Any]]:
        """The arguments of `from_float` for each layer that was called; a scale of 0 if it saw only zeros."""
        observers = {layer: calibrate.make_observer(self.observer, self.percentile) for layer in layers}
        channels = {layer: calibrate.ChannelMax() for layer in layers} if self.smooth is not None else {}
        seen: set[nn.Module] = set()

        def look(layer: nn.Module, x: torch.Tensor) -> None:
            seen.add(layer)
            (channels[layer] if channels else observers[layer]).update(x)

        calibrate.observe(model, layers, look, self.calibration, self.batches)
        smooth = {
            layer: calibrate.smoothing(most.largest, effective(as_linear(layer), "weight"), self.smooth)
            for layer, most in channels.items()
            if most.largest is not None
        }
        if self._twice():
            layers = {layer: name for layer, name in layers.items() if layer in smooth}

            def look_again(layer: nn.Module, x: torch.Tensor) -> None:
                observers[layer].update(x.float() / smooth[layer])

            calibrate.observe(model, layers, look_again, self.calibration, self.batches)
        else:
            for layer, divisor in smooth.items():
                observers[layer].update(channels[layer].largest / divisor)
        found = {}
        for layer in seen:
            scale = observers[layer].amax() / QMAX
            found[layer] = {"input_scale": scale and max(scale, SMALLEST_AMAX)}
            if layer in smooth:
                found[layer]["smooth"] = smooth[layer]
        return found

    def replace(self, layer: Layer) -> nn.Module | None:
        """A layer that the calibration has not reached stays."""
        lacking = self.lacking(layer.module)
        if lacking:
            layer.row.add(lacking)
            return None
        return super().replace(layer)

    def without_data(self) -> Int8Static:
        """Without the batches."""
        return dataclasses.replace(self, calibration=())

    def lacking(self, module: nn.Module) -> str | None:
        """What the calibration has not seen."""
        found = _calibrated.get().get(module)
        if found is None:
            return "not called in calibration"
        return None if found["input_scale"] else "saw only zeros in calibration"

    def convert(self, module: nn.Module) -> nn.Module:
        """`from_float` with what the calibration has found for this layer, which is then let go of."""
        if isinstance(module, QatLinear):
            found = {name: module._buffers[name] for name in ("input_scale", "smooth") if name in module._buffers}
        else:
            found = _calibrated.get().pop(module)
        return Int8Linear.from_float(as_linear(module), **self.options(), **found)

    def buffers(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """What the calibration has found: `input_scale` and, with smooth, `smooth`."""
        device = effective(module, "weight").device
        found = _calibrated.get()[module].items()
        return {name: torch.as_tensor(value, dtype=torch.float32, device=device) for name, value in found}

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x by the scale that was found, rows of the weight; with smooth, x / smooth and the weight times smooth."""
        w, smooth = layer.weight.float(), layer._buffers.get("smooth")
        if smooth is not None:
            x, w = x.float() * (1.0 / smooth), w * smooth
        return fake_int8_rows(x, layer.input_scale), fake_int8_rows(w)


_calibrated: contextvars.ContextVar[dict[nn.Module, dict[str, Any]]] = contextvars.ContextVar("calibrated")
"""What the running swap has found for each layer."""


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class Int4Weight(LinearConfig):
    """Every `nn.Linear` to `pyops.nn.Int4Linear`: weights of 4 bits in groups along the inputs, with scales in bf16.

    Args:
        group_size: 32, a multiple of 64, or -1 for one group over all inputs. Smaller groups are more exact and larger:
            a group takes 3 bytes beside its weights, 2 if symmetric.
        symmetric: no zero points: the range of a group is symmetric about zero.
        method: "rtn" rounds to nearest within the range of a group; "mse" tries 24 ranges for the one of least squared
            error, which takes as many passes.
        compute: "int8" quantizes each row of the input to int8 too, "float" computes with it as it is; "auto" is int8
            on the CPU, float elsewhere.

    Raises TypeError or ValueError for other values.
    """

    group_size: int = 128
    symmetric: bool = False
    method: str = "rtn"
    compute: str = "auto"

    choice = "int4_weight"
    module = Int4Linear
    too_wide = "could overflow the int32 sum of compute='int8'"

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be True or False, got {self.symmetric!r}")
        for name, allowed in (("method", METHODS), ("compute", COMPUTES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups of the weight; rows of x where the layer would compute in int8 on x's device."""
        w = fake_int4(layer.weight, self.group_size, symmetric=self.symmetric)
        return (fake_int8_rows(x) if resolve_compute(self.compute, x.device) == "int8" else x.float()), w

    def untrainable(self) -> str | None:
        """A search for the best range at each step."""
        if self.method != "rtn":
            return f"method={self.method!r} looks for ranges of a finished weight; train with method='rtn'"
        return super().untrainable()


@dataclasses.dataclass(frozen=True)
class Fp8Dynamic(LinearConfig):
    """Every `nn.Linear` to `pyops.nn.Fp8Linear`: weights in e4m3, activations quantized to e4m3 at each call.

    For GPUs with e4m3 tensor cores; a CPU computes the same, slower than fp32.

    Args:
        granularity: "row": a scale for each output channel and each row of the input. "block": for each 128 × 128 of
            the weight and each 128 columns of a row of the input, as in DeepSeek-V3: more exact where the magnitudes
            of a row span more than e4m3's 2¹⁵.

    Raises ValueError for another granularity.
    """

    granularity: str = "row"

    choice = "fp8_dynamic"
    module = Fp8Linear
    too_wide = "are more than an Fp8Linear takes"

    def __post_init__(self) -> None:
        check_granularity(self.granularity)

    def fake_quantize(self, layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of both."""
        return fake_fp8_input(x, self.granularity), fake_fp8_weight(layer.weight, self.granularity)
