"""The runner's end of the workers: start them, ask them one at a time, notice when one dies."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import pyops


class WorkerError(RuntimeError):
    """The peer raised, died or took too long; the message says which."""


class Worker(Protocol):
    """Something that answers the requests of `worker.Session`."""

    alive: bool

    def send(self, do: str, **request: Any) -> None: ...

    def receive(self, timeout_s: float) -> dict[str, Any]: ...

    def stop(self) -> None: ...


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a process that computes on `threads` threads and finds this very pyops."""
    root = str(Path(pyops.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **limits, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


class ProcessWorker:
    """A peer in a process of its own."""

    def __init__(self, op: str, peer: str, device: str, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyops.bench.worker", op, peer, device, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(threads),
            text=True,
        )
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def alive(self) -> bool:
        """False once the process has ended: `receive` would wait in vain."""
        return self._process.poll() is None

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def send(self, do: str, **request: Any) -> None:
        """Ask; the answer comes from `receive`."""
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead: `receive` finds out and says why

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the first `send` that has none yet. Raises WorkerError."""
        try:
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            self.stop()
            raise WorkerError(f"no answer within {timeout_s:.0f} s") from None
        if line is None:
            self._replies.put(None)  # for the requests that are still to be answered
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"the worker died ({self._process.wait()}): {' '.join(tail)}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class LocalWorker:
    """A peer in this process, for GPUs: kernels of one stream do not disturb each other."""

    alive = True

    def __init__(self, op: str, peer: str, device: str, threads: int) -> None:
        from pyops.bench.worker import Session

        self._make, self._session = lambda: Session(op, peer, device, threads), None
        self._requests: deque[tuple[str, dict[str, Any]]] = deque()

    def send(self, do: str, **request: Any) -> None:
        """Remember the request; `receive` runs it."""
        self._requests.append((do, request))

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Run the first request that has not been run. Raises WorkerError."""
        do, request = self._requests.popleft()
        try:
            self._session = self._session or self._make()
            return getattr(self._session, do)(**request)
        except Exception as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error

    def stop(self) -> None:
        """Nothing to end."""


def start(op: str, peer: str, device: str, threads: int) -> Worker:
    """A worker for `peer`; on a CPU in a process of its own."""
    return (LocalWorker if device == "cuda" else ProcessWorker)(op, peer, device, threads)
