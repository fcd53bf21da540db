"""The interface of a peer: one library (ours too) that runs the cases of an op; see `bench/<op>_peers.py`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from pyops.bench.case import Case, Inputs

Role = Literal["ours", "baseline", "peer", "figure"]
"""`baseline` and `peer` compete for "best peer"; a `figure` is only shown, `Peer.excluded` says why."""


@dataclass(frozen=True)
class Instance:
    """A ready model with weights of its own, or what else can be called again and again."""

    call: Callable[[], Any]
    output: Callable[[Any], torch.Tensor] = lambda value: value
    """What `call` returned, as a tensor: the result of the first layer."""
    check: Callable[[], torch.Tensor] | None = None
    """Makes the result to be checked, where one call does not: several steps in place, say. Run once, before timing."""
    prepare: Callable[[], Any] | None = None
    """Restores what a call uses up; run before every call, outside the time. A sample is then one call."""
    note: Callable[[], str] | None = None
    """A remark for the table, made after `check`."""


class Peer:
    """One library on one thread count. It is made in a worker process, which runs nothing else.

    Libraries are imported in `__init__` or later, so that listing peers costs nothing.
    """

    name: ClassVar[str]
    role: ClassVar[Role] = "peer"
    runs: ClassVar[str]
    """What is really called, in words."""
    module: ClassVar[str] = "torch"
    """The module it needs."""
    package: ClassVar[str] = "torch"
    """The distribution to install, also the one whose version is reported."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    graph: ClassVar[bool] = False
    """Cold weights come from one instance whose call runs many layers, not from many instances: that is how a graph
    runtime runs a network, and rotating through its sessions doubles its time for reasons which no network has."""
    excluded: ClassVar[str] = ""
    """Why a `figure` is no fair competitor."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device, self.threads = device, threads

    @classmethod
    def missing(cls, device: str) -> str | None:
        """Why it cannot run here and how to get it, or None if it can."""
        if device not in cls.devices:
            return f"does not run on {device}"
        if importlib.util.find_spec(cls.module.split(".")[0]) is None:
            return f"not installed: pip install {cls.package}"
        return None

    @classmethod
    def covers(cls, case: Case) -> bool:
        """False for a case that it has nothing for; it is then left out without a word."""
        return True

    @classmethod
    def version(cls) -> str | None:
        """The version of its package, or None if it is not installed."""
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def variants(self, inputs: Inputs) -> dict[str, Callable[..., Instance]]:
        """Builders of instances. Of several variants the fastest one on this case is timed, and named in the results.

        Where `graph` is set a builder takes `layers`, else it takes nothing.
        """
        raise NotImplementedError

    def weight_bytes(self, inputs: Inputs) -> int:
        """Bytes of weights that one call reads: how many instances exceed a cache. For cases with a cold cache."""
        return 0


def select(peers: list[type[Peer]], wanted: list[str] | None) -> list[type[Peer]]:
    """Ours, and of the others those that `wanted` names (all if None); "torch" means every "torch-…".

    Raises ValueError for a name that is no peer.
    """
    if wanted is None:
        return list(peers)
    names = [peer.name for peer in peers]
    chosen: set[str] = set()
    for word in wanted:
        hits = [name for name in names if name == word or name.startswith(word + "-")]
        if not hits:
            raise ValueError(f"no peer {word!r}; there are: {', '.join(names)}")
        chosen.update(hits)
    return [peer for peer in peers if peer.role == "ours" or peer.name in chosen]
