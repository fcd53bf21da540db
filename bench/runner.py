"""One op, one device, one thread count: drives the workers, checks what they compute, collects their samples."""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections import deque
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

Key = tuple[str, str]
"""The names of a case and a peer."""


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

    def rows(self, cases: list[Case]) -> list[report.Row]:
        """A row for each case, peer and cache state; a peer that is missing, wrong or broken has one row and no time.

        `cases` are one case, or those of one `Case.shared`: the rows of their shared peers are the first case's again.
        """
        lead = cases[0]
        caches = ("warm", "cold") if lead.cold else ("warm",)
        rows = {
            (case.name, kind.name): self._row(case, kind)
            for case in cases
            for kind in self.kinds
            if kind.covers(case) and (case is lead or kind.role == "ours")
        }
        opened = self._open(cases, rows)
        samples = self._interleave(cases, rows, opened, caches)
        self._close_cases(rows)
        result = []
        for case in cases:
            for kind in self.kinds:
                if not kind.covers(case):
                    continue
                key = (case.name, kind.name)
                if key not in rows:
                    key = (lead.name, kind.name)
                    measured = rows.get(key, {"status": "missing", "reason": f"it does not cover {lead.name}"})
                    rows[case.name, kind.name] = measured | self._facts(case, kind) | {"timed_in": lead.name}
                row = rows[case.name, kind.name]
                if row["status"] != "ok":
                    result.append(row)
                    continue
                for cache in caches:
                    stats = report.statistics(samples[key, cache])
                    result.append({**row, "cache": cache, **stats, **self._rates(case, cache, stats["median_ms"])})
        report.set_ratios(result)
        return result

    def _facts(self, case: Case, kind: type[Peer]) -> report.Row:
        facts = ("group", "label", "dims", "ops", "bytes", "ours", "counted", "target", "family")
        competes = kind.role in report.COMPETING and (case.against is None or kind.name in case.against)
        return {
            "case": case.name,
            **{fact: getattr(case, fact) for fact in facts},
            "baseline": self.op.baseline,
            "threads": self.threads,
            "cache": None,
            "peer": kind.name,
            "role": kind.role if competes or kind.role not in report.COMPETING else "figure",
        }

    def _row(self, case: Case, kind: type[Peer]) -> report.Row:
        reason = self.missing[kind.name]
        state = {"variant": "", "status": "missing" if reason else "ok", "reason": reason or ""}
        return self._facts(case, kind) | state

    def _open(self, cases: list[Case], rows: dict[Key, report.Row]) -> list[Key]:
        """Let the workers build the cases and check what they compute; the keys of those that are right."""
        if not self._usable(rows):
            return []  # what makes the inputs may be missing with the peers
        for name, worker in self.workers.items():
            if not worker.alive:  # the case before was too much for it
                self.workers[name] = self._start(name)
        expected = {case.name: self._expected(case) for case in cases}
        self._ask_all(rows, "open", cold_bytes=self.cold_bytes)
        by_name = {case.name: case for case in cases}
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "result.npy")
            for key in self._usable(rows):
                case, worker = by_name[key[0]], self.workers[key[1]]
                worker.send("choose", case=case.name, result=file)
                answer = self._answer(rows[key], worker, OPEN_TIMEOUT_S)
                if answer is not None:
                    rows[key] |= answer
                    self._check(case, rows[key], np.load(file), *expected[case.name])
        self._ask_all(rows, "fill")
        return self._usable(rows)

    def _expected(self, case: Case) -> tuple[np.ndarray, torch.Tensor | None]:
        """What is right: the oracle's result, and the reference's where the op has one."""
        inputs = self.op.make_inputs(case, self.device)
        reference = self.op.reference(inputs) if self.op.reference else None
        return self.op.oracle(inputs).float().cpu().numpy(), reference

    def _close_cases(self, rows: dict[Key, report.Row]) -> None:
        """Let the workers free the cases, those too whose result was wrong."""
        for name in dict.fromkeys(peer for _, peer in rows):
            worker = self.workers.get(name)
            if worker and worker.alive:
                worker.send("close")
                with contextlib.suppress(WorkerError):
                    worker.receive(OPEN_TIMEOUT_S)

    def _usable(self, rows: dict[Key, report.Row]) -> list[Key]:
        """In the order in which they take turns: by worker."""
        usable = [key for key, row in rows.items() if row["status"] == "ok" and key[1] in self.workers]
        order = list(self.workers)
        return sorted(usable, key=lambda key: order.index(key[1]))

    def _ask_all(self, rows: dict[Key, report.Row], do: str, **request: Any) -> None:
        """Ask the workers, as many at once as there are cores: it is not timed, but each may need gigabytes for it."""
        asked: deque[Key] = deque()

        def receive() -> None:
            key = asked.popleft()
            rows[key] |= self._answer(rows[key], self.workers[key[1]], OPEN_TIMEOUT_S) or {}

        for case, peer in self._usable(rows):
            if len(asked) == machine.cores():
                receive()
            self.workers[peer].send(do, case=case, **request)
            asked.append((case, peer))
        while asked:
            receive()

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
        elif row["role"] == "ours" and case.reference_min_sqnr_db is not None:
            least = case.reference_min_sqnr_db
            close = report.sqnr_db(result, reference.float().cpu().numpy())
            row["reference_sqnr_db"] = close if math.isfinite(close) else None
            if not close >= least:
                reason = f"{self.op.checks} {close:.1f} dB against the reference, at least {least:.0f} dB is right"
                row |= {"status": "wrong", "reason": reason}
        elif row["role"] == "ours" and reference is not None:
            tight, eps = reference.float().cpu().numpy(), torch.finfo(reference.dtype).eps
            worst, largest = np.abs(result - tight).max(initial=0.0), np.abs(tight).max(initial=1e-30)
            row["error_eps"] = error = float(worst / largest / eps)
            if error > self.op.max_error_eps:
                reason = f"differs from the reference by {error:.1f} eps, at most {self.op.max_error_eps:g} is right"
                row |= {"status": "wrong", "reason": reason}

    def _interleave(
        self, cases: list[Case], rows: dict[Key, report.Row], opened: list[Key], caches: tuple[str, ...]
    ) -> dict[tuple[Key, str], list[float]]:
        samples: dict[tuple[Key, str], list[float]] = {(key, cache): [] for key in opened for cache in caches}
        rounds, wall_s, foreign_s, waited_s = 0, 0.0, 0.0, 0.0
        active = {case.name: case for case in cases}
        while active:
            rounds += 1
            waited_s += machine.wait_until_quiet(self.patience_s - waited_s, FOREIGN_CPUS)
            for cache in caches:
                for key in opened:
                    row, (case, peer) = rows[key], key
                    if row["status"] != "ok" or (case not in active and row["role"] == "ours"):
                        continue
                    self.workers[peer].send("time", case=case, cache=cache, ms=self.turn_ms)
                    answer = self._answer(row, self.workers[peer], TURN_TIMEOUT_S)
                    if answer:
                        samples[key, cache] += answer["samples"]
                        wall_s, foreign_s = wall_s + answer["wall_s"], foreign_s + answer["foreign_s"]
                        row["rounds"] = rounds
            if rounds >= self.rounds:
                more = rounds < 2 * self.rounds
                active = {
                    name: case for name, case in active.items() if more and self._noisy(case, rows, samples, caches)
                }
        for key in opened:
            rows[key]["foreign_cpus"] = foreign_s / wall_s if wall_s else 0.0
        return samples

    def _noisy(
        self,
        case: Case,
        rows: dict[Key, report.Row],
        samples: dict[tuple[Key, str], list[float]],
        caches: tuple[str, ...],
    ) -> bool:
        """True if the numbers that make the ratio still scatter."""
        timed = [key for key, row in rows.items() if row["status"] == "ok"]
        for cache in caches:
            rivals = [key for key in timed if rows[key]["role"] in report.COMPETING]
            best = min(rivals, key=lambda key: float(np.median(samples[key, cache])), default=None)
            ours = (case.name, case.ours)
            if any(key in timed and report.spread(samples[key, cache]) > NOISY for key in (ours, best)):
                return True
        return False

    def _rates(self, case: Case, cache: str, median_ms: float) -> dict[str, Any]:
        working_set = self.cold_bytes if cache == "cold" else case.bytes
        if case.passes:
            roof = ceilings.passes_ms(self.ceilings, case.passes)
        else:
            roof = ceilings.roof_ms(self.ceilings, case.peak or self.op.peak, case.ops, case.bytes, working_set)
        fraction, limit = (None, None) if roof is None else (roof[0] / median_ms, roof[1])
        rates = {"gops": case.ops / median_ms / 1e6, "gbs": case.bytes / median_ms / 1e6}
        return {**rates, "fraction": fraction, "limit": limit}
