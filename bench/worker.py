"""The worker: one peer in one process, driven by JSON lines on its standard input.

    open   {case, cold_bytes}  builds the case and computes it
    choose {case, result}      keeps the fastest variant, writes its result to the .npy file `result`
    fill   {case}              builds as many layers as exceed the cache
    time   {case, cache, ms}   samples
    close                      frees all cases

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
from pyops.bench.case import Case
from pyops.bench.peers import Instance, Peer
from pyops.bench.timing import layers_for, quick_ms, samples_ms


class _Open:
    """A case that is open."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.layers = 0
        self.chosen = ""
        self.builders: dict[str, Callable[..., Instance]] = {}
        self.variants: dict[str, tuple[Instance, torch.Tensor]] = {}
        self.warm: list[Instance] = []  # whole instances: one may hold memory which its call alone does not
        self.cold: list[Instance] = []


class Session:
    """A peer and the cases that it has open: several at once only if they are run together."""

    def __init__(self, op: str, peer: str, device: str, threads: int) -> None:
        self.op, module = cases.load(op)
        self.device = torch.device(device)
        kind = next(kind for kind in module.PEERS if kind.name == peer)
        self.peer: Peer = kind(self.device, threads)
        self.close()

    def open(self, case: str, cold_bytes: int) -> dict[str, Any]:
        """Build every variant of the case and compute its result. Workers may do this side by side."""
        held = self._held[case] = _Open(next(c for c in self.op.cases if c.name == case))
        with self._mode():
            inputs = self.op.make_inputs(held.case, self.device)
            weight_bytes = self.peer.weight_bytes(inputs)
            held.builders = self.peer.variants(inputs)
            for name, build in held.builders.items():
                instance = build()
                value = instance.check() if instance.check else instance.output(instance.call())
                value = value.detach().float().cpu().clone()
                held.variants[name] = (instance, value)
        held.layers = layers_for(weight_bytes, cold_bytes) if held.case.cold else 0
        quiesce()
        return {"weight_bytes": weight_bytes, "cold_layers": held.layers}

    def choose(self, case: str, result: str) -> dict[str, Any]:
        """Keep the fastest variant, write its first result to `result`. Times, hence one worker at a time."""
        held = self._held[case]
        names = list(held.variants)
        with self._mode():
            calls = {name: held.variants[name][0].call for name in names}
            chosen = min(names, key=lambda name: quick_ms(calls[name], self.device)) if len(names) > 1 else names[0]
        instance, value = held.variants[chosen]
        held.warm, held.variants, held.chosen = [instance], {}, chosen
        np.save(result, value.numpy())
        quiesce()
        return {"variant": chosen, **({"note": instance.note()} if instance.note else {})}

    def fill(self, case: str) -> dict[str, Any]:
        """Build what the cold cache needs. Workers may do this side by side."""
        held = self._held[case]
        build = held.builders[held.chosen]
        with self._mode():
            if self.peer.graph and held.layers:
                held.cold = [build(held.layers)]
            elif held.layers:
                held.cold = [*held.warm, *(build() for _ in range(held.layers - 1))]
        held.builders = {}
        quiesce()
        return {}

    def time(self, case: str, cache: str, ms: float) -> dict[str, Any]:
        """Samples in milliseconds, of one layer each."""
        held = self._held[case]
        instances = held.cold if cache == "cold" else held.warm
        calls = [instance.call for instance in instances]
        prepare = [instance.prepare for instance in instances if instance.prepare]
        layers = held.layers if cache == "cold" and self.peer.graph else 1
        with self._mode():
            before = _clocks()
            samples = samples_ms(calls, ms, self.device, prepare)
            wall_s, own_s, busy_s = (b - a for a, b in zip(before, _clocks(), strict=True))
        quiesce()
        return {"samples": [sample / layers for sample in samples], "wall_s": wall_s, "foreign_s": busy_s - own_s}

    def close(self) -> dict[str, Any]:
        """Forget the cases."""
        self._held: dict[str, _Open] = {}
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
