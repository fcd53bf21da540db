"""What a static scale is chosen from: observers of the inputs of layers, and the run of a model that shows them.

Observers look at |x| and give the largest magnitude that is to be represented. Their memory does not grow with what
they see, and what they give depends on the values and their order alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyops.measure import call, evaluating
from pyops.ops.int8_linear import QMAX
from pyops.progress import with_progress

PIECE = 1 << 20
"""Values that are counted at a time."""


class MinMax:
    """The largest magnitude seen."""

    def __init__(self) -> None:
        self._largest = 0.0

    def update(self, x: torch.Tensor) -> None:
        """See the values of x, of any shape and floating dtype. Raises ValueError for NaN or Inf."""
        self._largest = max(self._largest, _largest(x))

    def amax(self) -> float:
        """The magnitude that 127 shall stand for; 0 if only zeros were seen."""
        return self._largest


class Histogram:
    """Counts of |x| in equal bins from 0 to a power of two, which doubles as larger values come: bins join in pairs."""

    BINS = 4096

    def __init__(self) -> None:
        self._largest = 0.0
        self.range = 0.0
        """The end of the last bin; 0 before a value other than zero was seen. At most twice the largest value."""
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def update(self, x: torch.Tensor) -> None:
        """See the values of x, of any shape and floating dtype. Raises ValueError for NaN or Inf."""
        largest = _largest(x)
        self._largest = max(self._largest, largest)
        if not self.range:
            self.counts[0] += x.numel() if not largest else 0
            if not largest:
                return
            self.range = 2.0 ** math.frexp(largest)[1]
        while largest >= self.range:
            self.range *= 2
            joined = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([joined, torch.zeros_like(joined)])
        for piece in x.detach().flatten().split(PIECE):
            # A power of two times a value: exact, but for what lies below the first bin anyway.
            bins = (piece.abs().double() * (self.BINS / self.range)).long()
            self.counts += torch.bincount(bins, minlength=self.BINS).cpu()

    def centres(self) -> torch.Tensor:
        """The middle of each bin, fp64."""
        return (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (self.range / self.BINS)


class Percentile(Histogram):
    """The magnitude below which this percentage of the values lie, to within a bin (1/2048 of the largest at most)."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def amax(self) -> float:
        """The end of the bin in which the percentile lies, or the largest value if that is smaller."""
        wanted = self.percentile / 100 * int(self.counts.sum())
        at = int(torch.searchsorted(self.counts.cumsum(0).double(), wanted))
        return min(self._largest, (min(at, self.BINS - 1) + 1) * self.range / self.BINS)


class MeanSquaredError(Histogram):
    """The magnitude for which rounding and clamping to ±127 lose least, in the sum of squares over the histogram."""

    STEPS = 128

    def amax(self) -> float:
        """The best of the largest value times 1, 127/128, … 1/128; the larger of two that are equally good."""
        if not self._largest:
            return 0.0
        x, weight = self.centres(), self.counts.double()
        best, least = self._largest, math.inf
        for step in range(self.STEPS, 0, -1):
            amax = self._largest * step / self.STEPS
            scale = amax / QMAX
            error = ((x / scale).round_().clamp_(max=QMAX).mul_(scale).sub_(x).square_() * weight).sum().item()
            if error < least:
                best, least = amax, error
        return best


OBSERVERS = ("minmax", "percentile", "mse")


def make_observer(name: str, percentile: float) -> MinMax | Histogram:
    """A new observer by its name in OBSERVERS; `percentile` is only read by "percentile"."""
    if name == "percentile":
        return Percentile(percentile)
    return {"minmax": MinMax, "mse": MeanSquaredError}[name]()


class ChannelMax:
    """The largest magnitude seen in each column of the inputs [..., K]."""

    def __init__(self) -> None:
        self.largest: torch.Tensor | None = None
        """fp32 [K]; None before the first input."""

    def update(self, x: torch.Tensor) -> None:
        """See the values of x [..., K]. Raises ValueError for NaN or Inf."""
        if not x.numel():
            return
        _largest(x)
        largest = x.detach().abs().flatten(0, -2).amax(0).float() if x.dim() > 1 else x.detach().abs().float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


def smoothing(inputs: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """SmoothQuant's divisor (Xiao et al. 2023) of the columns of x: max|x_k|^α / max|w_k|^(1-α), as fp32 [K].

    `inputs` [K] are the largest magnitudes of the columns of x, `weight` is [N, K]. Where either is zero there is
    nothing to balance: 1. Extremes are cut at 2^±30.
    """
    columns = weight.detach().abs().amax(0).double() if len(weight) else torch.zeros_like(inputs, dtype=torch.double)
    inputs = inputs.double()
    smooth = inputs.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((inputs > 0) & (columns > 0), smooth, 1.0).clamp(2.0**-30, 2.0**30).float()


def _largest(x: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    low, high = (float(bound) for bound in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("its input holds NaN or Inf")
    return max(-low, high)


# ------------------------------------------------------------------------------------------------------ calibration


def check_calibration(calibration: Any) -> None:
    """Raise TypeError unless this can be a collection of batches."""
    if isinstance(calibration, (torch.Tensor, Mapping, str, bytes)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration must be an iterable of batches, such as a DataLoader or a list; got "
            f"{type(calibration).__name__}"
        )


def model_inputs(batch: Any) -> Any:
    """What the model is called with for a batch: a tensor, a tuple of arguments, or a dict of keyword arguments.

    A list is what a DataLoader makes of a dataset of (inputs, targets): its first element is taken, a list in there
    being a tuple of arguments. Raises TypeError for anything else.
    """
    inputs = batch
    if isinstance(batch, list):
        if not batch:
            raise TypeError("a batch is an empty list; as a list it must be [inputs, targets]")
        inputs = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
    if not isinstance(inputs, (torch.Tensor, tuple, Mapping)):
        raise TypeError(
            f"a batch is a {type(batch).__name__}{f' of {type(inputs).__name__}' if batch is not inputs else ''}; it "
            "must be a tensor, a tuple of arguments, a dict of keyword arguments, or a list [inputs, targets]"
        )
    return inputs


def observe(
    model: nn.Module,
    layers: Mapping[nn.Module, str],
    see: Callable[[nn.Module, torch.Tensor], None],
    calibration: Iterable,
    batches: int | None = None,
) -> None:
    """Run the model over the batches, in eval mode and without gradients, and call see(layer, x) at each call of each
    of the layers, which are given with their names.

    At most `batches` batches are taken. Raises ValueError if there are none, and what `see` raises, with the layer's
    name; in every case the model is as it was.
    """

    def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, torch.Tensor) and not x.is_meta:
            try:
                see(layer, x)
            except ValueError as error:
                raise ValueError(f"layer {layers[layer]!r}: {error}") from error

    # Registered last, they see what the layer's own pre-hooks made of the input.
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    count = 0
    try:
        with evaluating(model):
            for batch in _progress(calibration, batches):
                call(model, model_inputs(batch))
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("calibration holds no batch")


def _progress(calibration: Iterable, batches: int | None) -> Iterator:
    total = len(calibration) if hasattr(calibration, "__len__") else None
    if batches is not None:
        total = batches if total is None else min(total, batches)
    return iter(with_progress(itertools.islice(calibration, batches), total, True, "calibration", "batch"))
