"""The worker: one peer in one process, driven by JSON lines on its standard input.

    open   {case, cold_bytes}  builds the case and computes it
    choose {result}            keeps the fastest variant, writes its result to the .npy file `result`
    fill                       builds as many layers as exceed the cache
    time   {cache, ms}         samples
    close                      frees the case

Two thread pools in one process ruin each other's timing; a process for each peer cannot. On a GPU there is no such
quarrel, and the runner drives a `Session` in its own process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyops.bench import case as cases
from pyops.bench import machine
from pyops.bench.peers import Instance, Peer
from pyops.bench.timing import layers_for, quick_ms, samples_ms


class Session:
    """A peer and the case that it has open."""

    def __init__(self, op: str, peer: str, device: str, threads: int) -> None:
        self.op, module = cases.load(op)
        self.device = torch.device(device)
        kind = next(kind for kind in module.PEERS if kind.name == peer)
        self.peer: Peer = kind(self.device, threads)
        self.close()

    def open(self, case: str, cold_bytes: int) -> dict[str, Any]:
        """Build every variant of the case and compute its result. Workers may do this side by side."""
        self.close()
        self.case = next(c for c in self.op.cases if c.name == case)
        with self._mode():
            inputs = self.op.make_inputs(self.case, self.device)
            weight_bytes = self.peer.weight_bytes(inputs)
            self._builders = self.peer.variants(inputs)
            for name, build in self._builders.items():
                instance = build()
                value = instance.check() if instance.check else instance.output(instance.call())
                value = value.detach().float().cpu().clone()
                self._variants[name] = (instance, value)
        self._layers = layers_for(weight_bytes, cold_bytes) if self.case.cold else 0
        quiesce()
        return {"weight_bytes": weight_bytes, "cold_layers": self._layers}

    def choose(self, result: str) -> dict[str, Any]:
        """Keep the fastest variant, write its first result to `result`. Times, hence one worker at a time."""
        names = list(self._variants)
        with self._mode():
            calls = {name: self._variants[name][0].call for name in names}
            chosen = min(names, key=lambda name: quick_ms(calls[name], self.device)) if len(names) > 1 else names[0]
        instance, value = self._variants[chosen]
        self._warm, self._variants, self._chosen = [instance], {}, chosen
        np.save(result, value.numpy())
        quiesce()
        return {"variant": chosen, **({"note": instance.note()} if instance.note else {})}

    def fill(self) -> dict[str, Any]:
        """Build what the cold cache needs. Workers may do this side by side."""
        build = self._builders[self._chosen]
        with self._mode():
            if self.peer.graph and self._layers:
                self._cold = [build(self._layers)]
            elif self._layers:
                self._cold = [*self._warm, *(build() for _ in range(self._layers - 1))]
        self._builders = {}
        quiesce()
        return {}

    def time(self, cache: str, ms: float) -> dict[str, Any]:
        """Samples in milliseconds, of one layer each."""
        instances = self._cold if cache == "cold" else self._warm
        calls = [instance.call for instance in instances]
        prepare = [instance.prepare for instance in instances if instance.prepare]
        layers = self._layers if cache == "cold" and self.peer.graph else 1
        with self._mode():
            before = _clocks()
            samples = samples_ms(calls, ms, self.device, prepare)
            wall_s, own_s, busy_s = (b - a for a, b in zip(before, _clocks(), strict=True))
        quiesce()
        return {"samples": [sample / layers for sample in samples], "wall_s": wall_s, "foreign_s": busy_s - own_s}

    def close(self) -> dict[str, Any]:
        """Forget the case."""
        self._builders: dict[str, Callable[..., Instance]] = {}
        self._variants: dict[str, tuple[Instance, torch.Tensor]] = {}
        self._warm: list[Instance] = []  # whole instances: one may hold memory which its call alone does not
        self._cold: list[Instance] = []
        _release_memory()
        return {}

    def _mode(self) -> contextlib.AbstractContextManager:
        return torch.inference_mode() if self.op.inference else contextlib.nullcontext()


def _release_memory() -> None:
    """Give what the last case held back to the system: several workers hold a case at once."""
    gc.collect()  # optimizers hold themselves
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _clocks() -> tuple[float, float, float]:
    """Wall time, CPU time of this process, CPU time of the whole machine."""
    own_s = time.process_time()
    busy_s = machine.busy_s()
    return time.perf_counter(), own_s, own_s if busy_s is None else busy_s


def quiesce(limit_s: float = 0.25) -> None:
    """Wait until this process's threads stop spinning for more work: the next turn belongs to another process."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        busy, wall = time.process_time(), time.monotonic()
        time.sleep(0.003)
        if time.process_time() - busy < 0.2 * (time.monotonic() - wall):
            return


def main() -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the replies
    op, peer, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = session or Session(op, peer, device, int(threads))
            reply = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
