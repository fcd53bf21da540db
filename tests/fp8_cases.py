"""What the tests of fp8 share: e4m3 by its definition, a float64 oracle, and problems."""

from __future__ import annotations

import math

import numpy as np
import torch
from cases import randn

from pyops import ops
from pyops.ops.epilogue import ACTIVATIONS

GRANULARITIES = ("row", "block")


def _magnitude(code: int) -> float:
    """s eeee mmm: (8 + mmm) · 2^(eeee - 10), or mmm · 2⁻⁹ where eeee is 0; the largest code is NaN."""
    exponent, fraction = code >> 3, code & 7
    if code == 0x7F:
        return math.nan
    return fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)


VALUES = np.array([_magnitude(code) for code in range(127)])
"""Of the codes 0x00 to 0x7e, ascending."""


def encode(values: np.ndarray) -> np.ndarray:
    """The codes, as uint8, nearest to `values`, which lie within ±448; ties go to the even code."""
    magnitude = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(VALUES, magnitude), 1, 126)
    below = above - 1
    to_above, to_below = VALUES[above] - magnitude, magnitude - VALUES[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return (np.where(up, above, below) + 0x80 * np.signbit(values)).astype(np.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The values of float8_e4m3fn codes, in float64."""
    bits = codes.view(torch.uint8).numpy()
    table = np.append(VALUES, np.nan)
    return torch.from_numpy(np.where(bits & 0x80, -1.0, 1.0) * table[bits & 0x7F])


def quantize(x: torch.Tensor, block: int, x_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract's codes and scales of finite rows of x [M, K], written out in numpy; `block` columns share a scale.

    Returns the codes [M, K] and the scale of every element [M, K].
    """
    rows = x.float().numpy()
    codes, scales = np.empty(rows.shape, np.uint8), np.empty(rows.shape, np.float32)
    for k in range(0, rows.shape[1], block):
        part = rows[:, k : k + block]
        amax = np.abs(part).max(axis=1, keepdims=True)
        if x_scale is None:
            usable = amax >= np.float32(2.0**-117)
            amax = np.where(usable, amax, np.float32(1))
            scale = np.where(usable, amax / np.float32(448), np.float32(0))
            inverse = np.where(usable, np.float32(448) / amax, np.float32(0))
        else:
            scale = np.broadcast_to(x_scale.reshape(-1, 1).numpy(), amax.shape)
            inverse = np.float32(1) / scale
        codes[:, k : k + block] = encode(np.clip(part * inverse, np.float32(-448), np.float32(448)))
        scales[:, k : k + block] = scale
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)


def problem(M: int, N: int, K: int, granularity: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """x, w_q and w_scale of a layer with outputs of order one; magnitudes differ along K and from row to row."""
    uneven = torch.linspace(0, 4, K).exp2()
    w = randn(N, K, seed=seed, scale=0.05 * K**-0.5 if K else 1.0) * uneven
    x = randn(M, K, seed=seed + 1) * torch.linspace(0, 5, M).exp2()[:, None]
    return x.to(dtype), *ops.quantize_fp8(w, granularity)


def oracle(x, w_q, w_scale, bias=None, residual=None, activation="none", x_scale=None) -> tuple:
    """The equation in float64 on the codes of `quantize`, and the sum of the magnitudes that it adds."""
    N, K = w_q.shape
    M = math.prod(x.shape[:-1])
    codes, s_x = quantize(x.reshape(M, K), 128 if w_scale.dim() == 2 else max(K, 1), x_scale)
    if w_scale.dim() == 2:
        s_w = w_scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    else:
        s_w = w_scale[:, None]
    a, b = decode(codes) * s_x.double(), decode(w_q.contiguous()) * s_w.double()
    terms = [a @ b.T]
    terms += [] if bias is None else [bias.double().expand(M, N)]
    terms += [] if residual is None else [residual.double().reshape(M, N)]
    magnitude = a.abs() @ b.abs().T + sum((t.abs() for t in terms[1:]), torch.zeros(M, N))
    shape = (*x.shape[:-1], N)
    return ACTIVATIONS[activation](sum(terms)).reshape(shape), magnitude.reshape(shape)


def assert_close_to_oracle(y: torch.Tensor, x: torch.Tensor, *rest, inexact: float = 0.0) -> None:
    """Every element within √K + 8 roundings of fp32 of what was added up, and one of y's dtype.

    `inexact` is a relative error that sums may have besides.
    """
    exact, magnitude = oracle(x, *rest)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    allowed = ((math.sqrt(x.shape[-1]) + 8) * torch.finfo(torch.float32).eps + inexact) * (magnitude + 1)
    info = torch.finfo(y.dtype)
    allowed += 0.51 * info.eps * exact.abs() + info.smallest_normal * info.eps
    excess = (y.double() - exact).abs() - allowed
    assert not y.numel() or excess.max() <= 0, f"beyond the bound by {excess.max():.3g}"
