"""How one launch reaches many tensors: tables of their addresses, and lists of chunks that say who works on what.

A row of a table is int64 [COLUMNS] and belongs to a parameter: addresses, then sizes. A chunk is one int64, the row and
its number in the tensor, and belongs to one program. The chunks of a launch are of one length, such that there are
PROGRAMS of them for each multiprocessor: small models fill the device, large ones spend nothing on finding their way.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..sizes import ceil_div

BLOCK = tl.constexpr(128)
"""Elements in a row of a tile, and those that share a scale."""
ROWS = tl.constexpr(8)
"""Rows of a tile: 8 elements a thread with 4 warps, two 16-byte accesses in fp32, one in bf16."""
EDGE = tl.constexpr(2**32 - 1)
"""In place of the number of a chunk: what is left behind the tensor's last whole row of BLOCK."""
WARPS = 4
PROGRAMS = 32
"""Programs for each multiprocessor: 4 to 5 times those that fit at once, so that the last ones to end cost little."""
CACHED = 16
"""Results kept by a cache. Gradients take turns between a few sets of addresses."""

# Columns of a table: addresses of p, g, states, their scales, average and mask; then what a program has to know.
P, G, STATE, SCALE, EMA, MASK = (tl.constexpr(column) for column in (0, 1, 2, 5, 8, 9))
SIZE = tl.constexpr(10)  # elements
SLICE = tl.constexpr(11)  # those of a slice along dimension 0 if blocks end with slices; else all
INDEX = tl.constexpr(12)  # position among the parameters on the device
STREAM = tl.constexpr(13)  # position among the parameters of the call
PROGRAM, PROGRAMS_OF_ROW = tl.constexpr(14), tl.constexpr(15)  # the first program, and how many there are
COLUMNS = tl.constexpr(16)  # a line of the cache
STATES = SCALE.value - STATE.value
"""Most that a rule has."""


class Table(NamedTuple):
    """A launch's; both tensors are on its device."""

    rows: Tensor  # [rows, COLUMNS] int64
    chunks: Tensor  # [programs] int64: (row ≪ 32) + number
    rows_of_chunk: int  # rows of BLOCK

    @property
    def programs(self) -> int:
        """How many the launch has."""
        return self.chunks.shape[0]


@functools.cache
def multiprocessors(index: int | None) -> int:
    """Of a device; an H100's where there is none to ask."""
    if knobs.runtime.interpret:
        return 132
    return triton.runtime.driver.active.utils.get_device_properties(index or 0)["multiprocessor_count"]


def upload(host: Tensor, device: torch.device) -> Tensor:
    """`host` on the device, without waiting for it.

    The copy is from pinned memory, also when it is replayed from a CUDA graph: torch (2.11 and later) leaves what is
    pinned during a capture to the graph.
    """
    if device.type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def make_table(rows: Sequence[list[int]], device: torch.device) -> Table:
    """The table of `rows`, which end before PROGRAM. None of them is of an empty tensor."""
    block, rows_of_tile = BLOCK.value, ROWS.value
    blocks, edges = [], []
    for row in rows:
        size, length = row[SIZE.value], row[SLICE.value]
        if size == length:
            blocks.append(size // block)
            edges.append(size % block > 0)
        else:  # the last row of each slice is in a chunk, however short
            blocks.append(size // length * ceil_div(length, block))
            edges.append(False)
    tiles = sum(ceil_div(n, rows_of_tile) for n in blocks)
    rows_of_chunk = rows_of_tile * max(1, tiles // (PROGRAMS * multiprocessors(device.index)))
    table: list[int] = []
    chunks: list[int] = []
    for i, (row, n, edge) in enumerate(zip(rows, blocks, edges, strict=True)):
        count = ceil_div(n, rows_of_chunk)
        table += *row, len(chunks), count + edge
        chunks += range(i << 32, (i << 32) + count)
        if edge:
            chunks.append((i << 32) + EDGE.value)
    both = upload(torch.tensor(table + chunks, dtype=torch.int64), device)
    return Table(both[: len(table)].view(len(rows), COLUMNS.value), both[len(table) :], rows_of_chunk)


class Cache:
    """What was made of a set of tensors the last times, by their addresses, dtypes and shapes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, device: torch.device, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, or what it returned before. What has `transient` set is not kept.

        Each stream has its own: nothing orders the upload on one before a kernel on another. During a capture all is
        made anew, so that the graph holds the upload and depends on nothing outside it.
        """
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return make()
            key = torch.cuda.current_stream(device).cuda_stream, key
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        if not made.transient:
            self._kept[key] = made
            if len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


def signature(tensors: Sequence[Tensor]) -> tuple:
    """Addresses, dtypes, shapes and orders in memory."""
    return (
        tuple([t.data_ptr() for t in tensors]),
        tuple([t.dtype for t in tensors]),
        tuple([t.shape for t in tensors]),
        tuple([t.is_contiguous() or t.stride() for t in tensors]),
    )


def is_dense(t: Tensor) -> bool:
    """True if the elements fill their memory without gaps and overlaps, in whatever order."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()
