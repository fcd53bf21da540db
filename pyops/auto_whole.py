"""The whole model for `Auto`: what is done to all of it, and what of the swapped layers stays."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from pyops.edit import Edit, Snapshot
from pyops.fold import fold_batch_norm_
from pyops.ops.sparse_packed import is_channels_last
from pyops.report import UNCHANGED
from pyops.swapping import Swap
from pyops.trace import LAYERS
from pyops.whole import WholeModel, worst_sqnr_db

GAIN = 0.01
"""The share of the model's time that a change of all of it must gain, twice."""
SAME_DB = 60.0
"""Two ways to compute the same in fp32 are at 100 dB and more; in bf16, a layer deep, at some 45."""
SAME_DB_NARROW = 30.0
BAR_STEP_DB, BAR_MOST_DB = 3.0, 150.0
"""By how much at least the layers' SQNR must rise from one choice to the next, and where that ends."""


def fold_where_it_pays(swap: Swap) -> dict[nn.Module, str]:
    """Fold batch normalizations; {layer: what was folded into it}, empty if it was undone or there was nothing."""
    before = Snapshot(swap.model.modules())
    kept = {}  # folding writes into the memory of parameters: it gets memory of its own
    for module in swap.model.modules():
        for p in module._parameters.values() if isinstance(module, LAYERS) else ():
            if p is not None and not p.is_inference():
                kept[p] = p.data
                p.data = p.data.clone()
    names = {found[0]: module for module, found in swap.names.items()}
    folds = [f for f in fold_batch_norm_(swap.model, swap.example_inputs, swap.filter_fn) if f.folded]
    folded = {p for f in folds for p in names[f.layer]._parameters.values()}
    for p, data in kept.items():
        if p not in folded:
            p.data = data
    if not folds:
        before.restore()
        return {}
    what = f"{len(folds)} batch normalization{'s' * (len(folds) > 1)} folded"
    if not _stays(swap, before.changes(), swap.shared["expected"], what, GAIN):
        before.restore()
        return {}
    return {names[f.layer]: f"{f.batch_norm} folded in" for f in folds}


def choose_channels_last(swap: Swap, min_gain: float) -> None:
    """Put the weights of the Conv2d into channels_last if that makes the model faster and nobody sees it."""
    before, expected = Snapshot(swap.model.modules()), _model(swap).outputs()
    takes = swap.filter_fn or (lambda module, name: True)
    for module, found in swap.names.items():
        if isinstance(module, nn.Conv2d) and module not in swap.made and all(takes(module, name) for name in found):
            for p in module._parameters.values():
                if p is not None and p.dim() == 4 and not is_channels_last(p) and not p.is_inference():
                    p.data = p.data.contiguous(memory_format=torch.channels_last)
    edit = before.changes()
    if not edit or not _stays(swap, edit, expected, "channels_last", min_gain):
        before.restore()


def reach_sqnr(swap: Swap, min_sqnr_db: float) -> None:
    """While the model's output is too far off, choose its noisiest layers again, with a higher bar for each."""
    model, expected = _model(swap), swap.shared["expected"]
    if not expected:
        swap.whole.notes.append("the model gives no floating-point tensor: only its layers were compared")
        return
    bar = min_sqnr_db
    while swap.made:
        db = worst_sqnr_db(expected, model.outputs())
        if db >= min_sqnr_db:
            return
        worst = min(swap.rows[module].sqnr_db for module in swap.made)
        lacking = min_sqnr_db - db if math.isfinite(db) else 0.0
        bar = max(bar, worst) + max(BAR_STEP_DB, lacking)
        if not bar < BAR_MOST_DB:
            noisy = list(swap.made)
        else:
            noisy = [module for module in swap.made if swap.rows[module].sqnr_db < bar]
        choices = {module: swap.rows[module].choice for module in noisy}
        swap.forget(noisy)
        swap.dense.restore()
        if bar < BAR_MOST_DB:
            swap.shared["bars"].update(dict.fromkeys(noisy, bar))
            swap.choose(noisy)
        swap.place()
        for module in noisy:
            swap.rows[module].add(f"as {choices[module]} the whole model was at {db:.1f} dB")


def reach_time(swap: Swap) -> None:
    """Put back the layers that do not make the model faster, those that gain least first."""
    model = _model(swap)
    while swap.made:
        edit = swap.dense.changes()
        before_ms, after_ms, pays = _race(model, edit, GAIN)
        if pays:
            break
        groups = defaultdict(list)
        for module in swap.made:
            row = swap.rows[module]
            groups[row.kind, row.choice, row.shape].append(module)
        order = sorted(groups.values(), key=lambda modules: _gain_ms(swap, modules))
        out = [module for modules in order[: (len(order) + 1) // 2] for module in modules]
        choices = {module: swap.rows[module].choice for module in out}
        swap.forget(out)
        swap.place()
        for module in out:
            swap.rows[module].add(
                f"rolled back: as {choices[module]}, with {len(edit.replaced())} layers swapped, the whole model took "
                f"{after_ms:.4g} ms, with none {before_ms:.4g}"
            )


def time_all(swap: Swap) -> None:
    """The whole model as it was and as it is."""
    model, edit, whole = _model(swap), swap.original.changes(), swap.whole
    ms = model.times({"before": edit.undo, "after": edit.redo} if edit else {"before": lambda: None})
    edit.redo()
    whole.ms_before, whole.ms_after = ms["before"], ms.get("after", ms["before"])
    whole.sqnr_db = worst_sqnr_db(swap.shared["expected"], model.outputs())


def _stays(swap: Swap, edit: Edit, expected: list[Tensor], what: str, min_gain: float) -> bool:
    """True if the model gives what is expected with this edit and is faster; says so, or why not, in the notes."""
    model, notes = _model(swap), swap.whole.notes
    try:
        found = model.outputs()
    except Exception as error:  # whatever the model's own code raises, of a view that is none any more, say
        notes.append(f"{what}: not possible: {type(error).__name__}: {error}".split("\n")[0][:160])
        return False
    narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in expected)
    db = worst_sqnr_db(expected, found)
    if db is not None and not db >= (SAME_DB_NARROW if narrow else SAME_DB):
        notes.append(f"{what}: undone, the model gives something else ({db:.1f} dB)")
        return False
    if [t.stride() for t in expected] != [t.stride() for t in found]:
        notes.append(f"{what}: undone, the model's output would have other strides")
        return False
    before_ms, after_ms, pays = _race(model, edit, min_gain)
    times = f"{before_ms:.4g} -> {after_ms:.4g} ms"
    notes.append(f"{what}: {times}" if pays else f"{what}: undone, it does not pay ({times})")
    return pays


def _race(model: WholeModel, edit: Edit, min_gain: float) -> tuple[float, float, bool]:
    """(ms before the edit, ms after it, True if it is faster by `min_gain` twice); the edit is done at the end."""
    for _ in range(2):
        ms = model.times({"before": edit.undo, "after": edit.redo})
        edit.redo()
        if ms["after"] > (1 - min_gain) * ms["before"]:
            return ms["before"], ms["after"], False
    return ms["before"], ms["after"], True


def _gain_ms(swap: Swap, layers: list[nn.Module]) -> float:
    rows = [swap.rows[module] for module in layers]
    return sum(row.ms_before - row.ms_after for row in rows if row.choice != UNCHANGED)


def _model(swap: Swap) -> WholeModel:
    return swap.shared["model"]
