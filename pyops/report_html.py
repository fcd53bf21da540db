"""A report as one page that needs nothing else: no network, no fonts; JavaScript only sorts it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyops.report import UNCHANGED, bytes_in_words, figure

if TYPE_CHECKING:
    from pyops.report import Report, Row

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FAMILIES = ("int8", "int4", "fp8", "sparse", "qat")
"""What a choice may begin with; each has its colour in the template."""


def page(report: Report) -> str:
    """The HTML."""
    import jinja2  # comes with torch; takes a while to import

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    most_ms = max((ms for row in report.rows for ms in (row.ms_before, row.ms_after) if ms is not None), default=0.0)
    most_bytes = max((max(row.bytes_before, row.bytes_after) for row in report.rows), default=0)
    rows = [_row(i, row, most_ms, most_bytes) for i, row in enumerate(report.rows)]
    return template.render(
        rows=rows,
        cards=_cards(report),
        notes=report.whole.notes if report.whole else [],
        machine=report.machine,
        dry_run=report.dry_run,
        families=list(dict.fromkeys(row["family"] for row in rows)),
        measured=any(row.ms_after is not None for row in report.rows),
        pruned=any(row.sparsity is not None for row in report.rows),
    )


def _row(number: int, row: Row, most_ms: float, most_bytes: int) -> dict[str, Any]:
    return {
        "number": number,
        "row": row,
        "shape": "×".join(map(str, row.shape)),
        "input_shape": "" if row.input_shape is None else "×".join(map(str, row.input_shape)),
        "family": family_of(row.choice),
        "ms": [_bar("before", row.ms_before, most_ms, _ms), _bar("after", row.ms_after, most_ms, _ms)],
        "bytes": [
            _bar("before", row.bytes_before, most_bytes, bytes_in_words),
            _bar("after", row.bytes_after, most_bytes, bytes_in_words),
        ],
        "speed": "" if not row.ms_after or row.ms_before is None else f"{row.ms_before / row.ms_after:.2f}×",
        "sqnr": "" if row.sqnr_db is None else _sqnr(row.sqnr_db),
        "sparsity": "" if row.sparsity is None else f"{row.sparsity:.0%}",
        "keys": {
            "ms": row.ms_before or 0.0,
            "bytes": row.bytes_before,
            "sqnr": row.sqnr_db if row.sqnr_db is not None and math.isfinite(row.sqnr_db) else 1e9,
        },
    }


def family_of(choice: str) -> str:
    """The family of a choice, "unchanged" or "other"."""
    if choice == UNCHANGED:
        return choice
    return next((family for family in FAMILIES if choice.startswith(family)), "other")


def _bar(name: str, value: float | None, most: float, words: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"name": name, "percent": 100 * value / most if most else 0.0, "text": words(value)}


def _cards(report: Report) -> list[tuple[str, str, str]]:
    """(what, the figure, what is behind it)."""
    totals, whole = report.totals(), report.whole
    cards = []
    if whole is not None and whole.ms_before and whole.ms_after:
        times = f"{_ms(whole.ms_before)} → {_ms(whole.ms_after)}"
        cards.append(("Whole model", f"{whole.ms_before / whole.ms_after:.2f}×", times))
    elif totals["ms_after"]:
        times = f"{_ms(totals['ms_before'])} → {_ms(totals['ms_after'])}"
        cards.append(("Swapped layers", f"{totals['ms_before'] / totals['ms_after']:.2f}×", times))
    before, after = totals["bytes_before"], totals["bytes_after"]
    words = f"{bytes_in_words(before)} → {bytes_in_words(after)}"
    cards.append(("Weights", f"{before / after:.2f}× smaller" if after and after < before else "as before", words))
    sqnr = whole.sqnr_db if whole is not None else totals["worst_sqnr_db"]
    if sqnr is not None:
        cards.append(("Output SQNR", _sqnr(sqnr), "of the whole model" if whole is not None else "of the worst layer"))
    cards.append(("Layers", f"{totals['swapped']} of {totals['layers']}", "swapped"))
    return cards


def _ms(ms: float) -> str:
    return f"{figure(ms)} ms" if ms >= 0.1 else f"{figure(1e3 * ms)} µs"


def _sqnr(db: float) -> str:
    return "exact" if db == math.inf else f"{db:.1f} dB"
