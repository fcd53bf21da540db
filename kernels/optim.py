"""Optimizer steps over many tensors in one launch; `pyops/ops/optim.py` has the equation.

Each program takes a chunk of one tensor (`optim_tables.py`) and goes through it in tiles [8, 128]; every operand is
read and written once. Whole rows of 128 need a mask by rows only, so that accesses are 16 bytes wide whatever the
sizes; what is left behind a tensor's last whole row has a program of its own. Tensors of one call that differ in dtypes
go in a launch for each combination.

8-bit states have a scale for each 128 elements of a slice along dimension 0. Where slices are multiples of 128 long, or
there is one only, these are the rows of the tile; else (`sliced`) each row finds its slice, and may end early.

LAMB reads its operands twice: a first pass adds up p² and u² of each chunk, a small launch makes ‖p‖/‖u‖ of each
tensor, the last pass computes u again. That is 44 bytes an element in fp32; to keep u between the passes would move 40,
and take memory of the size of the parameters.

There is nothing to tune: no operand is used twice, so that speed depends on the bytes in flight alone. A tile of 1024
elements has 16 KiB of Adam's operands in flight, and the registers leave room for 7 programs on a multiprocessor:
several times what its share of the memory's latency needs. Autotuning a kernel that works in place would moreover need
a copy of every operand.

Arithmetic is fp32 without contraction into multiply-adds (`enable_fp_fusion=False`): that costs nothing where memory is
the limit, and rounds as the reference does.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import optim as contract
from ..ops.optim import hyper_dict, optim_step_ref
from ..ops.optim_rules import RULES, Rule
from . import optim_numbers
from .optim_codec import CUT_BITS, dequantize, quantize, random_bits, round_to_bf16
from .optim_norm import optim_sum_squares
from .optim_numbers import Numbers, on_host
from .optim_plans import is_written, make_plan
from .optim_rules import UPDATES
from .optim_tables import (
    BLOCK,
    COLUMNS,
    EDGE,
    EMA,
    INDEX,
    MASK,
    PROGRAM,
    PROGRAMS_OF_ROW,
    ROWS,
    SCALE,
    SIZE,
    SLICE,
    STATE,
    STREAM,
    WARPS,
    Cache,
    G,
    P,
    Table,
    signature,
    upload,
)
from .optim_tables import STATES as _STATES

__all__ = ["optim_step", "optim_sum_squares"]

STATES = tl.constexpr(_STATES)
WORDS = tl.constexpr(contract.STREAMS_PER_PARAM // 2)
"""Words of random bits that a parameter has; two streams share each."""
PARAM_STREAM = tl.constexpr(contract.PARAM_STREAM)
NUMBERS = tl.constexpr(optim_numbers.COUNT)
DECAY = tl.constexpr(optim_numbers.DECAY)
L1 = tl.constexpr(optim_numbers.L1)
EMA_WEIGHT = tl.constexpr(optim_numbers.EMA_WEIGHT)
STARTS = tl.constexpr(optim_numbers.STARTS)
LENGTH = 1024
"""Sums of chunks that are added up at a time."""


@dataclass(frozen=True, repr=False)
class Variant:
    """What the kernel is compiled for, beside its rule."""

    dtypes: tuple[tl.dtype | None, ...]
    """Of the tensor in each column; None where there is none."""
    in_table: tuple[int, ...] = (-1,) * optim_numbers.COUNT
    """As in `Numbers`."""
    weight_decay: str = "none"
    maximize: bool = False
    l1: bool = False
    zero_grad: bool = False
    stochastic: bool = False
    """p, which is bf16, is rounded stochastically."""
    norms: bool = False
    """Nothing is stored but Σ p² and Σ u²."""
    sliced: bool = False
    aligned: bool = True
    """Every tensor, and every slice with `sliced`, starts on 16 bytes."""

    def __repr__(self) -> str:
        """All of it as an identifier: Triton makes names of functions, and keys of its cache, out of it."""
        return "_".join(re.sub(r"\W+", "_", str(field).replace("-", "m")) for field in vars(self).values())


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _read(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0)


@triton.jit
def _addresses(row_ptr, V: tl.constexpr):
    """The tensors of a row of the table, by column."""
    at = ()
    for j in tl.static_range(SIZE):
        if V.dtypes[j] is not None:
            ptr = tl.load(row_ptr + j).to(tl.pointer_type(V.dtypes[j]))
            if V.aligned:
                ptr = tl.multiple_of(ptr, 16)
            at += (ptr,)
        else:
            at += (row_ptr,)  # never used
    return at


@triton.jit
def _advance(at, base):
    """The pointers moved on by `base` elements, those to scales by as many blocks."""
    moved = ()
    for j in tl.static_range(SIZE):
        moved += (at[j] + (base // BLOCK if (j >= SCALE) & (j < EMA) else base),)
    return moved


@triton.jit
def _halves(base, offs):
    """Of base + offs, the lower and the upper as uint32. No tile reaches over a multiple of 2³²."""
    return base.to(tl.uint32) + offs.to(tl.uint32), (base >> 32).to(tl.uint32)


@triton.jit
def _numbers(numbers, numbers_ptr, index, tensors, V: tl.constexpr):
    c = ()
    for j in tl.static_range(NUMBERS):
        c += (tl.load(numbers_ptr + V.in_table[j] * tensors + index) if V.in_table[j] >= 0 else numbers[j],)
    return c


@triton.jit
def _no_sums(rows: tl.constexpr, V: tl.constexpr):
    if V.norms:
        zeros = tl.zeros((rows, BLOCK), tl.float64)
        return zeros, zeros
    else:
        return ()


@triton.jit
def _store_sums(sums_ptr, sums, V: tl.constexpr):
    if V.norms:
        sums_ptr += tl.program_id(0) * 2
        tl.store(sums_ptr, tl.sum(tl.sum(sums[0], axis=1), axis=0))
        tl.store(sums_ptr + 1, tl.sum(tl.sum(sums[1], axis=1), axis=0))


@triton.jit
def _tile(
    sums,  # (Σ p², Σ u²) fp64 like offs, or ()
    at,  # by column: pointers to what offs, and blocks, count from
    offs,  # [rows, BLOCK]
    mask,  # [rows, BLOCK]
    blocks,  # [rows], of the scales
    inside,  # [rows]
    low,  # uint32 halves of each element's index in its tensor
    high,
    c,  # the numbers
    multiplier,
    ratio,  # ‖p‖/‖u‖, or None
    key,
    word,
    UPDATE: tl.constexpr,
    V: tl.constexpr,
):
    """One tile of the equation, in its order."""
    p = _read(at[P] + offs, mask).to(tl.float32)
    g = _read(at[G] + offs, mask).to(tl.float32)
    states = ()
    for j in tl.static_range(STATES):
        if V.dtypes[STATE + j] is not None:
            wide = _read(at[STATE + j] + offs, mask)
            if V.dtypes[SCALE + j] is not None:
                states += (dequantize(wide, _read(at[SCALE + j] + blocks, inside)),)
            else:
                states += (wide.to(tl.float32),)
    if multiplier is not None:
        g = g * multiplier
    if V.maximize:
        g = -g
    if V.weight_decay == "decoupled":
        p = p * c[DECAY]
    elif V.weight_decay == "l2":
        g = g + c[DECAY] * p
    new, states = UPDATE(p, g, states, c)
    if V.norms:
        p, u = p.to(tl.float64), new.to(tl.float64)
        sums = sums[0] + p * p, sums[1] + u * u
    else:
        if ratio is not None:
            new = p - (c[6] * ratio) * new
        _finish(at, offs, mask, blocks, inside, low, high, c, key, word, new, states, V)
    return sums


@triton.jit
def _finish(at, offs, mask, blocks, inside, low, high, c, key, word, p, states, V: tl.constexpr):
    """What comes after the rule, and the stores."""
    if V.l1:
        shrunk = tl.maximum(tl.abs(p) - c[L1], 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.where(p < 0, -shrunk, shrunk)
    if V.dtypes[MASK] is not None:
        keep = _read(at[MASK] + offs, mask) != 0
        p = tl.where(keep, p, 0.0)
    for j in tl.static_range(STATES):
        if V.dtypes[STATE + j] is not None:
            ptrs = at[STATE + j] + offs
            state = tl.where(keep, states[j], 0.0) if V.dtypes[MASK] is not None else states[j]
            if V.dtypes[SCALE + j] is not None:
                bits = random_bits(key, word + j // 2, low, high, j % 2 == 1, CUT_BITS)
                codes, scale = quantize(tl.where(mask, state, 0.0), bits, V.dtypes[STATE + j] == tl.uint8)
                tl.store(ptrs, codes, mask=mask)
                tl.store(at[SCALE + j] + blocks, scale, mask=inside)
            elif V.dtypes[STATE + j] == tl.bfloat16:
                bits = random_bits(key, word + j // 2, low, high, j % 2 == 1, 16)
                tl.store(ptrs, round_to_bf16(state, bits), mask=mask)
            else:
                tl.store(ptrs, state.to(V.dtypes[STATE + j]), mask=mask)
    if V.dtypes[EMA] is not None:
        average = _read(at[EMA] + offs, mask).to(tl.float32)
        average = tl.where(c[EMA_WEIGHT] == STARTS, p, average + (p - average) * c[EMA_WEIGHT])
        tl.store(at[EMA] + offs, average.to(V.dtypes[EMA]), mask=mask)
    if V.zero_grad:
        tl.store(at[G] + offs, tl.zeros_like(p).to(V.dtypes[G]), mask=mask)
    if V.stochastic:
        bits = random_bits(key, word + PARAM_STREAM // 2, low, high, PARAM_STREAM % 2 == 1, 16)
        tl.store(at[P] + offs, round_to_bf16(p, bits), mask=mask)
    else:
        tl.store(at[P] + offs, p.to(V.dtypes[P]), mask=mask)


@triton.jit
def _edge(at, size, c, multiplier, ratio, key, word, sums_ptr, UPDATE: tl.constexpr, V: tl.constexpr):
    """The elements behind the last whole row."""
    base = size // BLOCK * BLOCK
    left = (size - base).to(tl.int32)
    offs = tl.arange(0, BLOCK)[None, :]
    block = tl.arange(0, 1)
    low, high = _halves(base, offs)
    sums = _tile(
        _no_sums(1, V), _advance(at, base), offs, offs < left, block, block < left, low, high, c, multiplier, ratio,
        key, word, UPDATE, V,
    )  # fmt: skip
    _store_sums(sums_ptr, sums, V)


@triton.jit
def _rows(
    at, size, length, first, most, c, multiplier, ratio, key, word, sums_ptr, UPDATE: tl.constexpr, V: tl.constexpr
):
    """The rows of a tensor from `first` on, `most` of them."""
    tile_rows = tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    if V.sliced:  # a slice ends in a row of its own
        rows_of_slice = tl.cdiv(length, BLOCK)
        rows = size // length * rows_of_slice
    else:
        rows = size // BLOCK
    count = tl.minimum(rows - first, most).to(tl.int32)
    sums = _no_sums(ROWS, V)
    for done in range(0, count, ROWS):
        inside = tile_rows < count - done
        if V.sliced:
            blocks = first + done + tile_rows
            slices = blocks // rows_of_slice
            begins = (blocks - slices * rows_of_slice) * BLOCK
            offs = (slices * length + begins)[:, None] + lanes[None, :]
            mask = inside[:, None] & (begins[:, None] + lanes[None, :] < length)
            if V.aligned:
                offs = tl.max_contiguous(tl.multiple_of(offs, [1, 16]), [1, 16])
                mask = tl.max_constancy(mask, [1, 16])
            low, high = offs.to(tl.uint32), (offs >> 32).to(tl.uint32)
            sums = _tile(sums, at, offs, mask, blocks, inside, low, high, c, multiplier, ratio, key, word, UPDATE, V)
        else:
            base = (first + done) * BLOCK
            offs = tile_rows[:, None] * BLOCK + lanes[None, :]
            mask = tl.broadcast_to(inside[:, None], (ROWS, BLOCK))
            low, high = _halves(base, offs)
            sums = _tile(
                sums, _advance(at, base), offs, mask, tile_rows, inside, low, high, c, multiplier, ratio, key, word,
                UPDATE, V,
            )  # fmt: skip
    _store_sums(sums_ptr, sums, V)


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["tensors", "rows_of_chunk", "key", "stream"])
def _optim_step_kernel(
    table_ptr,  # [, COLUMNS] int64
    chunks_ptr,  # [programs] int64
    numbers,  # NUMBERS floats
    numbers_ptr,  # [, tensors] fp32: the numbers that are not the same for all, or live on the device; or None
    multiplier_ptr,  # one element, or None
    found_inf_ptr,  # one element, or None
    sums_ptr,  # [programs, 2] fp64, or None
    ratio_ptr,  # [tensors] fp32, or None
    tensors,
    rows_of_chunk,
    key,
    stream,
    UPDATE: tl.constexpr,
    V: tl.constexpr,
):
    chunk = tl.load(chunks_ptr + tl.program_id(0))
    row_ptr = table_ptr + (chunk >> 32) * COLUMNS
    number = chunk & 0xFFFFFFFF
    size = tl.load(row_ptr + SIZE)
    index = tl.load(row_ptr + INDEX)
    at = _addresses(row_ptr, V)
    c = _numbers(numbers, numbers_ptr, index, tensors, V)
    key = key.to(tl.uint32)
    word = (stream.to(tl.uint32) + tl.load(row_ptr + STREAM).to(tl.uint32)) * WORDS
    multiplier = None
    if multiplier_ptr is not None:
        multiplier = tl.load(multiplier_ptr).to(tl.float32)
    ratio = None
    if ratio_ptr is not None:
        ratio = tl.load(ratio_ptr + index)
    if found_inf_ptr is not None:
        size = tl.where(tl.load(found_inf_ptr) != 0, 0, size)

    length = tl.load(row_ptr + SLICE)
    first = number * rows_of_chunk
    if V.sliced:
        _rows(at, size, length, first, rows_of_chunk, c, multiplier, ratio, key, word, sums_ptr, UPDATE, V)
    elif number == EDGE:
        _edge(at, size, c, multiplier, ratio, key, word, sums_ptr, UPDATE, V)
    else:
        _rows(at, size, length, first, rows_of_chunk, c, multiplier, ratio, key, word, sums_ptr, UPDATE, V)


@triton.jit
def _trust_ratio_kernel(
    table_ptr,  # [rows, COLUMNS] int64
    sums_ptr,  # [programs, 2] fp64
    ratio_ptr,  # [tensors] fp32
    LENGTH: tl.constexpr,
):
    """‖p‖/‖u‖ of the tensor of each row; 1 where a norm is 0."""
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    sums_ptr += tl.load(row_ptr + PROGRAM) * 2
    programs = tl.load(row_ptr + PROGRAMS_OF_ROW).to(tl.int32)
    offs = tl.arange(0, LENGTH)
    of_p = tl.zeros((LENGTH,), tl.float64)
    of_u = tl.zeros((LENGTH,), tl.float64)
    for start in range(0, programs, LENGTH):
        mask = offs < programs - start
        of_p += tl.load(sums_ptr + (start + offs) * 2, mask=mask, other=0.0)
        of_u += tl.load(sums_ptr + (start + offs) * 2 + 1, mask=mask, other=0.0)
    p_norm = tl.sqrt(tl.sum(of_p, axis=0))
    u_norm = tl.sqrt(tl.sum(of_u, axis=0))
    ratio = tl.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)
    tl.store(ratio_ptr + tl.load(row_ptr + INDEX), ratio.to(tl.float32))


# ------------------------------------------------------------------------------------------------------------ launcher

_plans = Cache()


def optim_step(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    scalars: list[Tensor],
    hyper: list[float],
    scales: list[Tensor],
    ema: list[Tensor],
    masks: list[Tensor],
    first: list[int],
    lr: Tensor | None,
    multiplier: Tensor | None,
    found_inf: Tensor | None,
    zero_grad: bool,
    stochastic_rounding: bool,
    key: int,
    stream: int,
) -> None:
    """The op `pyops::optim_step` on CUDA.

    Nothing waits for the device, but for one case: whether scalars on the CPU are to be counted is in `found_inf`, and
    if that is on the device it has to be read. With scalars, and lr if it is a tensor, on the device, a call can be
    captured in a CUDA graph.

    Operands whose order in memory is not that of their parameter (or not row-major, where random bits go by the index)
    are worked on in copies. Parameters of fp64, and what has dtypes that the contract does not name, take the
    reference's way, which waits for `found_inf`.
    """
    if not params:
        return
    r = RULES[rule]
    n_states, n_scalars = len(r.states), len(r.scalars)
    if found_inf is not None and (on_host(found_inf) or (scalars and on_host(scalars[0]))):
        if found_inf.item() != 0:
            return
        found_inf = None
    h = hyper_dict(r, hyper, None)
    if lr is not None:
        h["lr"] = lr.item() if on_host(lr) else lr.double().reshape(())

    lists = params, grads, states, scales, ema, masks
    plan = _plans.get(
        params[0].device,
        (
            *(n_states, stochastic_rounding, *map(len, lists)),
            *signature([t for tensors in lists for t in tensors]),
        ),
        functools.partial(make_plan, n_states, stochastic_rounding, *lists),
    )
    for i in plan.by_reference:
        own, own_scalars = slice(i * n_states, (i + 1) * n_states), slice(i * n_scalars, (i + 1) * n_scalars)
        optim_step_ref(
            *(rule, params[i : i + 1], grads[i : i + 1], states[own], scalars[own_scalars], hyper, scales[own]),
            *(ema[i : i + 1], masks[i : i + 1], first[i : i + 1], lr, multiplier, found_inf),
            *(zero_grad, stochastic_rounding, key, stream + i),
        )
    for _, operand, stand_in in plan.stand_ins:
        stand_in.copy_(operand)
    variant = Variant(
        (),
        weight_decay=optim_numbers.weight_decay(r, h),
        maximize=bool(h["maximize"]),
        l1=bool(h["l1"]),
        zero_grad=zero_grad,
    )
    for part in plan.parts:
        count, device = len(part.indices), part.device
        factor = None if multiplier is None else upload(multiplier, device)
        inf = None if found_inf is None else upload(found_inf, device)
        own = [t for i in part.indices for t in scalars[i * n_scalars : (i + 1) * n_scalars]]
        new = optim_numbers.count_step(r, h, own, inf)
        numbers = optim_numbers.numbers(r, h, new, [first[i] for i in part.indices] if first else [], count, device)
        with torch.cuda.device_of(params[part.indices[0]]):
            for dtypes, sliced, aligned, table in part.launches:
                kind = replace(
                    variant,
                    dtypes=dtypes,
                    in_table=numbers.in_table,
                    stochastic=stochastic_rounding and dtypes[P] == tl.bfloat16,
                    sliced=sliced,
                    aligned=aligned,
                )
                _launch(r, kind, table, numbers, factor, inf, count, key, stream)
    for column, operand, stand_in in plan.stand_ins:
        if is_written(column, zero_grad):
            operand.copy_(stand_in)


def _launch(
    rule: Rule,
    variant: Variant,
    table: Table,
    numbers: Numbers,
    multiplier: Tensor | None,
    found_inf: Tensor | None,
    tensors: int,
    key: int,
    stream: int,
) -> None:
    def step(variant: Variant, sums: Tensor | None, ratio: Tensor | None) -> None:
        _optim_step_kernel[(table.programs,)](
            table.rows,
            table.chunks,
            numbers.same,
            numbers.table,
            multiplier,
            found_inf,
            sums,
            ratio,
            tensors,
            table.rows_of_chunk,
            _int32(key),
            _int32(stream),
            UPDATES[rule.name],
            variant,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )

    if not rule.whole_tensor:
        step(variant, None, None)
        return
    device = table.rows.device
    sums = torch.empty((table.programs, 2), dtype=torch.float64, device=device)
    ratio = torch.empty(tensors, dtype=torch.float32, device=device)
    only_sums = replace(variant, norms=True, l1=False, zero_grad=False, stochastic=False)
    step(only_sums, sums, None)
    _trust_ratio_kernel[(table.rows.shape[0],)](table.rows, sums, ratio, LENGTH=LENGTH)
    step(variant, None, ratio)


def _int32(x: int) -> int:
    """The lower 32 bits as Triton takes them: of one type, whatever their value."""
    return (x + 2**31) % 2**32 - 2**31
