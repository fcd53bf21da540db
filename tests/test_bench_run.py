"""The benchmark runner on an op of its own: that it checks, chooses and reports rightly. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_cases import rows_of

from pyops.bench import report
from pyops.bench.run import main

TINY = '''
"""An op that doubles its input, with peers that are right, slow, wrong, broken and missing."""
import time
import torch
from pyops.bench.case import Case, Op
from pyops.bench.peers import Instance, Peer

OP = Op(
    name="tiny",
    title="doubling",
    cases=tuple(
        Case(f"n{n}", "vectors", f"n={n}", {"n": n}, ops=n, bytes=8 * n, source="a test", cold=n > 8) for n in (8, 64)
    ),
    make_inputs=lambda case, device: {"x": torch.arange(1, case.dims["n"] + 1, dtype=torch.float32)},
    oracle=lambda inputs: inputs["x"] * 2,
    reference=lambda inputs: inputs["x"] * 2,
    min_sqnr_db=30.0,
    max_error_eps=2.0,
    baseline="slow",
    peak="fp32_gflops",
)


class Ours(Peer):
    name, role, runs, factor, delay = "pyops", "ours", "x · factor", 2.0, 0.0

    def weight_bytes(self, inputs):
        return inputs["x"].nbytes

    def variants(self, inputs):
        def call():
            time.sleep(self.delay)
            return inputs["x"] * self.factor

        return {"": lambda: Instance(call)}


class Slow(Ours):
    name, role, delay = "slow", "baseline", 0.002


class Wrong(Ours):
    name, role, factor = "wrong", "peer", 2.2


class Broken(Ours):
    name, role = "broken", "peer"

    def variants(self, inputs):
        raise RuntimeError("no such kernel")


class Dead(Ours):
    name, role = "dead", "peer"

    def variants(self, inputs):
        import os

        os._exit(3)


class Missing(Ours):
    name, role, module, package = "missing", "peer", "no_such_module", "no-such-package"


class Figure(Ours):
    name, role, excluded = "figure", "figure", "it only looks fast"


class Choosy(Ours):
    name, role = "choosy", "peer"

    def variants(self, inputs):
        def slow():
            time.sleep(0.01)
            return inputs["x"] * 2

        def fast():
            time.sleep(0.003)
            return inputs["x"] * 2

        return {"slow one": lambda: Instance(slow), "fast one": lambda: Instance(fast)}


PEERS = [Ours, Slow, Wrong, Broken, Dead, Missing, Figure, Choosy]
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the op `tiny`."""
    path = tmp_path_factory.mktemp("bench") / "tiny.py"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def document(tiny: Path) -> dict:
    """The JSON of one run of `tiny`."""
    target = tiny.with_suffix(".json")
    assert main([str(tiny), "--quick", "--threads", "1", "--skip-ceilings", "--json", str(target)]) == 0
    return json.loads(target.read_text(encoding="utf-8"))


def test_json_has_its_schema(document: dict, tiny: Path) -> None:
    assert document["schema"] == report.SCHEMA
    assert (document["op"], document["baseline"], document["threads"], document["quick"]) == ("tiny", "slow", [1], True)
    assert {"cpu", "isa_flags", "cores", "os", "python", "torch", "pyops", "date", "native"} <= set(document["machine"])
    assert {p["name"]: p["version"] for p in document["peers"]}["slow"] == torch.__version__
    (warm,) = [row for row in rows_of(document, "pyops") if row["case"] == "n8"]
    assert warm["status"] == "ok"
    assert (warm["cache"], warm["dims"], warm["ratio"], warm["sqnr_db"]) == ("warm", {"n": 8}, 1.0, None)
    assert 0 < warm["p20_ms"] <= warm["median_ms"] <= warm["p80_ms"]
    assert warm["samples"] >= 4
    assert {row["cache"] for row in rows_of(document, "pyops") if row["case"] == "n64"} == {"warm", "cold"}
    assert tiny.with_suffix(".png").stat().st_size > 10_000


def test_wrong_peer_has_no_time(document: dict) -> None:
    assert len(rows_of(document, "wrong")) == 2  # one for each case
    for row in rows_of(document, "wrong"):
        assert row["status"] == "wrong"
        assert "SQNR 20.0 dB" in row["reason"]
        assert "median_ms" not in row
    assert all("wrong" not in part["geomean_over_peer"] for part in document["summary"].values())


def test_peers_without_a_result_say_why(document: dict) -> None:
    assert {(r["status"], r["reason"]) for r in rows_of(document, "broken")} == {
        ("error", "RuntimeError: no such kernel")
    }
    assert {(r["status"], r["reason"]) for r in rows_of(document, "missing")} == {
        ("missing", "not installed: pip install no-such-package")
    }
    dead = rows_of(document, "dead")  # started again for the second case
    assert [(r["status"], "the worker died (3)" in r["reason"]) for r in dead] == [("error", True)] * 2


def test_best_peer_is_the_fastest_that_competes(document: dict) -> None:
    """The figure is fastest, the wrong peer would be: neither competes."""
    assert {point["best_peer"] for point in document["points"]} == {"slow"}
    for point in document["points"]:
        assert point["speedup"] == point["over_baseline"] == pytest.approx(point["best_peer_ms"] / point["ours_ms"])
        assert point["speedup"] > 1
    assert rows_of(document, "figure")[0]["status"] == "ok"


def test_fastest_variant_is_timed(document: dict) -> None:
    assert {row["variant"] for row in rows_of(document, "choosy")} == {"fast one"}


def test_ours_must_agree_to_the_last_bits(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An SQNR of 100 dB is enough for a peer, not for ours."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY.replace('"x · factor", 2.0', '"x · factor", 2.00002'), encoding="utf-8")
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "n8", "--against", "slow"]
    assert main([str(path), *options, "--json", str(tmp_path / "tiny.json")]) == 1
    document = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    (row,) = rows_of(document, "pyops")
    assert row["status"] == "wrong"
    assert "differs from the reference" in row["reason"]
    assert row["reason"] in capsys.readouterr().out
    assert document["points"] == []


def test_a_reference_may_have_a_bound_in_db(tiny: Path, tmp_path: Path) -> None:
    """Ours is 20 dB from it: enough for one bound, not for the other; the difference is in the row."""
    text = TINY.replace('"x · factor", 2.0', '"x · factor", 2.2').replace("min_sqnr_db=30.0", "min_sqnr_db=5.0")
    for least, status in ((15.0, "ok"), (25.0, "wrong")):
        path = tmp_path / f"tiny{least:.0f}.py"
        path.write_text(text.replace("cold=n > 8)", f"cold=n > 8, reference_min_sqnr_db={least})"), encoding="utf-8")
        options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "n8", "--against", "slow"]
        assert main([str(path), *options, "--json", str(path.with_suffix(".json"))]) == (status == "wrong")
        (row,) = rows_of(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), "pyops")
        assert row["status"] == status
        assert row["reference_sqnr_db"] == pytest.approx(20, abs=1e-3)
    assert row["reason"] == "SQNR 20.0 dB against the reference, at least 25 dB is right"


def test_replot(document: dict, tiny: Path, tmp_path: Path) -> None:
    assert main(["--replot", str(tiny.with_suffix(".json")), "--plot", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (tmp_path / "old.json").write_text(json.dumps(document | {"schema": "pyops-bench/0"}), encoding="utf-8")
    assert main(["--replot", str(tmp_path / "old.json")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "no op 'no_such_op'; there are:"),
        (["no_such_file.py"], "there is no file no_such_file.py"),
        (["int8_linear", "--against", "nobody"], "no peer 'nobody'; there are: pyops"),
        (["int8_linear", "--threads", "0"], "--threads must be positive numbers"),
        (["int8_linear", "--threads", "1,two"], "--threads must be positive numbers"),
        (["int8_linear", "--cases", "7x7*"], "--cases '7x7*' matches no case of int8_linear"),
        (["int8_linear", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["--replot", "no_such.json"], "no_such.json"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert main(["int8_linear", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_list(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "4096x4096/M1" in text
    assert "onnxruntime" in text
