"""The benchmark runner on cases that share their peers, and on families of cases."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from bench_cases import rows_of

from pyops.bench import report
from pyops.bench.run import main

SHARED = '''
"""An op whose cases differ only for ours: it is faster the larger n is. Every turn goes into a log."""
import time
from pathlib import Path
import torch
from pyops.bench.case import Case, Family, Op
from pyops.bench.peers import Instance, Peer

LOG = Path(__file__).with_suffix(".log")
OP = Op(
    name="shared",
    title="waiting",
    cases=tuple(
        Case(
            f"{group}/{n}", group, f"n={n}", {"n": n}, ops=1, bytes=8, source="a test", cold=False, family=f"n {n}",
            shared=group, default=group != "c", devices=("cpu",) if group != "cuda" else ("cuda",), counted=n != 9,
        )
        for group in ("a", "b", "c", "cuda") for n in (1, 2, 4)
    ),
    make_inputs=lambda case, device: {"case": case, "x": torch.full((4,), float(case.dims["n"]))},
    oracle=lambda inputs: inputs["x"],
    reference=lambda inputs: None,
    min_sqnr_db=30.0,
    baseline="dense",
    peak=None,
    families={f"n {n}": Family("all", n, target=0.1 if n < 4 else 1000.0) for n in (1, 2, 4)},
    family_axis="n",
)


class Ours(Peer):
    name, role, runs = "pyops", "ours", "waits for 4 ms / n"

    def variants(self, inputs):
        case = inputs["case"]
        if case.name == "b/2":
            raise RuntimeError("no such n")

        def call():
            with LOG.open("a") as file:
                file.write(f"{self.name} {case.name}\\n")
            time.sleep(0.004 / case.dims["n"] if self.role == "ours" else 0.004)
            return inputs["x"]

        return {"": lambda: Instance(call)}


class Dense(Ours):
    name, role = "dense", "baseline"


PEERS = [Ours, Dense]
'''


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str], Path]:
    """Of one run of `shared`: the JSON, the calls in their order, where the JSON is."""
    path = tmp_path_factory.mktemp("shared") / "shared.py"
    path.write_text(SHARED, encoding="utf-8")
    target = path.with_suffix(".json")
    assert main([str(path), "--quick", "--threads", "1", "--skip-ceilings", "--json", str(target)]) == 1
    return json.loads(target.read_text(encoding="utf-8")), path.with_suffix(".log").read_text().split("\n"), target


def test_shared_peers_are_timed_once(together: tuple[dict, list[str], Path]) -> None:
    """In the first of the cases, in turns with ours in each of them; their rows are in all."""
    document, calls, _ = together
    assert {call for call in calls if call.startswith("dense")} == {"dense a/1", "dense b/1"}
    turns = [call for call, _ in itertools.groupby(calls)]
    rounds = zip(turns, turns[1:], turns[2:], strict=False)
    assert list(rounds).count(("pyops b/1", "pyops b/4", "dense b/1")) >= 2
    dense = {row["case"]: row for row in rows_of(document, "dense")}
    assert list(dense) == ["a/1", "a/2", "a/4", "b/1", "b/2", "b/4"]
    assert len({dense[name]["median_ms"] for name in ("a/1", "a/2", "a/4")}) == 1
    assert (dense["a/4"]["timed_in"], dense["a/4"]["dims"], "timed_in" in dense["a/1"]) == ("a/1", {"n": 4}, False)
    for point in document["points"]:
        assert point["best_peer_ms"] == dense[point["case"]]["median_ms"]


def test_a_broken_case_leaves_the_others(together: tuple[dict, list[str], Path]) -> None:
    document, _, _ = together
    assert {row["case"]: row["status"] for row in rows_of(document, "pyops") if row["status"] != "ok"} == {
        "b/2": "error"
    }
    assert [point["case"] for point in document["points"]] == ["a/1", "a/2", "a/4", "b/1", "b/4"]


def test_families_have_geometric_means(together: tuple[dict, list[str], Path], tmp_path: Path) -> None:
    document, _, path = together
    (part,) = document["summary"].values()
    speedups = {point["case"]: point["speedup"] for point in document["points"]}
    assert {name: family["points"] for name, family in part["families"].items()} == {"n 1": 2, "n 2": 1, "n 4": 2}
    family = part["families"]["n 4"]
    assert family["geomean"] == pytest.approx(math.sqrt(speedups["a/4"] * speedups["b/4"]))
    assert (family["lowest"], family["highest"]) == tuple(sorted([speedups["a/4"], speedups["b/4"]]))
    text = report.summary_text(document)
    assert text.count("target 0.1× reached") == 2
    assert text.count("target 1000× missed (2 points)") == 1
    assert main(["--replot", str(path), "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_default_cases_are_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "shared.py"
    path.write_text(SHARED, encoding="utf-8")
    common = [str(path), "--quick", "--threads", "1", "--skip-ceilings", "--json", str(tmp_path / "shared.json")]

    def cases(*options: str) -> list[str]:
        assert main([*common, *options]) == 0
        return [row["case"] for row in rows_of(json.loads((tmp_path / "shared.json").read_text()), "dense")]

    assert cases("--cases", "c/[12]") == ["c/1", "c/2"]
    assert cases("--cases", "*/4", "--full") == ["a/4", "b/4", "c/4"]
    assert main([*common, "--cases", "cuda/*"]) == 2
