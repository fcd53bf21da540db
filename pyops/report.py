"""What `pyops.swap_` did: one row a layer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pyops.files import write_whole

if TYPE_CHECKING:
    from pyops.edit import Edit

UNCHANGED = "unchanged"
PRUNING = {"sparsity": "sparsity", "pays_from": "pays from", "structure": "structure"}
"""Fields of a row that are printed where a row has them, and the head of their column."""


@dataclasses.dataclass
class Row:
    """One layer: what it was, what became of it and why."""

    name: str
    """Its qualified name in the model; a layer under several names is listed under the first."""
    kind: str
    """Class of the layer before."""
    choice: str
    """What it is now, such as int8_dynamic; "unchanged" if it was left alone, "fewer_channels" if it only lost some."""
    reason: str
    shape: tuple[int, ...] = ()
    """Of the weight: (out_features, in_features)."""
    bytes_before: int = 0
    """Of the weight and bias, with scales."""
    bytes_after: int = 0
    input_shape: tuple[int, ...] | None = None
    """Of the input that was timed."""
    ms_before: float | None = None
    """Of one call, without gradient, the least of several turns, before and after; None without example inputs."""
    ms_after: float | None = None
    sqnr_db: float | None = None
    """10·log10(‖y‖² / ‖y − ŷ‖²) of this layer's output; inf if exact."""
    structure: str | None = None
    """What its zeros look like, in words; this and the next two of pruned layers only."""
    sparsity: float | None = None
    """The fraction of the weight that is pruned."""
    pays_from: float | None = None
    """The sparsity from which on this layer would be faster sparse, an estimate; None if unknown."""

    @property
    def swapped(self) -> bool:
        """True if the layer was replaced."""
        return self.choice != UNCHANGED

    def add(self, reason: str) -> None:
        """Say more in the reason."""
        self.reason = f"{self.reason}; {reason}" if self.reason else reason


@dataclasses.dataclass
class Whole:
    """The whole model: one call of it with the example inputs, in eval mode and without gradients."""

    ms_before: float | None = None
    """The least of several turns, before and after."""
    ms_after: float | None = None
    sqnr_db: float | None = None
    """Of its floating-point outputs, the worst of several; inf if exact."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """In words: what was done to the model as a whole, what was undone again, and what was not tried."""


@dataclasses.dataclass
class Report:
    """The rows of a swap in the order of the model; prints as a table."""

    rows: list[Row]
    whole: Whole | None = None
    """The whole model, where it was looked at."""
    dry_run: bool = False
    """True if the model is as it was."""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Where it was measured; empty where nothing was."""
    edit: Edit | None = dataclasses.field(default=None, repr=False, compare=False)
    """What `revert_` undoes."""

    def revert_(self, model: nn.Module) -> None:
        """Put back what the swap replaced in `model`, in place: layers, parameters, memory formats.

        The layers that come back have the values of the moment of the swap, and the device and the training flag of
        those that go. Hooks and biases, which both shared, are as they are now.

        Raises:
            TypeError if `model` is no module. ValueError if the report does not hold what was replaced, if it was
            reverted already, if `model` is another one, or if a part that the swap changed was changed again since; the
            model is unchanged then.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if self.dry_run:
            raise ValueError("this was a dry run: there is nothing to revert")
        if self.edit is None:
            raise ValueError("the report does not hold what was replaced, or was reverted: swap_(…, revertible=True)")
        if model is not self.edit.root:
            raise ValueError("model is not the one that was swapped")
        changed = self.edit.changed_since()
        if changed:
            raise ValueError(f"the model was changed since the swap: {', '.join(changed[:3])}")
        pairs = self.edit.replaced()
        moved = {old: next(new.parameters(), next(new.buffers(), None)) for old, new in pairs}
        self.edit.undo()
        for old, new in pairs:
            for module in old.modules():
                module.training = new.training
            if moved[old] is not None:
                old.to(moved[old].device)
        self.edit = None

    def to_dict(self) -> dict[str, Any]:
        """Rows and totals in plain types; an exact layer has sqnr_db inf. Fields that no row has are left out."""
        lacking = {name for name in PRUNING if all(getattr(row, name) is None for row in self.rows)}
        rows = [{k: v for k, v in dataclasses.asdict(row).items() if k not in lacking} for row in self.rows]
        found: dict[str, Any] = {"rows": rows, "totals": self.totals()}
        if self.whole is not None:
            found |= {"whole": dataclasses.asdict(self.whole), "machine": dict(self.machine)}
        return found | ({"dry_run": True} if self.dry_run else {})

    def to_json(self, path: str | os.PathLike | None = None, indent: int | None = 2) -> str:
        """`to_dict()` as strict JSON, written to `path` if one is given; numbers that are not finite are strings.

        Raises OSError if the file cannot be written; what was there before is then still there.
        """
        text = json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False)
        if path is not None:
            write_whole(Path(path), text + "\n")
        return text

    def save_html(self, path: str | os.PathLike) -> Path:
        """Write the report as one page that needs nothing else, with bars of time and memory; returns its path.

        Raises OSError if the file cannot be written; what was there before is then still there.
        """
        from pyops.report_html import page

        write_whole(Path(path), page(self))
        return Path(path)

    def totals(self) -> dict[str, Any]:
        """Counts, bytes and, over the swapped layers that were measured, summed times and the worst SQNR."""
        swapped = [row for row in self.rows if row.swapped]
        timed = [row for row in swapped if row.ms_after is not None]
        sqnr = [row.sqnr_db for row in swapped if row.sqnr_db is not None]
        return {
            "layers": len(self.rows),
            "swapped": len(swapped),
            "bytes_before": sum(row.bytes_before for row in self.rows),
            "bytes_after": sum(row.bytes_after for row in self.rows),
            "timed": len(timed),
            "ms_before": sum(row.ms_before for row in timed) if timed else None,
            "ms_after": sum(row.ms_after for row in timed) if timed else None,
            "worst_sqnr_db": min(sqnr, key=lambda v: -math.inf if math.isnan(v) else v) if sqnr else None,
        }

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(["No layer that this config is for.", *self._whole_lines()])
        measured = any(row.ms_after is not None for row in self.rows)
        figures = ["ms before", "ms after", "x", "SQNR dB"] if measured else []
        pruning = {name: head for name, head in PRUNING.items() if any(getattr(r, name) is not None for r in self.rows)}
        head = ["layer", "kind", "weight", "choice", *figures, *pruning.values(), "reason"]
        table = [
            head,
            *([*self._cells(row, measured), *self._pruning_cells(row, pruning), row.reason] for row in self.rows),
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        right = range(4, len(head) - (2 if "structure" in pruning else 1))
        lines = [
            "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(line))
            for line in table
        ]
        rule = "-" * min(max(len(line.rstrip()) for line in lines), 160)
        table = [line.rstrip() for line in (lines[0], rule, *lines[1:], rule)]
        return "\n".join([*table, self._totals_line(), *self._whole_lines()])

    def _whole_lines(self) -> list[str]:
        lines = ["dry run: the model is as it was"] if self.dry_run else []
        if self.whole is None:
            return lines
        before, after, db = self.whole.ms_before, self.whole.ms_after, self.whole.sqnr_db
        parts = [f"{figure(before)} -> {figure(after)} ms ({before / after:.2f}x)"] if before and after else []
        parts += [] if db is None else ["output exact" if db == math.inf else f"SQNR {db:.1f} dB"]
        return [f"whole model: {', '.join(parts) or 'not measured'}", *(f"  {n}" for n in self.whole.notes), *lines]

    def _cells(self, row: Row, measured: bool) -> list[str]:
        cells = [row.name, row.kind, "x".join(map(str, row.shape)), row.choice]
        if measured and row.ms_before is not None and row.ms_after is not None:
            speedup = f"{row.ms_before / row.ms_after:.2f}" if row.ms_after else "-"
            sqnr = "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
            cells += [f"{row.ms_before:.4f}", f"{row.ms_after:.4f}", speedup, sqnr]
        elif measured:
            cells += ["-"] * 4
        return cells

    def _pruning_cells(self, row: Row, columns: Iterable[str]) -> list[str]:
        values = [getattr(row, name) for name in columns]
        return ["-" if v is None else v if isinstance(v, str) else f"{v:.1%}" for v in values]

    def _totals_line(self) -> str:
        t = self.totals()
        parts = [
            f"{t['swapped']} of {t['layers']} layers swapped",
            f"weights {bytes_in_words(t['bytes_before'])} -> {bytes_in_words(t['bytes_after'])}",
        ]
        if t["timed"]:
            speedup = f" ({t['ms_before'] / t['ms_after']:.2f}x)" if t["ms_after"] else ""
            parts.append(f"{t['timed']} timed: {t['ms_before']:.4f} -> {t['ms_after']:.4f} ms{speedup}")
        if t["worst_sqnr_db"] is not None:
            parts.append(f"worst SQNR {t['worst_sqnr_db']:.1f} dB")
        return ", ".join(parts)


def _strict(value: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(content) for content in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def figure(value: float) -> str:
    """A time in four digits, never in powers of ten."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def bytes_in_words(n: float) -> str:
    """Bytes with their unit."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
