"""One op, one device, one thread count: drives the workers, checks what they compute, collects their samples."""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyops.bench import ceilings, machine, report
from pyops.bench.case import Case, Op
from pyops.bench.peers import Peer
from pyops.bench.pool import Worker, WorkerError, start

OPEN_TIMEOUT_S, TURN_TIMEOUT_S = 600.0, 300.0
NOISY = 1.15
"""p80 / p20 of ours or of the best peer above which a case gets further rounds, at most as many as it had."""

FOREIGN_CPUS = 0.15
"""More than this used by other processes while a case was timed is said in its table."""


class Runner:
    """One op, one device, one thread count: the workers and the rows that they give."""

    def __init__(
        self, op: Op, spec: str, chosen: list[Case], kinds: list[type[Peer]], threads: int, args: argparse.Namespace
    ) -> None:
        self.op, self.threads = op, threads
        self.device = torch.device(args.device)
        self.kinds = kinds
        self.missing = {kind.name: kind.missing(args.device) for kind in kinds}
        self.rounds, self.turn_ms, self.patience_s = (2, 10.0, 0.0) if args.quick else (6, 60.0, 30.0)
        self.cold_bytes = (32 if args.quick else 128) * 2**20 * (3 if args.device == "cuda" else 1)
        self.ceilings: dict[str, Any] = {}
        if not args.skip_ceilings:
            sets = [case.bytes for case in chosen if not case.passes]
            sets += [self.cold_bytes] * any(case.cold for case in chosen)
            passes = [part for case in chosen for part in case.passes]
            self.ceilings = ceilings.measure(args.device, threads, args.quick, sets, passes)
        self._start = lambda name: start(spec, name, args.device, threads)
        self.workers: dict[str, Worker] = {
            kind.name: self._start(kind.name) for kind in kinds if not self.missing[kind.name]
        }

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.stop()

    def case_rows(self, case: Case) -> list[report.Row]:
        """A row for each peer and cache state; a peer that is missing, wrong or broken has one row and no time."""
        rows = {kind.name: self._row(case, kind) for kind in self.kinds if kind.covers(case)}
        opened = self._open(case, rows)
        caches = ("warm", "cold") if case.cold else ("warm",)
        samples = self._interleave(case, rows, opened, caches)
        self._close_case(rows)
        result = []
        for name, row in rows.items():
            if row["status"] != "ok":
                result.append(row)
                continue
            for cache in caches:
                stats = report.statistics(samples[name, cache])
                result.append({**row, "cache": cache, **stats, **self._rates(case, cache, stats["median_ms"])})
        report.set_ratios(result)
        return result

    def _row(self, case: Case, kind: type[Peer]) -> report.Row:
        reason = self.missing[kind.name]
        facts = ("group", "label", "dims", "ops", "bytes", "ours", "counted", "target")
        competes = kind.role in report.COMPETING and (case.against is None or kind.name in case.against)
        return {
            "case": case.name,
            **{fact: getattr(case, fact) for fact in facts},
            "baseline": self.op.baseline,
            "threads": self.threads,
            "cache": None,
            "peer": kind.name,
            "role": kind.role if competes or kind.role not in report.COMPETING else "figure",
            "variant": "",
            "status": "missing" if reason else "ok",
            "reason": reason or "",
        }

    def _open(self, case: Case, rows: dict[str, report.Row]) -> list[str]:
        """Let the workers build the case and check what they compute; the names of those that are right."""
        for name, worker in self.workers.items():
            if not worker.alive:  # the case before was too much for it
                self.workers[name] = self._start(name)
        oracle, reference = self._expected(case)
        self._ask_all(rows, "open", case=case.name, cold_bytes=self.cold_bytes)
        with tempfile.TemporaryDirectory() as folder:
            for name, worker in self._usable(rows):
                file = str(Path(folder) / f"{name}.npy")
                worker.send("choose", result=file)
                answer = self._answer(rows[name], worker, OPEN_TIMEOUT_S)
                if answer is not None:
                    rows[name] |= answer
                    self._check(case, rows[name], np.load(file), oracle, reference)
        self._ask_all(rows, "fill")
        return [name for name, _ in self._usable(rows)]

    def _expected(self, case: Case) -> tuple[np.ndarray, torch.Tensor | None]:
        """What is right: the oracle's result, and the reference's where the op has one."""
        inputs = self.op.make_inputs(case, self.device)
        reference = self.op.reference(inputs) if self.op.reference else None
        return self.op.oracle(inputs).float().cpu().numpy(), reference

    def _close_case(self, rows: dict[str, report.Row]) -> None:
        """Let the workers free the case, those too whose result was wrong."""
        for name in rows:
            worker = self.workers.get(name)
            if worker and worker.alive:
                worker.send("close")
                with contextlib.suppress(WorkerError):
                    worker.receive(OPEN_TIMEOUT_S)

    def _usable(self, rows: dict[str, report.Row]) -> list[tuple[str, Worker]]:
        return [(name, worker) for name, worker in self.workers.items() if rows.get(name, {}).get("status") == "ok"]

    def _ask_all(self, rows: dict[str, report.Row], do: str, **request: Any) -> None:
        """Ask all workers at once: what they do is not timed."""
        usable = self._usable(rows)
        for _, worker in usable:
            worker.send(do, **request)
        for name, worker in usable:
            rows[name] |= self._answer(rows[name], worker, OPEN_TIMEOUT_S) or {}

    def _answer(self, row: report.Row, worker: Worker, timeout_s: float) -> dict[str, Any] | None:
        """The worker's answer; None if there is none, and `row` says why."""
        try:
            return worker.receive(timeout_s)
        except WorkerError as error:
            row |= {"status": "error", "reason": str(error)}
            return None

    def _check(
        self, case: Case, row: report.Row, result: np.ndarray, oracle: np.ndarray, reference: torch.Tensor | None
    ) -> None:
        sqnr = report.sqnr_db(result, oracle)
        # Exact, or nothing like the oracle: JSON knows no infinity.
        row["sqnr_db"] = sqnr if math.isfinite(sqnr) else None
        least = self.op.min_sqnr_db if case.min_sqnr_db is None else case.min_sqnr_db
        if row["role"] == "ours" and case.ours_min_sqnr_db is not None:
            least = case.ours_min_sqnr_db
        if not sqnr >= least:
            row |= {"status": "wrong", "reason": f"{self.op.checks} {sqnr:.1f} dB, at least {least:.0f} dB is right"}
        elif row["role"] == "ours" and reference is not None:
            tight, eps = reference.float().cpu().numpy(), torch.finfo(reference.dtype).eps
            worst, largest = np.abs(result - tight).max(initial=0.0), np.abs(tight).max(initial=1e-30)
            row["error_eps"] = error = float(worst / largest / eps)
            if error > self.op.max_error_eps:
                reason = f"differs from the reference by {error:.1f} eps, at most {self.op.max_error_eps:g} is right"
                row |= {"status": "wrong", "reason": reason}

    def _interleave(
        self, case: Case, rows: dict[str, report.Row], opened: list[str], caches: tuple[str, ...]
    ) -> dict[tuple[str, str], list[float]]:
        samples: dict[tuple[str, str], list[float]] = {(name, cache): [] for name in opened for cache in caches}
        rounds, wall_s, foreign_s, waited_s = 0, 0.0, 0.0, 0.0
        while rounds < self.rounds or (rounds < 2 * self.rounds and self._noisy(case, rows, samples, caches)):
            rounds += 1
            waited_s += machine.wait_until_quiet(self.patience_s - waited_s, FOREIGN_CPUS)
            for cache in caches:
                for name in opened:
                    if rows[name]["status"] != "ok":
                        continue
                    self.workers[name].send("time", cache=cache, ms=self.turn_ms)
                    answer = self._answer(rows[name], self.workers[name], TURN_TIMEOUT_S)
                    if answer:
                        samples[name, cache] += answer["samples"]
                        wall_s, foreign_s = wall_s + answer["wall_s"], foreign_s + answer["foreign_s"]
        for name in opened:
            rows[name] |= {"rounds": rounds, "foreign_cpus": foreign_s / wall_s if wall_s else 0.0}
        return samples

    def _noisy(
        self, case: Case, rows: dict, samples: dict[tuple[str, str], list[float]], caches: tuple[str, ...]
    ) -> bool:
        """True if the numbers that make the ratio still scatter."""
        timed = [name for name, row in rows.items() if row["status"] == "ok"]
        for cache in caches:
            rivals = [name for name in timed if rows[name]["role"] in report.COMPETING]
            best = min(rivals, key=lambda name: float(np.median(samples[name, cache])), default=None)
            if any(name in timed and report.spread(samples[name, cache]) > NOISY for name in (case.ours, best)):
                return True
        return False

    def _rates(self, case: Case, cache: str, median_ms: float) -> dict[str, Any]:
        working_set = self.cold_bytes if cache == "cold" else case.bytes
        if case.passes:
            roof = ceilings.passes_ms(self.ceilings, case.passes)
        else:
            roof = ceilings.roof_ms(self.ceilings, self.op.peak, case.ops, case.bytes, working_set)
        fraction, limit = (None, None) if roof is None else (roof[0] / median_ms, roof[1])
        rates = {"gops": case.ops / median_ms / 1e6, "gbs": case.bytes / median_ms / 1e6}
        return {**rates, "fraction": fraction, "limit": limit}
