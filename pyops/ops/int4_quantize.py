"""How float weights become int4 weights (ops/int4_weight.py says what those are).

Methods: "rtn" rounds to nearest with the scale that just covers a group. "mse" tries smaller ranges, as OMSE (Choukroun
et al. 2019) and AWQ's clipping (Lin et al. 2023) do, and keeps that of the least squared error for each group.

Scales are rounded to multiples of steps where that costs less than `MOST_STEP_LOSS`, by panels of 32 output channels.
(QServe's progressive quantization, Lin et al. 2024, has such scales for all weights.)
"""

from __future__ import annotations

import torch

from pyops.memory import all_finite, chunks, has_values
from pyops.ops.int4_weight import (
    LEVELS,
    MIDDLE,
    PANEL_N,
    SCALE_DTYPES,
    check_group_size,
    group_count,
    most_multiple,
    pack_nibbles,
)
from pyops.sizes import ceil_div

METHODS = ("rtn", "mse")
MSE_STEPS = 24
"""Ranges that "mse" tries: 1, 1 - 1/48, … of the one that covers a group, down to about half of it."""
MOST_STEP_LOSS = 1.023
"""By how much the squared error of a panel may grow for its scales to be multiples of steps: 0.1 dB."""


def quantize_int4(
    w: torch.Tensor,
    group_size: int = 128,
    *,
    symmetric: bool = False,
    method: str = "rtn",
    scale_dtype: torch.dtype = torch.bfloat16,
    steps: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a weight [N, K] to int4 in groups along K: (q uint8 [N, ⌈K/2⌉], scale [N, ⌈K/G⌉], zero uint8 or None).

    symmetric: s = max|w| / 7.5, q = clamp(round(w / s) + 8, 0, 15), no zero points. Otherwise the range of a group,
    widened to hold 0, is cut into 15 steps: s = (max - min) / 15, z = round(-min / s), q = clamp(round(w / s) + z).
    The scale is rounded to `scale_dtype` first, and q is what fits that scale best. A group of zeros has scale 0. With
    `steps`, the scales of 32 channels at a time are rounded to whole multiples of a step of their channel, if that
    makes the squared error at most 2 % (0.1 dB) larger: such weights are multiplied faster, see ops/int4_weight.py.

    Raises TypeError for a dtype or type, ValueError if w is not 2-D, holds NaN or Inf, if a scale overflows
    `scale_dtype`, or for an unknown group_size or method.
    """
    if not isinstance(w, torch.Tensor) or not w.is_floating_point():
        raise TypeError(f"w must be a floating-point tensor, got {getattr(w, 'dtype', type(w).__name__)}")
    if w.dim() != 2:
        raise ValueError(f"w must be [N, K], got shape {tuple(w.shape)}")
    check_group_size(group_size)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype is {scale_dtype}; allowed: {', '.join(map(str, SCALE_DTYPES))}")
    w = w.detach()
    if has_values(w) and not all_finite(w):
        raise ValueError("w holds NaN or Inf and cannot be quantized")
    N, K = w.shape
    count = group_count(K, group_size)
    w_q = torch.empty(N, ceil_div(K, 2), dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, count, dtype=scale_dtype, device=w.device)
    zero = None if symmetric else torch.empty(N, count, dtype=torch.uint8, device=w.device)
    G = group_size if group_size > 0 else K
    for a, b in chunks(ceil_div(N, PANEL_N), PANEL_N * K, w.device) if K else ():
        own = slice(a * PANEL_N, b * PANEL_N)
        q, scale[own], z = quantize_groups(w[own], G, symmetric, method, scale_dtype, steps)
        w_q[own] = pack_nibbles(q)
        if zero is not None:
            zero[own] = z
    if has_values(scale) and not all_finite(scale):
        raise ValueError(f"w has magnitudes whose scale overflows {scale_dtype}; choose another scale_dtype")
    return w_q, scale, zero


def quantize_groups(
    w: torch.Tensor, G: int, symmetric: bool, method: str, scale_dtype: torch.dtype, steps: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(q uint8 [N, K], one in a byte, scale [N, groups], zero or None) of whole panels of rows, and what is left of the
    last; unchecked; G is positive."""
    N, K = w.shape
    count = group_count(K, G)
    grouped = torch.nn.functional.pad(w.float(), (0, count * G - K)).view(N, count, G)  # of zeros: a range holds 0
    low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
    best = _quantized(grouped, low, high, symmetric, scale_dtype)
    if method == "mse":
        unit = _unit(torch.maximum(high, -low).amax(1))
        least = _squared_error(grouped, *best, unit)
        for step in range(1, MSE_STEPS):
            shrink = 1 - step / (2 * MSE_STEPS)
            q, scale, zero = _quantized(grouped, low * shrink, high * shrink, symmetric, scale_dtype)
            error = _squared_error(grouped, q, scale, zero, unit)
            better = error < least
            least = torch.where(better, error, least)
            best = (
                torch.where(better.unsqueeze(2), q, best[0]),
                torch.where(better, scale, best[1]),
                None if symmetric else torch.where(better, zero, best[2]),
            )
    if steps and count > 1:  # one scale is its own step
        best = _in_steps(grouped, *best)
    return best[0].view(N, count * G)[:, :K], *best[1:]


# --------------------------------------------------------------------------------------------------------------- steps


def _in_steps(grouped, q, scale, zero):
    """The same with scales in steps, panel by panel, where they cost little. The zero points stay."""
    s = scale.float()
    most = most_multiple(MIDDLE if zero is None else zero, s)
    step = _best_step(s, most)
    multiples = torch.where(s > 0, _multiples(s, step, most), 0.0)
    stepped = (multiples * step[:, None]).to(scale.dtype)
    q_stepped = _rounded(grouped, stepped.float(), MIDDLE if zero is None else zero.unsqueeze(2).float())
    unit = _unit(_of_panels(s.amax(1), torch.amax))
    before = _of_panels(_squared_error(grouped, q, scale, zero, unit).sum(1), torch.sum)
    after = _of_panels(_squared_error(grouped, q_stepped, stepped, zero, unit).sum(1), torch.sum)
    inexact = (stepped.double() != multiples.double() * step.double()[:, None]).sum(1)
    use = (after <= MOST_STEP_LOSS * before) & (_of_panels(inexact, torch.sum) == 0)
    return torch.where(use[:, None, None], q_stepped, q), torch.where(use[:, None], stepped, scale), zero


def _best_step(s, most):
    """[N] steps of four significant bits: a multiple has as many, and a scale in bf16 holds eight.

    Tried are the smallest that lets every group have its multiple, and the seven above it, up to twice as large; it is
    the one that fits the scales s [N, groups] best.
    """
    fraction, exponent = torch.frexp((s / (most + 0.49)).amax(1))
    unit = _unit(s.amax(1))
    least, step = None, None
    for more in range(8):
        sixteenths = (fraction * 16).ceil() + more
        sixteenths = torch.where(sixteenths > 16, (sixteenths / 2).ceil() * 2, sixteenths)
        tried = torch.ldexp(sixteenths, exponent - 4)
        error = (_multiples(s, tried, most) * tried[:, None] - s).div_(unit).square_().sum(1)
        step = tried if step is None else torch.where(error < least, tried, step)
        least = error if least is None else torch.minimum(error, least)
    return step


def _multiples(s, step, most):
    return torch.minimum((s / step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(min=1), most)


def _of_panels(t, reduce):
    """[N] → what `reduce` makes of each 32, for each of them again: [N]."""
    panels = torch.nn.functional.pad(t, (0, -t.shape[0] % PANEL_N)).view(-1, PANEL_N)
    return reduce(panels, 1).repeat_interleave(PANEL_N)[: t.shape[0]]


# --------------------------------------------------------------------------------------------------------------- parts


def _rounded(grouped, scale, z):
    """q uint8 [N, groups, G] for the scales [N, groups] in fp32."""
    divisor = torch.where(scale > 0, scale, 1.0)
    return ((grouped / divisor.unsqueeze(2)).round_() + z).clamp_(0, LEVELS).to(torch.uint8)


def _unit(largest):
    """[N, 1] powers of two near the magnitudes [N]: in other units squares might vanish or overflow."""
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest)[1] - 1)[:, None]


def _squared_error(grouped, q, scale, zero, unit):
    """Of each group, in units of unit [N, 1] squared."""
    z = MIDDLE if zero is None else zero.unsqueeze(2).float()
    error = (q.float() - z) * scale.float().unsqueeze(2) - grouped
    return error.div_(unit.unsqueeze(2)).square_().sum(2)


def _quantized(grouped, low, high, symmetric, scale_dtype):
    """(q uint8 [N, groups, G], scale, zero or None) for the ranges low … high of the groups."""
    # A tensor: divided by a number, torch may multiply by its rounded reciprocal.
    steps = torch.full_like(high, 7.5 if symmetric else float(LEVELS))
    scale = ((high if symmetric else high - low) / steps).to(scale_dtype)
    used = scale.float()
    if symmetric:
        return _rounded(grouped, used, MIDDLE), scale, None
    zero = (-low / torch.where(used > 0, used, 1.0)).round().clamp_(0, LEVELS)
    return _rounded(grouped, used, zero.unsqueeze(2)), scale, zero.to(torch.uint8)
