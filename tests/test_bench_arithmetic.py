"""What the benchmarks compute from times: ratios, means, roofs, how many layers exceed a cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyops import backend
from pyops.bench import ceilings, report, timing
from pyops.bench.case import Pass


def _row(case: str, peer: str, role: str, ms: float, **facts: object) -> dict:
    common = {"threads": 1, "cache": "warm", "group": "g", "label": case, "counted": True, "status": "ok"}
    return {"case": case, "peer": peer, "role": role, "median_ms": ms, "ours": "us", "baseline": "b"} | common | facts


def test_points_and_summary() -> None:
    rows = [
        _row("a", "us", "ours", 1.0),
        _row("a", "b", "baseline", 8.0),
        _row("a", "p", "peer", 2.0),
        _row("a", "kernel", "figure", 0.5),
        _row("a", "bad", "peer", 0.1, status="wrong"),
        _row("c", "us", "ours", 4.0),
        _row("c", "b", "baseline", 2.0),
        _row("c", "p", "peer", 32.0),
        _row("overhead", "us", "ours", 1.0, counted=False),
        _row("overhead", "b", "baseline", 100.0, counted=False),
    ]
    report.set_ratios(rows)
    assert [row.get("ratio") for row in rows[:5]] == [1.0, 8.0, 2.0, 0.5, None]
    assert [(p["case"], p["best_peer"], p["speedup"]) for p in report.points(rows)] == [
        ("a", "p", 2.0),
        ("c", "b", 0.5),
        ("overhead", "b", 100.0),
    ]
    (part,) = report.summarize(rows).values()
    assert part["points"] == 2
    assert part["geomean"] == pytest.approx(1.0)
    assert part["worst"] == {"case": "c", "threads": 1, "cache": "warm", "best_peer": "b", "speedup": 0.5}
    assert part["geomean_over_baseline"] == pytest.approx(2.0)
    assert part["slower_than_baseline"] == ["c 1T warm"]
    assert (part["targets"], part["missed"]) == (0, [])
    assert part["geomean_over_peer"] == pytest.approx({"b": 2.0, "p": 4.0, "kernel": 0.5})


def test_targets_are_for_more_than_one_thread() -> None:
    rows = [
        *(_row("a", "us", "ours", 1.0, threads=n, target=3.0) for n in (1, 2)),
        *(_row("a", "p", "peer", 2.0, threads=n) for n in (1, 2)),
        _row("c", "us", "ours", 1.0, threads=2, target=1.5),
        _row("c", "p", "peer", 2.0, threads=2),
    ]
    report.set_ratios(rows)
    summary = report.summarize(rows)
    assert (summary["1 thread, warm"]["targets"], summary["2 threads, warm"]["targets"]) == (0, 2)
    assert summary["2 threads, warm"]["missed"] == [
        {"case": "a", "threads": 2, "cache": "warm", "speedup": 2.0, "target": 3.0}
    ]
    peers = [{"name": "p", "excluded": ""}]
    text = report.summary_text({"summary": summary, "peers": peers, "baseline": "b"})
    assert text.count("1 of 2 reached; missed: a 2.00 of 3×") == 1


def test_geomean_and_statistics() -> None:
    assert report.geomean([1.0, 4.0, 16.0]) == pytest.approx(4.0)
    assert report.geomean([]) is None
    stats = report.statistics([float(v) for v in range(101)])
    assert (stats["p20_ms"], stats["median_ms"], stats["p80_ms"], stats["samples"]) == (20, 50, 80, 101)
    assert report.spread([1.0] * 10 + [2.0] * 10) == 2.0


def test_sqnr() -> None:
    oracle = np.ones(100, np.float32)
    assert report.sqnr_db(oracle * 1.1, oracle) == pytest.approx(20, abs=1e-3)
    assert report.sqnr_db(oracle, oracle) == math.inf
    assert report.sqnr_db(oracle * np.nan, oracle) == -math.inf
    assert report.sqnr_db(oracle[:99], oracle) == -math.inf


def test_roof() -> None:
    known = {"int8_gops": 1000.0, "read_gbs": {"1000": 100.0, "1000000": 10.0}}
    assert ceilings.roof_ms(known, "int8_gops", ops=2e9, moved=1e6, working_set=1e6) == (2.0, "compute")
    assert ceilings.roof_ms(known, "int8_gops", ops=0, moved=1e6, working_set=2e6) == (0.1, "memory")
    assert ceilings.roof_ms(known, "int8_gops", ops=0, moved=1e6, working_set=500) == (0.01, "memory")
    assert ceilings.roof_ms({}, "int8_gops", 1, 1, 1) is None


def test_roof_of_passes() -> None:
    """Read-only passes at the bandwidth of reading, others at that of their mixture."""
    known = {"read_gbs": {"1000": 10.0}, "update_gbs": {"1+3": {"1000": 20.0, "1000000": 5.0}}}
    passes = (Pass(1000, 1, 0), Pass(7000, 1, 3))
    assert [part.footprint for part in passes] == [1000, 4000]
    assert ceilings.passes_ms(known, passes) == (pytest.approx(1e-4 + 3.5e-4), "memory")
    assert ceilings.passes_ms(known, (Pass(7e6, 1, 3),)) == (pytest.approx(1.4), "memory")
    assert ceilings.passes_ms(known, (Pass(1000, 1, 2),)) is None
    assert ceilings.passes_ms({}, passes) is None


@pytest.mark.skipif(not hasattr(backend.native, "update_bandwidth_gbs"), reason="without the compiled extension")
def test_update_bandwidth() -> None:
    for reads, updates in ((0, 1), (1, 3), (8, 8)):
        assert backend.native.update_bandwidth_gbs(1 << 20, 2, reads, updates) > 0
    for arguments in ((1 << 20, 0, 1, 1), (1 << 20, 1, 9, 1), (1 << 20, 1, 1, 0), (4096, 1, 1, 3)):
        with pytest.raises(ValueError, match="must be"):
            backend.native.update_bandwidth_gbs(*arguments)


def test_layers_exceed_the_cache() -> None:
    assert timing.layers_for(1 << 20, 32 << 20) == 32
    assert timing.layers_for(1 << 30, 32 << 20) == 2
    assert timing.layers_for(1, 32 << 20) == timing.MAX_LAYERS


def test_cold_samples_go_round() -> None:
    """Every layer is called as often as every other, give or take one."""
    counts = [0, 0, 0]

    def layer(i: int):
        def call() -> None:
            counts[i] += 1

        return call

    samples = timing.samples_ms([layer(0), layer(1), layer(2)], 1.0, torch.device("cpu"))
    assert len(samples) >= 2
    assert max(counts) - min(counts) <= 1
