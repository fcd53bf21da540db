"""The designs of the CPU kernels of sparse_conv2d, each as a peer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.bench.case import Inputs
from pyops.bench.peers import Instance, Peer
from pyops.bench.sparse_conv2d_peers import FORMATS, TorchChannelsLast


class _Design(Peer):
    rows: int | None = None
    """Output channels at once; None: whatever is chosen."""

    @classmethod
    def missing(cls, device: str) -> str | None:
        from pyops import backend

        if backend.native is None:
            return "wants the compiled extension"
        if cls.rows == 16 and backend.native.cpu_isa() in ("generic", "avx2"):
            return "wants AVX-512"
        return super().missing(device)

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        return {name: lambda form=form: self._instance(inputs, form) for name, form in FORMATS.items()}

    def _instance(self, inputs: Inputs, memory_format: torch.memory_format) -> Instance:
        from pyops.ops import SparseWeight
        from pyops.ops.sparse_conv2d import dispatch
        from pyops.ops.sparse_packed import is_channels_last

        dims = inputs["case"].dims
        x = inputs["x"].to(memory_format=memory_format)
        weight = SparseWeight.from_dense(inputs["w"], pattern=inputs["case"].pattern)
        w = (weight.values, weight.crow_indices, weight.col_indices, weight.shape, weight.block)
        window = ((dims["stride"],) * 2, (dims["pad"],) * 4, (1, 1), 1)
        tiling = [] if self.rows is None else [self.rows]
        packed = torch.ops.pyops.sparse_conv2d_pack(*w, *window, x.shape, is_channels_last(x), True, tiling)
        args = (x, *w, inputs["bias"], None, *window, "none", packed)
        return Instance(lambda: dispatch(*args))  # as the layers do


class Chosen(_Design):
    """What the op takes."""

    name, role, runs = "pyops", "ours", "the design that is chosen when the weight is packed"


class Pairs(_Design):
    """Pairs of output channels that share many taps."""

    name, rows, runs = "pixels-2", 2, "pixels as lanes, pairs of rows"


class Fours(_Design):
    """Four output channels that have the same taps."""

    name, rows, runs = "pixels-4", 4, "pixels as lanes, 4 rows at once"


class Eights(_Design):
    """Eight."""

    name, rows, runs = "pixels-8", 8, "pixels as lanes, 8 rows at once"


class Channels(_Design):
    """Sixteen, one a lane."""

    name, rows, runs = "channels-16", 16, "channels as lanes"


class Dense(TorchChannelsLast):
    """What all of them are compared with."""

    role = "baseline"


PEERS: list[type[Peer]] = [Chosen, Dense, Pairs, Fours, Eights, Channels]
