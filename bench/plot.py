"""The plot of a benchmark, drawn from its JSON: how much faster ours is than the best peer, at every point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pyops.bench.case import CACHE_TITLES
from pyops.bench.report import COMPETING, SCHEMA, geomean

COLOURS = ("#9ecae1", "#2171b5", "#08306b", "#041c40")  # light to dark with the number of threads
LINES = ("#2171b5", "#e08214", "#1b7837", "#762a83", "#666666")
INK, GRID, LOSS, TARGET = "#222222", "#dddddd", "#c0392b", "#e08214"
TICKS = (0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FLOOR = 0.4
"""Bars end here; what is slower still says so by its number."""


def replot(json_path: Path, png_path: Path | None = None) -> Path:
    """Draw `json_path` into `png_path` (default: beside it) and return where. Raises ValueError for another schema."""
    document = json.loads(Path(json_path).read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{json_path} has schema {document.get('schema')!r}, this version draws {SCHEMA!r}")
    target = png_path or Path(json_path).with_suffix(".png")
    draw(document, target)
    return target


def draw(document: dict[str, Any], target: Path) -> None:
    """Curves if the op has families, else bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": "#888888"})
    figure = _curves(document) if document.get("families") else _bars(document)
    competing = (row["peer"] for row in document["rows"] if row["role"] in COMPETING and row["status"] == "ok")
    peers = list(dict.fromkeys(competing))
    best = peers[0] if len(peers) == 1 else "the best peer"
    figure.suptitle(f"{document['title']}: speed over {best}", x=0.01, ha="left", fontsize=13, weight="bold")
    machine = document["machine"]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    note = f"{name} · torch {machine['torch']} · {machine['date'][:10]}" + " · quick run" * document["quick"]
    if len(peers) > 1:
        named = "" if document.get("families") else " It is named at the foot of each bar."
        note += f"\nBest of: {', '.join(peers)}.{named}"
    figure.text(0.01, 0.005, note, fontsize=7.5, color="#666666")
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(target, dpi=160, metadata={"Software": None})
    plt.close(figure)


def _bars(document: dict[str, Any]) -> Any:
    """One panel for each cache state; bars by group and case, one for each thread count, on a log axis; targets too."""
    import matplotlib.pyplot as plt

    shown = [point for point in document["points"] if point["speedup"]]
    caches = list(dict.fromkeys(p["cache"] for p in shown)) or ["warm"]
    ticks = {}  # case → x, with a gap between groups
    x, group = 0.0, None
    for point in shown:
        if point["case"] not in ticks:
            x += 1.0 if point["group"] == group else 1.7
            ticks[point["case"]], group = x, point["group"]
    width = max(8.5, 0.55 * x + 2)
    figure, panels = plt.subplots(len(caches), 1, figsize=(width, 3.0 * len(caches) + 1.3), sharex=True, squeeze=False)
    values = [value for p in shown for value in (p["speedup"], p.get("target")) if value] or [1.0]
    for panel, cache in zip(panels[:, 0], caches, strict=True):
        title = document.get("cache_titles", CACHE_TITLES)[cache]
        _panel(panel, [p for p in shown if p["cache"] == cache], ticks, document["threads"], title, values)
    _groups(panels[-1, 0], shown, ticks)
    return figure


def _curves(document: dict[str, Any]) -> Any:
    """One panel for each thread count and cache state; a curve is the geometric mean of each family along its line.

    The band reaches from the slowest to the fastest case, a short bar is the target, the line at 1 the crossover.
    """
    import matplotlib.pyplot as plt

    found = {name: part["families"] for name, part in document["summary"].items() if name != "all"}
    families = document["families"]
    size = (max(7.0, 5.2 * len(found) + 0.6), 4.6)
    figure, panels = plt.subplots(1, max(len(found), 1), figsize=size, sharey=True, squeeze=False)
    lines = list(dict.fromkeys(family["line"] for family in families.values()))
    values = [f[key] for part in found.values() for f in part.values() for key in ("lowest", "highest", "target")]
    values = [value for value in values if value] or [1.0]
    low, high = min(0.9, min(values) / 1.1), max(1.7, max(values) * 1.15)
    for panel, (title, part) in zip(panels[0], found.items(), strict=False):
        for i, line in enumerate(lines):
            points = sorted((families[name]["at"], f) for name, f in part.items() if families[name]["line"] == line)
            if points:
                _curve(panel, line, i, [at for at, _ in points], [f for _, f in points])
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel(document["family_axis"])
        panel.plot([], [], color="#666666", marker="_", markersize=11, linestyle="", label="target")
        panel.legend(loc="upper left", frameon=False, fontsize=8)
    for panel in panels[0]:
        panel.axhline(1, color=INK, linewidth=0.9, zorder=3)
        panel.grid(color=GRID, linewidth=0.5, zorder=0)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_yscale("log")
        panel.set_ylim(low, high)
        shown_ticks = [tick for tick in TICKS if low <= tick <= high]
        panel.set_yticks(shown_ticks, [f"{tick:g}×" for tick in shown_ticks])
        panel.set_yticks([], minor=True)
    panels[0, 0].set_ylabel("best peer time / pyops time")
    return figure


def _curve(panel, line: str, index: int, at: list[float], part: list[dict]) -> None:
    colour = LINES[index % len(LINES)]
    lowest, mean, highest = ([family[key] for family in part] for key in ("lowest", "geomean", "highest"))
    panel.fill_between(at, lowest, highest, color=colour, alpha=0.12, linewidth=0, zorder=1)
    panel.plot(at, mean, color=colour, marker="o", markersize=4, label=f"{line}: geomean, lowest to highest", zorder=4)
    aims = [(x, family["target"]) for x, family in zip(at, part, strict=True) if family["target"]]
    panel.plot([x for x, _ in aims], [y for _, y in aims], color=colour, marker="_", markersize=11, linestyle="")
    place = {"ha": "right", "xytext": (-3, 4)} if index else {"ha": "left", "xytext": (3, -9)}
    for x, y in zip(at, mean, strict=True):
        style = {"textcoords": "offset points", "fontsize": 7, "color": colour, "weight": "bold", **place}
        panel.annotate(f"{y:.2f}", (x, y), **style)


def _panel(panel, part: list[dict], ticks: dict, threads: list[int], title: str, values: list[float]) -> None:
    bar = 0.8 / len(threads)
    high = max(1.7, max(values) * 1.15)
    room = high**-0.25  # a fifth of the height, for the names below the bars
    low = max(FLOOR / 1.15, min(0.75, room, min(values) / 1.15))
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    shown_ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_yticks(shown_ticks, [f"{tick:g}×" for tick in shown_ticks])
    panel.set_yticks([], minor=True)
    panel.set_xlim(min(ticks.values(), default=0) - 0.8, max(ticks.values(), default=1) + 0.8)
    panel.tick_params(axis="x", length=0)
    for i, count in enumerate(threads):
        chosen = [p for p in part if p["threads"] == count]
        at = np.array([ticks[p["case"]] + (i - (len(threads) - 1) / 2) * bar for p in chosen])
        speed = np.maximum([p["speedup"] for p in chosen], FLOOR)
        counted = [p["speedup"] for p in chosen if p["counted"]]
        mean = f", geomean {geomean(counted):.2f}×" if counted else ""
        label = f"{count} thread{'s' * (count > 1)}{mean}"
        colour = COLOURS[min(i + (len(threads) == 1), len(COLOURS) - 1)]
        panel.bar(at, speed - 1, bar * 0.92, bottom=1, color=colour, label=label, zorder=2)
        aims = [(x, p["target"]) for x, p in zip(at, chosen, strict=True) if p.get("target")]
        if aims:
            x, y = map(np.array, zip(*aims, strict=True))
            known = panel.get_legend_handles_labels()[1]
            label = None if "target" in known else "target"
            panel.hlines(y, x - bar / 2, x + bar / 2, color=TARGET, linewidth=1.6, label=label, zorder=4)
        for where, top, point in zip(at, speed, chosen, strict=True):
            value, up = point["speedup"], point["speedup"] >= 1
            panel.annotate(
                f"{value:.2f}" if value >= FLOOR else f"{value:.2f} ↓",
                (where, top),
                (0, 2 if up else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                fontsize=6.5,
                color=INK if up else LOSS,
            )
            panel.annotate(
                point["best_peer"],
                (where, 1),
                (0, -3 if up else 3),
                textcoords="offset points",
                ha="center",
                va="top" if up else "bottom",
                rotation=90,
                fontsize=6,
                color="#666666",
            )
    panel.axhline(1, color=INK, linewidth=0.9, zorder=3)
    panel.grid(axis="y", color=GRID, linewidth=0.5, zorder=0)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylabel("best peer time / pyops time")
    panel.set_title(title, loc="left", fontsize=10)
    panel.legend(loc="upper right", ncols=len(threads) + 1, frameon=False, fontsize=8, bbox_to_anchor=(1, 1.14))


def _groups(panel, shown: list[dict], ticks: dict) -> None:
    """Case labels under the bars, group names under those."""
    labels = {p["case"]: p["label"] for p in shown}
    panel.set_xticks(list(ticks.values()), [labels[case] for case in ticks], fontsize=8)
    groups: dict[str, list[float]] = {}
    for point in shown:
        groups.setdefault(point["group"], []).append(ticks[point["case"]])
    for name, at in groups.items():
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        panel.annotate(name, ((min(at) + max(at)) / 2, 0), (0, -18), ha="center", va="top", weight="bold", **place)
