"""The benchmark runner: that it checks, counts and reports rightly. No test here asserts a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pyops import backend
from pyops.bench import (
    ceilings,
    optim,
    optim_peers,
    optim_shapes,
    report,
    sparse_conv2d,
    sparse_conv2d_peers,
    sparse_resnet50_peers,
    timing,
)
from pyops.bench.case import Pass, load, op_names
from pyops.bench.peers import Peer, select
from pyops.bench.run import main
from pyops.ops.sparse_packed import packs

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


def _rows(document: dict, peer: str) -> list[dict]:
    return [row for row in document["rows"] if row["peer"] == peer]


def test_json_has_its_schema(document: dict, tiny: Path) -> None:
    assert document["schema"] == report.SCHEMA
    assert (document["op"], document["baseline"], document["threads"], document["quick"]) == ("tiny", "slow", [1], True)
    assert {"cpu", "isa_flags", "cores", "os", "python", "torch", "pyops", "date", "native"} <= set(document["machine"])
    assert {p["name"]: p["version"] for p in document["peers"]}["slow"] == torch.__version__
    (warm,) = [row for row in _rows(document, "pyops") if row["case"] == "n8"]
    assert warm["status"] == "ok"
    assert (warm["cache"], warm["dims"], warm["ratio"], warm["sqnr_db"]) == ("warm", {"n": 8}, 1.0, None)
    assert 0 < warm["p20_ms"] <= warm["median_ms"] <= warm["p80_ms"]
    assert warm["samples"] >= 4
    assert {row["cache"] for row in _rows(document, "pyops") if row["case"] == "n64"} == {"warm", "cold"}
    assert tiny.with_suffix(".png").stat().st_size > 10_000


def test_wrong_peer_has_no_time(document: dict) -> None:
    assert len(_rows(document, "wrong")) == 2  # one for each case
    for row in _rows(document, "wrong"):
        assert row["status"] == "wrong"
        assert "SQNR 20.0 dB" in row["reason"]
        assert "median_ms" not in row
    assert all("wrong" not in part["geomean_over_peer"] for part in document["summary"].values())


def test_peers_without_a_result_say_why(document: dict) -> None:
    assert {(r["status"], r["reason"]) for r in _rows(document, "broken")} == {
        ("error", "RuntimeError: no such kernel")
    }
    assert {(r["status"], r["reason"]) for r in _rows(document, "missing")} == {
        ("missing", "not installed: pip install no-such-package")
    }
    dead = _rows(document, "dead")  # started again for the second case
    assert [(r["status"], "the worker died (3)" in r["reason"]) for r in dead] == [("error", True)] * 2


def test_best_peer_is_the_fastest_that_competes(document: dict) -> None:
    """The figure is fastest, the wrong peer would be: neither competes."""
    assert {point["best_peer"] for point in document["points"]} == {"slow"}
    for point in document["points"]:
        assert point["speedup"] == point["over_baseline"] == pytest.approx(point["best_peer_ms"] / point["ours_ms"])
        assert point["speedup"] > 1
    assert _rows(document, "figure")[0]["status"] == "ok"


def test_fastest_variant_is_timed(document: dict) -> None:
    assert {row["variant"] for row in _rows(document, "choosy")} == {"fast one"}


def test_ours_must_agree_to_the_last_bits(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An SQNR of 100 dB is enough for a peer, not for ours."""
    path = tmp_path / "tiny.py"
    path.write_text(TINY.replace('"x · factor", 2.0', '"x · factor", 2.00002'), encoding="utf-8")
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "n8", "--against", "slow"]
    assert main([str(path), *options, "--json", str(tmp_path / "tiny.json")]) == 1
    document = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    (row,) = _rows(document, "pyops")
    assert row["status"] == "wrong"
    assert "differs from the reference" in row["reason"]
    assert row["reason"] in capsys.readouterr().out
    assert document["points"] == []


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


RESULTS = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json"))


@pytest.mark.skipif(not RESULTS, reason="no results in this checkout")
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_drawn(path: Path, tmp_path: Path) -> None:
    assert main(["--replot", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_every_op_is_well_formed() -> None:
    """Case names are unique, what a case or op names exists, and inputs, oracle and reference fit together."""
    for name in op_names():
        op, module = load(name)
        names = [case.name for case in op.cases]
        assert op.name == name
        assert len(set(names)) == len(names)
        peers = {peer.name for peer in module.PEERS}
        assert {op.baseline, *(case.ours for case in op.cases)} <= peers
        assert len(peers) == len(module.PEERS)
        for peer in module.PEERS:
            assert peer.runs
            assert bool(peer.excluded) == (peer.role == "figure")
        for case in op.cases:
            covering = [peer for peer in module.PEERS if peer.covers(case)]
            assert case.ours in {peer.name for peer in covering}
            assert any(peer.role in report.COMPETING for peer in covering)
            assert set(case.against or ()) <= {peer.name for peer in covering}
            assert not case.passes or case.bytes == pytest.approx(sum(part.bytes for part in case.passes))
            assert op.reference or case.ours_min_sqnr_db
            assert set(op.cache_titles) >= ({"warm", "cold"} if case.cold else {"warm"})
            assert case.family is None or case.family in op.families
        if all(peer.missing("cpu") for peer in module.PEERS):
            continue  # what makes the inputs may be missing too
        smallest = min(op.cases, key=lambda case: case.ops)
        inputs = op.make_inputs(smallest, torch.device("cpu"))
        exact = op.oracle(inputs).numpy()
        assert np.isfinite(exact).all()
        assert np.abs(exact).max() > 0
        if op.reference:
            assert report.sqnr_db(op.reference(inputs).numpy(), exact) >= op.min_sqnr_db


def test_select_takes_prefixes() -> None:
    _, module = load("int8_linear")
    names = [peer.name for peer in select(module.PEERS, ["torch", "onnxruntime"])]
    assert names == ["pyops", "pyops-module", "torch-fp32", "torch-bf16", "torch-fp16", "onnxruntime", "torch-int_mm"]


# ---------------------------------------------------------------------------------------------------- steps in place

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
    for row in _rows(document, "pyops"):
        assert (row["status"], row["cache"], row["note"], row["sqnr_db"]) == ("ok", "warm", "-3.0 at first", None)
        assert row["target"] == 1.5
        assert row["limit"] == "memory"
        assert row["fraction"] > 0
    assert {row["reason"] for row in _rows(document, "forgetful")} == {"AssertionError: g was not restored"}
    assert [row["sqnr_db"] for row in _rows(document, "half")] == [pytest.approx(20 * math.log10(2))] * 2


def test_cases_choose_their_peers(counted: tuple[dict, str]) -> None:
    """A peer that has nothing for a case is not in it; one that does not count there is only shown."""
    document, path = counted
    assert [row["case"] for row in _rows(document, "open-only")] == ["open"]
    assert [row["role"] for row in _rows(document, "fast")] == ["peer", "figure"]
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


# ---------------------------------------------------------------------------------------------------------- optimizers

SMALL_SHAPES = ((33, 65), (2, 3, 5), (1,), (300,), (96, 64))
KINDS = {(case.rule, case.dtype, case.state_dtype, case.loop): case for case in reversed(optim.CASES)}
"""One case of each kind, by what it does."""
# torchao compiles for seconds.
PAIRS = [(c, p) for c in KINDS.values() for p in optim_peers.PEERS if p.covers(c) and p.name != "torchao"]


def _small(case: optim.OptimCase) -> optim.OptimCase:
    dims = {"parameters": optim_shapes.parameters(SMALL_SHAPES)}
    return dataclasses.replace(case, shapes=SMALL_SHAPES, dims=dims)


def _result(case: optim.OptimCase, peer: type[Peer]) -> tuple[np.ndarray, np.ndarray]:
    """(what the peer computes, what is right)."""
    instance = peer(torch.device("cpu"), 1).variants(optim.make_inputs(case, torch.device("cpu")))[""]()
    right = optim.oracle(optim.make_inputs(case, torch.device("cpu")))
    return instance.check().float().numpy(), right.float().numpy()


@pytest.mark.parametrize(("case", "peer"), PAIRS, ids=lambda value: value.name)
def test_optimizers_are_right(case: optim.OptimCase, peer: type[Peer]) -> None:
    case = _small(case)
    result, right = _result(case, peer)
    least = case.ours_min_sqnr_db if peer.role == "ours" else case.min_sqnr_db or optim.OP.min_sqnr_db
    assert report.sqnr_db(result, right) >= least


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyper-parameters that are a little off, gradients neither unscaled nor clipped, an average that is none."""
    case = _small(KINDS["adamw", torch.float32, "float32", True])
    exact, right = _result(case, optim_peers.TorchLoop)
    assert report.sqnr_db(exact, right) > 100
    n = len(right) // 3
    assert not right[2 * n :].any()  # the gradients

    def noise_db() -> float:
        inexact, _ = _result(case, optim_peers.TorchLoop)
        monkeypatch.undo()
        return report.sqnr_db(inexact, right)

    for wrong in ({"lr": 1.01e-3}, {"betas": (0.9, 0.998)}, {"weight_decay": 0.1}):
        monkeypatch.setitem(optim.HYPER, "adamw", optim.HYPER["adamw"] | wrong)
        assert noise_db() < 80
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, norm: None)
    assert noise_db() < 80
    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", lambda grads, found, inverse: None)
    assert noise_db() < 80
    exact[n : 2 * n] = exact[:n]
    assert report.sqnr_db(exact, right) < 80


def test_optimizer_cases_hold_what_they_say() -> None:
    by_name = {case.name: case for case in optim.CASES}
    for name, tensors, count in (
        ("large/adamw", 8, 8 * 2048**2),
        ("resnet50", 161, 25_557_032),
        ("bert6", 103, 66_955_008),
    ):
        assert (len(by_name[name].shapes), by_name[name].dims["parameters"]) == (tensors, count)
    sizes = [shape[0] for shape in by_name["small-64-4096"].shapes]
    assert (len(sizes), min(sizes) >= 64, max(sizes) <= 4096) == (1000, True, True)
    bytes_each = {name: case.bytes / case.ops for name, case in by_name.items()}
    assert bytes_each["large/sgd"] == bytes_each["large/lion"] == bytes_each["large/rmsprop"] == 20
    assert bytes_each["large/adamw"] == bytes_each["large/adamax"] == bytes_each["resnet50"] == 28
    assert (bytes_each["large/lamb"], bytes_each["large/adafactor"]) == (40, 24)
    assert bytes_each["amp+clip+ema+zero/large"] == 44
    assert (bytes_each["adamw-bf16-state"], bytes_each["bf16-stochastic"]) == (20, 14)
    assert bytes_each["adamw-int8-state"] == pytest.approx(16, rel=0.01)


def test_optimizer_benchmark_runs(tmp_path: Path) -> None:
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "small-64-4096", "--against", "torch-fused"]
    assert main(["optim", *options, "--json", str(tmp_path / "optim.json")]) == 0
    document = json.loads((tmp_path / "optim.json").read_text(encoding="utf-8"))
    assert {row["peer"]: row["status"] for row in document["rows"]}["torch-fused"] == "ok"


# ----------------------------------------------------------------------------------------------- shared cases, families

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
    dense = {row["case"]: row for row in _rows(document, "dense")}
    assert list(dense) == ["a/1", "a/2", "a/4", "b/1", "b/2", "b/4"]
    assert len({dense[name]["median_ms"] for name in ("a/1", "a/2", "a/4")}) == 1
    assert (dense["a/4"]["timed_in"], dense["a/4"]["dims"], "timed_in" in dense["a/1"]) == ("a/1", {"n": 4}, False)
    for point in document["points"]:
        assert point["best_peer_ms"] == dense[point["case"]]["median_ms"]


def test_a_broken_case_leaves_the_others(together: tuple[dict, list[str], Path]) -> None:
    document, _, _ = together
    assert {row["case"]: row["status"] for row in _rows(document, "pyops") if row["status"] != "ok"} == {"b/2": "error"}
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
        return [row["case"] for row in _rows(json.loads((tmp_path / "shared.json").read_text()), "dense")]

    assert cases("--cases", "c/[12]") == ["c/1", "c/2"]
    assert cases("--cases", "*/4", "--full") == ["a/4", "b/4", "c/4"]
    assert main([*common, "--cases", "cuda/*"]) == 2


# --------------------------------------------------------------------------------------------------- sparse convolution


@pytest.mark.parametrize("peer", sparse_conv2d_peers.PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("pruning", sparse_conv2d.PRUNINGS[::3], ids=lambda pruning: pruning.family)
def test_sparse_convolutions_are_right(pruning: sparse_conv2d.Pruning, peer: type[Peer]) -> None:
    """On small images and odd channels, the weights with as many zeros as they say, in every memory format."""
    case = sparse_conv2d._case("resnet50", (20, 40, 3, 2, 9), 2, pruning)
    inputs = sparse_conv2d.make_inputs(case, torch.device("cpu"))
    zeros = float((inputs["w"] == 0).float().mean())
    assert zeros == pytest.approx(pruning.percent / 100, abs=0.01 if "block" not in pruning.pattern else 0.15)
    right = sparse_conv2d.oracle(inputs).numpy()
    for build in peer(torch.device("cpu"), 1).variants(inputs).values():
        instance = build()
        assert report.sqnr_db(instance.output(instance.call()).detach().numpy(), right) > 100


def test_sparse_cases_hold_what_they_say() -> None:
    assert (len(set(sparse_conv2d.RESNET50)), len(set(sparse_conv2d.VGG16))) == (23, 9)
    cases = [case for case in sparse_conv2d.CASES if "cpu" in case.devices]
    assert {case.family for case in sparse_conv2d.CASES} == set(sparse_conv2d.OP.families)
    assert len(cases) == 32 * 2 * 12
    runs = [name for name, _ in itertools.groupby(case.shared for case in cases)]
    assert len(runs) == len(set(runs)) == 64  # those of a shape and batch stand together
    (case,) = [case for case in cases if case.name == "resnet50/64-64-3x3@56/b1/unstructured-90"]
    assert case.ops == pytest.approx(2 * 64 * 64 * 9 * 56 * 56 / 10)
    assert case.bytes == pytest.approx(4 * (2 * 64 * 56 * 56 + 64 * 64 * 9 / 10))


@pytest.mark.parametrize("int8", [False, True])
def test_a_user_keeps_the_packed_weight(int8: bool) -> None:
    """Under inference mode too, in which the runner times."""
    pruning = next(p for p in sparse_conv2d.PRUNINGS if p.int8 == int8)
    case = sparse_conv2d._case("resnet50", (16, 16, 3, 1, 8), 1, pruning)
    with torch.inference_mode():
        inputs = sparse_conv2d.make_inputs(case, torch.device("cpu"))
        instance = sparse_conv2d_peers.Pyops(torch.device("cpu"), 1).variants(inputs)["NCHW"]()
        y = instance.call()
    assert report.sqnr_db(y.numpy(), sparse_conv2d.oracle(inputs).numpy()) >= case.ours_min_sqnr_db
    weight = next(c.cell_contents for c in instance.call.__closure__ if hasattr(c.cell_contents, "packed"))
    assert bool(weight.packed.forward.by_shape) == packs(inputs["x"], weight.values)


def test_models_that_cannot_be_made_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without transformers every peer says so, and nothing tries to make the model."""
    monkeypatch.setattr(sparse_resnet50_peers._Model, "module", "no_such_module")
    options = ["--quick", "--threads", "1", "--skip-ceilings", "--cases", "b1/unstructured-90"]
    assert main(["sparse_resnet50", *options, "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert [row["status"] for row in rows] == ["missing"] * 3
    assert {row["reason"] for row in rows} == {"not installed: pip install transformers"}


# ---------------------------------------------------------------------------------------------------------- arithmetic


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
