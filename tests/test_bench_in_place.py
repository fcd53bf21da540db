"""The benchmark runner on an op in place: its inputs are restored, and a peer competes where it has something."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bench_cases import rows_of

from pyops.bench import timing
from pyops.bench.run import main

COUNTER = '''
"""An op in place: x loses g, which is used up. Peers that do so, forget to, or do it by halves."""
import time
import torch
from pyops.bench.case import Case, Op, Pass
from pyops.bench.peers import Instance, Peer

OP = Op(
    name="counter",
    title="counting",
    cases=tuple(
        Case(
            name, "all", name, {"n": 64}, ops=64, bytes=64 * 12, source="a test", cold=False, target=1.5,
            passes=(Pass(64 * 4, 1, 0), Pass(64 * 8, 0, 1)), against=against, ours_min_sqnr_db=100.0,
        )
        for name, against in (("open", None), ("closed", ("half",)))
    ),
    make_inputs=lambda case, device: {"x": torch.zeros(64), "g": torch.ones(64)},
    oracle=lambda inputs: torch.full((64,), -3.0),
    min_sqnr_db=5.0,
    baseline="half",
    peak=None,
    inference=False,
    checks="the count\'s SQNR",
    ops_unit="Gcount/s",
    cache_titles={"warm": "in place"},
)


class Ours(Peer):
    name, role, runs, share, delay, restores = "pyops", "ours", "x -= g", 1.0, 0.0, True

    def variants(self, inputs):
        x, g = inputs["x"], inputs["g"]

        def prepare():
            if self.restores:
                g.fill_(1)

        def call():
            assert g[0] == 1, "g was not restored"
            time.sleep(self.delay)
            x.sub_(g * self.share)
            g.zero_()

        def check():
            for _ in range(3):
                prepare()
                call()
            return x.clone()

        return {"": lambda: Instance(call, check=check, prepare=prepare, note=lambda: f"{x[0]:.1f} at first")}


class Half(Ours):
    name, role, share, delay = "half", "baseline", 0.5, 0.004


class Fast(Ours):
    name, role, delay = "fast", "peer", 0.002


class Forgetful(Ours):
    name, role, restores = "forgetful", "peer", False


class OpenOnly(Ours):
    name, role, delay = "open-only", "peer", 0.003

    @classmethod
    def covers(cls, case):
        return case.name == "open"


PEERS = [Ours, Half, Fast, Forgetful, OpenOnly]
'''


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The JSON and the path of one run of `counter`, with ceilings; its `half` has an SQNR of 6 dB."""
    folder = tmp_path_factory.mktemp("counter")
    (folder / "counter.py").write_text(COUNTER, encoding="utf-8")
    target = folder / "counter.json"
    assert main([str(folder / "counter.py"), "--quick", "--threads", "2", "--json", str(target)]) == 0
    return json.loads(target.read_text(encoding="utf-8")), str(target)


def test_steps_in_place_are_checked_and_restored(counted: tuple[dict, str]) -> None:
    document, _ = counted
    for row in rows_of(document, "pyops"):
        assert (row["status"], row["cache"], row["note"], row["sqnr_db"]) == ("ok", "warm", "-3.0 at first", None)
        assert row["target"] == 1.5
        assert row["limit"] == "memory"
        assert row["fraction"] > 0
    assert {row["reason"] for row in rows_of(document, "forgetful")} == {"AssertionError: g was not restored"}
    assert [row["sqnr_db"] for row in rows_of(document, "half")] == [pytest.approx(20 * math.log10(2))] * 2


def test_cases_choose_their_peers(counted: tuple[dict, str]) -> None:
    """A peer that has nothing for a case is not in it; one that does not count there is only shown."""
    document, path = counted
    assert [row["case"] for row in rows_of(document, "open-only")] == ["open"]
    assert [row["role"] for row in rows_of(document, "fast")] == ["peer", "figure"]
    assert [(p["case"], p["best_peer"], p["target"]) for p in document["points"]] == [
        ("open", "fast", 1.5),
        ("closed", "half", 1.5),
    ]
    assert (document["ops_unit"], document["cache_titles"]) == ("Gcount/s", {"warm": "in place"})
    assert main(["--replot", path]) == 0


def test_ours_has_a_bound_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "counter.py"
    path.write_text(COUNTER.replace('"x -= g", 1.0', '"x -= g", 0.9'), encoding="utf-8")
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "open", "--against", "half"]
    assert main([str(path), *options, "--json", str(tmp_path / "counter.json")]) == 1
    assert "the count's SQNR 20.0 dB, at least 100 dB is right" in capsys.readouterr().out


def test_prepare_comes_before_every_call() -> None:
    log: list[str] = []
    samples = timing.samples_ms([lambda: log.append("call")], 0.2, torch.device("cpu"), [lambda: log.append("prepare")])
    assert len(samples) >= 2
    assert log == ["prepare", "call"] * (len(log) // 2)
    with pytest.raises(ValueError, match="CUDA graph"):
        timing.samples_ms([print], 1.0, torch.device("cuda"), [print])
