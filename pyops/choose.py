"""Choose by measuring: a replacement takes a layer's place only if it is faster there, and right."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pyops import measure
from pyops.measure import Captured
from pyops.ops.sparse_packed import is_channels_last

DENSE = "dense"
"""The name of the layer as it is among measured times."""
NOISE = 0.02
"""By how much the times of one function differ from one measurement to the next."""
MIN_GAIN = 0.03
"""The share of a layer's time that a replacement must gain, unless told otherwise."""
MIN_SQNR_DB = 30.0
"""What differs more than this from the layer's output is not a replacement: bf16 alone gives some 45 dB."""


def faster(ms: Mapping[str, float], names: Mapping[str, object], min_gain: float) -> str | None:
    """The fastest of `names`, None if none takes at most (1 - min_gain) of the time of the layer as it is.

    Of several that are as fast but for noise it is the first.
    """
    better = [name for name in names if name in ms and ms[name] <= (1 - min_gain) * ms[DENSE]]
    best_ms = min((ms[name] for name in better), default=0.0)
    return next((name for name in better if ms[name] <= (1 + NOISE) * best_ms), None)


def measured(
    dense: Callable,
    candidates: Mapping[str, Callable],
    others: Mapping[str, Callable],
    captured: Captured,
    min_gain: float,
) -> dict[str, float]:
    """ms of all of these functions on the captured input, the layer as it is under DENSE.

    The fastest of several may only have been the luckiest: who wins is measured again, against the layer alone, and
    that counts. `others` cannot win, their times are to be told.
    """
    ms = measure.times({DENSE: dense, **candidates, **others}, captured)
    confirmed = set()
    while (best := faster(ms, candidates, min_gain)) is not None and best not in confirmed:
        ms |= measure.times({DENSE: dense, best: candidates[best]}, captured)
        confirmed.add(best)
    return ms


def right(
    expected: torch.Tensor, candidate: Callable, captured: Captured, min_sqnr_db: float = MIN_SQNR_DB
) -> tuple[float | None, str]:
    """(SQNR in dB of a candidate's output against that of the layer, why it cannot be taken or "").

    The output has to be of the same dtype and memory format too: what follows in the model would be slower otherwise.
    """
    try:
        y = output(candidate, captured)
    except NotImplementedError as error:
        return None, f"has no kernel: {error}"
    sqnr_db = measure.sqnr_db(expected, y)
    if not sqnr_db >= min_sqnr_db:
        return sqnr_db, f"gives another result ({sqnr_db:.1f} dB, below {min_sqnr_db:.4g})"
    if y.dtype != expected.dtype:
        return sqnr_db, f"gives {y.dtype}, dense {expected.dtype}"
    if y.dim() == 4 and is_channels_last(y) != is_channels_last(expected):
        return sqnr_db, "gives another memory format than dense: are input and weight in the same?"
    return sqnr_db, ""


def output(function: Callable, captured: Captured) -> torch.Tensor:
    """What it gives for the captured input."""
    with measure.autocasting(captured):
        return function(captured.x)
