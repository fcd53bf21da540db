"""From samples to rows, points, summary and table. Pure functions of plain data, so that a JSON can be read again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

SCHEMA = "pyops-bench/1"
Row = dict[str, Any]
COMPETING = ("peer", "baseline")


def geomean(values: Iterable[float]) -> float | None:
    """exp(mean(log v)), None for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def statistics(samples: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile in ms over all samples of all rounds."""
    p20, median, p80 = (float(v) for v in np.percentile(samples, (20, 50, 80)))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(samples)}


def spread(samples: list[float]) -> float:
    """p80 / p20: 1 on a quiet machine."""
    p20, p80 = np.percentile(samples, (20, 80))
    return float(p80 / p20) if p20 > 0 else float("inf")


def sqnr_db(result: np.ndarray, oracle: np.ndarray) -> float:
    """10·log10(Σ oracle² / Σ (result - oracle)²), -inf where shapes differ or the result is not finite."""
    if result.shape != oracle.shape or not np.isfinite(result).all():
        return -math.inf
    noise = float(np.square(result - oracle, dtype=np.float64).sum())
    signal = float(np.square(oracle, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if noise and signal else (math.inf if not noise else -math.inf)


def points(rows: list[Row]) -> list[Row]:
    """One row per (case, threads, cache): ours against the best competing peer and against the baseline.

    `speedup` is the best peer's median over ours, `over_baseline` the baseline's over ours: above 1, ours is faster.
    `target` is the speedup that the case aims at, with more than one thread. Only rows that are timed, hence right, are
    looked at.
    """
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok" and row["cache"] is not None:
            found.setdefault((row["case"], row["threads"], row["cache"]), []).append(row)
    result = []
    for timed in found.values():
        ours = next((row for row in timed if row["peer"] == row["ours"]), None)
        competing = [row for row in timed if row["role"] in COMPETING]
        best = min(competing, key=lambda row: row["median_ms"], default=None)
        baseline = next((row for row in timed if row["peer"] == row["baseline"]), None)
        if ours is None:
            continue
        point = {
            key: ours[key]
            for key in ("case", "group", "label", "threads", "cache", "counted", "variant", "family")
            if key in ours
        }
        point |= {"ours_ms": ours["median_ms"], "best_peer": None, "speedup": None, "over_baseline": None}
        point["target"] = ours.get("target") if ours["threads"] > 1 else None
        if best:
            point["best_peer"], point["best_peer_ms"] = best["peer"], best["median_ms"]
            point["speedup"] = best["median_ms"] / ours["median_ms"]
        if baseline:
            point["over_baseline"] = baseline["median_ms"] / ours["median_ms"]
        result.append(point)
    return result


def set_ratios(rows: list[Row]) -> None:
    """Give every timed row `ratio`: its median over ours in the same case, threads and cache state."""
    ours = {
        (row["case"], row["threads"], row["cache"]): row["median_ms"]
        for row in rows
        if row["status"] == "ok" and row["peer"] == row["ours"]
    }
    for row in rows:
        if row["status"] == "ok":
            mine = ours.get((row["case"], row["threads"], row["cache"]))
            row["ratio"] = row["median_ms"] / mine if mine else None


def summarize(rows: list[Row], families: dict[str, Row] | None = None) -> dict[str, Any]:
    """Geometric means, worst point and losses over the counted points, for each (threads, cache) and for all.

    `families` has the fields of `case.Family` by name.
    """
    every = [point for point in points(rows) if point["counted"]]
    parts: dict[str, list[Row]] = {}
    for point in every:
        name = f"{point['threads']} thread{'s' * (point['threads'] > 1)}, {point['cache']}"
        parts.setdefault(name, []).append(point)
    if len(parts) > 1:
        parts["all"] = every
    summary = {}
    for name, part in parts.items():
        against = [p for p in part if p["speedup"]]
        worst = min(against, key=lambda p: p["speedup"], default=None)
        over = [p for p in part if p["over_baseline"]]
        keys = {(p["case"], p["threads"], p["cache"]) for p in part}
        ratios: dict[str, list[float]] = {}
        for row in rows:
            if row["status"] == "ok" and row["role"] != "ours" and (row["case"], row["threads"], row["cache"]) in keys:
                ratios.setdefault(row["peer"], []).append(row["ratio"])
        summary[name] = {
            "points": len(part),
            "geomean": geomean(p["speedup"] for p in against),
            "worst": worst and {key: worst[key] for key in ("case", "threads", "cache", "best_peer", "speedup")},
            "slower_than_best": sum(p["speedup"] < 1 for p in against),
            "targets": sum(p["target"] is not None for p in against),
            "missed": [
                {key: p[key] for key in ("case", "threads", "cache", "speedup", "target")}
                for p in against
                if p["target"] is not None and p["speedup"] < p["target"]
            ],
            "geomean_over_baseline": geomean(p["over_baseline"] for p in over),
            "slower_than_baseline": [
                f"{p['case']} {p['threads']}T {p['cache']}" for p in over if p["over_baseline"] < 1
            ],
            "geomean_over_peer": {peer: geomean(values) for peer, values in ratios.items()},
            "families": _families(against, families or {}),
        }
    return summary


def _families(part: list[Row], families: dict[str, Row]) -> dict[str, Row]:
    """Of each family that has points here: their number, geometric mean, lowest and highest ratio, and the target."""
    found = {}
    for name, family in families.items():
        speedups = [point["speedup"] for point in part if point.get("family") == name]
        if speedups:
            ends = {"lowest": min(speedups), "highest": max(speedups), "target": family["target"]}
            found[name] = {"points": len(speedups), "geomean": geomean(speedups), **ends}
    return found


# -------------------------------------------------------------------------------------------------------------- table


def _number(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits and no exponent."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


HEADER = ("", "median ms", "p20–p80", "GB/s", "{ops_unit}", "of ceiling", "× ours")


def _cells(row: Row) -> tuple[str, ...]:
    name = row["peer"] + (" *" if row["role"] == "figure" else "")
    if row["status"] != "ok":
        return name, row["status"], "", "", "", "", row["reason"]
    share = "unknown" if row["fraction"] is None else f"{row['fraction']:.0%} {row['limit']}"
    spread_ms = f"{_number(row['p20_ms'])}–{_number(row['p80_ms'])}"
    numbers = (_number(row["median_ms"], 4), spread_ms, _number(row["gbs"]), _number(row["gops"]), share)
    remarks = ", ".join(filter(None, (row["variant"], row.get("note"))))
    return name, *numbers, f"{_number(row['ratio'])}  {remarks}".rstrip()


def table(rows: list[Row], ops_unit: str = "GOP/s") -> str:
    """The rows of one (case, threads, cache), ours first, then by time; a peer without a time says why."""
    ordered = sorted(rows, key=lambda r: (r["role"] != "ours", r["status"] != "ok", r.get("median_ms") or 0.0))
    header = tuple(word.format(ops_unit=ops_unit) for word in HEADER)
    lines = [header, *(_cells(row) for row in ordered)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER) - 1)]
    text = []
    for name, *middle, last in lines:
        padded = "  ".join(cell.rjust(width) for cell, width in zip(middle, widths[1:], strict=True))
        text.append(f"  {name.ljust(widths[0])}  {padded}  {last}".rstrip())
    return "\n".join(text)


def line(rows: list[Row]) -> str:
    """One case in one line, for cases that share the table of the first one."""
    ours = next(row for row in rows if row["peer"] == row["ours"])
    if ours["status"] != "ok":
        return f"  {ours['label']}: {ours['status']}  {ours['reason']}"
    parts = []
    for point in points(rows):
        over = f"  {_number(point['speedup'])}× over {point['best_peer']}" if point["speedup"] else ""
        parts.append(f"{_number(point['ours_ms'], 4)} ms{over}  {ours['variant']}".rstrip())
    return f"  {ours['label']}: {'; '.join(parts)}"


def _family_lines(families: dict[str, Row]) -> list[str]:
    lines = []
    width = max(map(len, families), default=0)
    for name, family in families.items():
        text = f"geomean {_number(family['geomean'])}×, {_number(family['lowest'])}–{_number(family['highest'])}×"
        if family["target"] is not None:
            word = "reached" if family["geomean"] >= family["target"] else "missed"
            text += f", target {family['target']:g}× {word}"
        lines.append(f"  {name.ljust(max(width, 20))}  {text} ({family['points']} points)")
    return lines


def summary_text(document: dict[str, Any]) -> str:
    """The summary, one block for each (threads, cache)."""
    lines = []
    for name, part in document["summary"].items():
        lines.append(f"{name} ({part['points']} points)")
        if part["geomean"] is not None:
            worst = part["worst"]
            where = f"{worst['case']}, {worst['threads']}T {worst['cache']}, {worst['best_peer']}"
            losses = f"{part['slower_than_best']} of {part['points']} below 1"
            lines.append(f"  best peer / ours      geomean {_number(part['geomean'])}×, {losses}")
            lines.append(f"                        worst {_number(worst['speedup'])}× ({where})")
        if part.get("targets") and name != "all":
            missed = [f"{p['case']} {_number(p['speedup'])} of {p['target']:g}×" for p in part["missed"]]
            lines.append(
                f"  targets               {part['targets'] - len(missed)} of {part['targets']} reached"
                + f"; missed: {', '.join(missed)}" * bool(missed)
            )
        if part["geomean_over_baseline"] is not None:
            slower = part["slower_than_baseline"]
            note = f"; slower at: {', '.join(slower)}" if slower else "; nowhere slower"
            baseline = document["baseline"]
            lines.append(f"  {baseline} / ours".ljust(24) + f"geomean {_number(part['geomean_over_baseline'])}×{note}")
        if name != "all":
            lines += _family_lines(part.get("families", {}))
        others = ", ".join(f"{peer} {_number(value)}×" for peer, value in part["geomean_over_peer"].items())
        lines.append(f"  each peer / ours      {others}")
    figures = {p["name"]: p["excluded"] for p in document["peers"] if p["excluded"]}
    lines += [f"* {name} is no competitor for “best peer”: {why}" for name, why in figures.items()]
    return "\n".join(lines)
