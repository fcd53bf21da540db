"""int4 weights: how they are quantized, and how they lie in memory.

    w[n, k] ≈ s[n, g] · (q[n, k] - z[n, g]),   g = k // G,   q ∈ 0 … 15,   z ∈ 0 … 16 (8 where the weight is symmetric)

Canonical  (`state_dict`, every device)  q two in a byte along K: uint8 [N, ⌈K/2⌉], the even k in the low nibble, the
           high nibble of an odd K's last byte zero; s [N, ⌈K/G⌉] fp32, bf16 or fp16; z uint8 [N, ⌈K/G⌉], or None.
Packed     (what the CPU kernels read)  in panels of 32 output channels, see `pack_int4`; exactly invertible.

G is 32, a multiple of 64, or -1: one group over all of K. The last group may be shorter than the others. Quantization
makes z of 0 … 15; a z of 16 is what z - 1 in four bits, as GPTQ's first format stores it, can hold.

Steps: where the scales of a channel are whole multiples of one step, s[n, g] = S[n] · m[n, g] with |m · (q - z)| ≤ 127,
the weight is an int8 weight in disguise: products of all groups add up in one integer, and nothing is scaled between
groups. `quantize_int4` (ops/int4_quantize.py) chooses such scales where they cost little, `pack_int4` finds them in any
weight.
"""

from __future__ import annotations

import torch

from pyops.memory import chunks, has_values, put_on_huge_pages
from pyops.ops.linear_shared import check_tensors
from pyops.sizes import ceil_div

LEVELS = 15
MIDDLE = 8
"""The zero point of a symmetric weight."""
MOST_ZERO = 16
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PANEL_N = 32
"""Output channels in one packed panel."""
PANEL_K = 64
"""K is padded to this in the packed form."""

MOST_MULTIPLE = 15
"""Of a step: 15 · 8 ≤ 127 < 16 · 8, and of q - z there is always one of at least 7 or 8."""
MOST_STEPPED_K = 2**17
"""127 · 127 · K < 2³¹"""
LEAST_STEP, MOST_STEP = 2.0**-100, 2.0**100
"""The kernels multiply by the inverse of a step."""


def group_count(K: int, group_size: int) -> int:
    """⌈K/G⌉; one for group_size -1 (none if K is 0)."""
    return ceil_div(K, group_size) if group_size > 0 else min(K, 1)


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless group_size is 32, a multiple of 64, or -1, TypeError if it is no int."""
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"group_size must be an int, got {type(group_size).__name__}")
    if group_size not in (-1, 32) and (group_size <= 0 or group_size % 64):
        raise ValueError(f"group_size is {group_size}; allowed: 32, a multiple of 64, or -1 for all of K")


# ------------------------------------------------------------------------------------------------------------- nibbles


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """q [N, K] of values 0 … 15 → uint8 [N, ⌈K/2⌉], the even k in the low nibbles."""
    q = q.to(torch.uint8)
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[:, 0::2] | (q[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, K: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [N, K]."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1)
    return both.flatten(1)[:, :K].contiguous()


def most_multiple(z, like):
    """The largest m with |m · (q - z)| ≤ 127 for every q, as fp32 of the shape of `like`."""
    reach = torch.as_tensor(z, dtype=torch.float32, device=like.device)
    return (127 / torch.maximum(LEVELS - reach, reach)).floor_().clamp_(max=MOST_MULTIPLE).expand_as(like)


def dequantize_int4(
    w_q: torch.Tensor,  # [N, ⌈K/2⌉]
    w_scale: torch.Tensor,  # [N, ⌈K/G⌉]
    w_zero: torch.Tensor | None,  # [N, ⌈K/G⌉]
    K: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """s · (q - z) as [N, K], computed in fp32 (exact: 5 bits times a scale) and rounded once to `dtype`."""
    return dequantize_groups(
        unpack_nibbles(w_q, K), w_scale, w_zero, group_size if group_size > 0 else max(K, 1), dtype
    )


def dequantize_groups(
    q: torch.Tensor,  # [N, K], one in a byte
    w_scale: torch.Tensor,  # [N, ⌈K/G⌉]
    w_zero: torch.Tensor | None,  # [N, ⌈K/G⌉]
    G: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`dequantize_int4` of what `quantize_groups` returns."""
    (N, K), count = q.shape, w_scale.shape[1]
    if count * G > K:
        q = torch.nn.functional.pad(q, (0, count * G - K))
    w = q.view(N, count, G).to(torch.float32, copy=True)
    w.sub_(MIDDLE if w_zero is None else w_zero.float().unsqueeze(2)).mul_(w_scale.float().unsqueeze(2))
    w = torch.ops.aten._unsafe_view(w, (N, count * G))  # an op that returns it must return no view
    return w.to(dtype) if count * G == K else w[:, :K].to(dtype, copy=True)


# --------------------------------------------------------------------------------------------------------- packed form


def packed_shapes(N: int, K: int, group_size: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of the packed weight, and of the packed scales and zero points, of an [N, K] weight."""
    panels, padded = ceil_div(N, PANEL_N), ceil_div(K, PANEL_K) * PANEL_K
    return (panels, 1 + padded // 8, PANEL_N * 4), (panels, group_count(padded, group_size), PANEL_N)


def find_steps(w_scale: torch.Tensor, w_zero: torch.Tensor | None, K: int) -> torch.Tensor:
    """S fp32 [N] of a canonical weight, 0 for a channel whose scales have none; see the top of this file.

    The largest step that there is; 1 for a channel of zeros.
    """
    N, count = w_scale.shape
    s = w_scale.double()
    if not count or K > MOST_STEPPED_K:
        return torch.full((N,), float(not count), dtype=torch.float32, device=s.device)
    most = most_multiple(MIDDLE if w_zero is None else w_zero, s).double()
    largest = s.amax(1)
    found = torch.where((s == 0).all(1), 1.0, 0.0)
    for m in range(1, MOST_MULTIPLE + 1):
        step = (largest / m).float().double()
        multiples = (s / step[:, None]).round_()
        within = (step >= LEAST_STEP) & (step <= MOST_STEP)
        fits = ((multiples * step[:, None] == s) & (multiples >= 0) & (multiples <= most)).all(1) & within
        found = torch.where((found == 0) & fits, step, found)
    return found.float()


def pack_int4(
    w_q: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, K: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the CPU kernels read: (weight uint8 [⌈N/32⌉, 1 + ⌈K/64⌉·8, 128], scale and zero [⌈N/32⌉, groups, 32]).

    Row 0 of a panel holds the steps of its channels, fp32, or zeros where one of them has none. Another row holds 8 k
    of 32 output channels: byte 4·n + i has k = i in the low nibble, k = 4 + i in the high one. So the low nibbles of a
    row are two AVX-512 registers of VNNI (or a row of two AMX tiles), the high ones the next. K is padded to a multiple
    of 64, whose groups are counted: the padding has scale 0. Raises TypeError or ValueError for what is no such weight.
    """
    check_canonical(w_q, w_scale, w_zero, K, group_size)
    return pack_unchecked(w_q, w_scale, w_zero, K, group_size)


def pack_unchecked(
    w_q: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, K: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`pack_int4` of tensors of the right shapes and dtypes, whatever they hold: a layer's after `to_empty()`."""
    N = w_q.shape[0]
    shape, scale_shape = packed_shapes(N, K, group_size)
    panels, rows, _ = shape
    packed = torch.empty(shape, dtype=torch.uint8, device=w_q.device)
    put_on_huge_pages(packed, filled=False)
    for a, b in chunks(panels, PANEL_N * rows * 8, w_q.device):
        own = w_q[a * PANEL_N : b * PANEL_N]
        padded = w_q.new_zeros((b - a) * PANEL_N, (rows - 1) * 4)  # 4 bytes: 8 k of a channel
        padded[: own.shape[0], : w_q.shape[1]] = own
        pairs = padded.view(b - a, PANEL_N, rows - 1, 2, 2)  # [.., byte of four k, byte of two]: 0 1 | 2 3 || 4 5 | 6 7
        low, high = pairs[..., 0, :], pairs[..., 1, :]  # k 0 … 3 and 4 … 7
        even = (low & 15) | (high << 4)  # k 0 with 4, 2 with 6
        odd = (low >> 4) | (high & 0xF0)  # k 1 with 5, 3 with 7
        # [panels, n, rows, 2, 2] → [panels, rows, n, 4]
        nibbles = packed[a:b].view(b - a, rows, PANEL_N, 2, 2)[:, 1:]
        nibbles.copy_(torch.stack([even, odd], dim=-1).transpose(1, 2))
    steps = w_scale.new_ones(panels * PANEL_N, dtype=torch.float32)  # of what pads a panel: any, its scales are 0
    steps[:N] = find_steps(w_scale, w_zero, K)
    steps = steps.view(panels, PANEL_N)
    packed[:, 0] = torch.where((steps > 0).all(1, keepdim=True), steps, 0.0).view(torch.uint8)
    put_on_huge_pages(packed, filled=True)
    return packed, _pack_groups(w_scale, scale_shape), None if w_zero is None else _pack_groups(w_zero, scale_shape)


def unpack_int4(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, N: int, K: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The canonical (w_q, w_scale, w_zero) of `pack_int4`. Raises ValueError if a shape is wrong."""
    check_packed(packed, scale, zero, N, K, group_size)
    panels, rows, _ = packed.shape
    w_q = torch.empty(N, ceil_div(K, 2), dtype=torch.uint8, device=packed.device)
    for a, b in chunks(panels, PANEL_N * rows * 8, packed.device):
        even, odd = packed[a:b].view(b - a, rows, PANEL_N, 2, 2)[:, 1:].unbind(-1)
        low = (even & 15) | (odd << 4)
        high = (even >> 4) | (odd & 0xF0)
        both = torch.stack([low, high], dim=3)  # [panels, rows, n, 2, 2]
        own = w_q[a * PANEL_N : b * PANEL_N]
        own.copy_(both.transpose(1, 2).reshape((b - a) * PANEL_N, (rows - 1) * 4)[: own.shape[0], : own.shape[1]])
    count = group_count(K, group_size)
    return w_q, _unpack_groups(scale, N, count), None if zero is None else _unpack_groups(zero, N, count)


def _pack_groups(t: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """[N, groups] → [panels, groups padded, 32]."""
    panels, count, _ = shape
    padded = t.new_zeros(panels * PANEL_N, count)
    padded[: t.shape[0], : t.shape[1]] = t
    # Not contiguous(): one group transposed passes for contiguous, with strides that others take for an overlap.
    return t.new_empty(shape).copy_(padded.view(panels, PANEL_N, count).transpose(1, 2))


def _unpack_groups(t: torch.Tensor, N: int, count: int) -> torch.Tensor:
    rows = t.transpose(1, 2).reshape(t.shape[0] * PANEL_N, t.shape[1])
    return t.new_empty(N, count).copy_(rows[:N, :count])


# -------------------------------------------------------------------------------------------------------------- checks


def check_types(w_q, w_scale, w_zero) -> None:
    """Raise TypeError for what is no tensor or has a dtype that no int4 weight has, ValueError for mixed devices."""
    check_tensors(
        ("w_q", w_q),
        ("w_q", w_q, (torch.uint8,)),
        ("w_scale", w_scale, SCALE_DTYPES),
        ("w_zero", w_zero, (torch.uint8,)),
        optional=("w_zero",),
    )


def check_zero(name: str, zero: torch.Tensor | None) -> None:
    """Raise ValueError for a zero point that no weight has."""
    # Not on other devices, where looking would wait for them; their kernels compute with any.
    if zero is not None and zero.numel() and zero.device.type == "cpu" and has_values(zero):
        most = int(zero.max())
        if most > MOST_ZERO:
            raise ValueError(f"{name} holds {most}; zero points are 0 to {MOST_ZERO}")


def check_canonical(w_q, w_scale, w_zero, K: int, group_size: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the three are a canonical weight for this K."""
    check_types(w_q, w_scale, w_zero)
    check_group_size(group_size)
    check_zero("w_zero", w_zero)
    if w_q.dim() != 2 or w_q.shape[1] != ceil_div(K, 2):
        raise ValueError(f"w_q is {tuple(w_q.shape)}; K={K} needs [N, {ceil_div(K, 2)}], two values in a byte")
    expected = (w_q.shape[0], group_count(K, group_size))
    for name, t in (("w_scale", w_scale), ("w_zero", w_zero)):
        if t is not None and tuple(t.shape) != expected:
            raise ValueError(
                f"{name} is {tuple(t.shape)}; N={expected[0]}, K={K} and group_size={group_size} need {expected}"
            )


def check_packed(packed, scale, zero, N: int, K: int, group_size: int) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the three are a packed weight for this N and K."""
    check_types(packed, scale, zero)
    check_group_size(group_size)
    shape, scale_shape = packed_shapes(N, K, group_size)
    for name, t, expected in (("w_q", packed, shape), ("w_scale", scale, scale_shape), ("w_zero", zero, scale_shape)):
        if t is not None and tuple(t.shape) != expected:
            raise ValueError(
                f"packed {name} is {tuple(t.shape)}; N={N}, K={K} and group_size={group_size} need {expected}"
            )
