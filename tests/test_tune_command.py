"""`python -m pyops tune` and the rest of the command line: what it prints, its exit codes, and bad arguments."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch

from pyops.__main__ import main
from pyops.tune_command import UsageError, inputs_of

FAST = {"int8_dynamic": 0.3}


@pytest.fixture(autouse=True)
def _own_places(monkeypatch, tmp_path):
    monkeypatch.setenv("PYOPS_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models_for_tune.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def build_model():
                return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))

            def with_inputs():
                return build_model(), torch.randn(4, 64)

            class Named(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embedding, self.layer = nn.Embedding(100, 64), nn.Linear(64, 32)

                def forward(self, ids, mask=None):
                    return self.layer(self.embedding(ids)) * mask[..., None]

            def two_values():
                return build_model(), torch.randn(4, 64), 3

            def broken():
                raise RuntimeError("no weights here")

            a_number = 3
            """
        )
    )
    return str(tmp_path / "models_for_tune.py")


def test_a_model_factory(clock, models, capsys, threads):
    threads(torch.get_num_threads())
    clock(FAST)
    assert main(["tune", f"{models}:build_model", "--input", "8x64", "--allow", "int8", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 layers swapped" in out
    assert "whole model" in out
    assert torch.get_num_threads() == 1
    assert main(["tune", "models_for_tune:with_inputs", "--allow", "int8"]) == 0
    arguments = ["--input", "ids=2x7:int64:100", "--input", "mask=2x7:bool", "--dtype", "bfloat16"]
    assert main(["tune", f"{models}:Named", *arguments]) == 0


def test_json(clock, models, tmp_path):
    clock(FAST)
    path = tmp_path / "report.json"
    assert main(["tune", f"{models}:with_inputs", "--json", str(path)]) == 0
    assert [row["choice"] for row in json.loads(path.read_text())["rows"]] == ["int8_dynamic"] * 2


def test_required_speedup(clock, models, capsys):
    clock(FAST)
    assert main(["tune", f"{models}:with_inputs", "--require-speedup", "1.9"]) == 0
    assert main(["tune", f"{models}:with_inputs", "--require-speedup", "2.1"]) == 3
    assert "2.000 times as fast, --require-speedup 2.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("build_model", "must be MODULE:FUNCTION"),
        ("nowhere.to_be_found:build_model", "there is no module 'nowhere'"),
        ("missing.py:build_model", "there is no file missing.py"),
        ("{models}:other", "has no 'other'"),
        ("{models}:a_number", "is a int, not a function"),
        ("{models}:two_values", "gives a tuple, not a torch.nn.Module"),
        ("{models}:build_model", "--input is needed"),
        ("{models}:with_inputs --input 4x64", "gives example inputs itself"),
        ("{models}:build_model --input 4*64", "write sizes joined by x"),
        ("{models}:build_model --input 4x64:int4", "'int4' is not one of float32"),
        ("{models}:build_model --input 4x64:int64:0", "'0' must be a positive number"),
        ("{models}:build_model --input 4x64:float32:9", "of an integer dtype"),
        ("{models}:Named --input ids=2x7:int64 --input 2x7:bool", "all by keyword"),
        ("{models}:build_model --input 4x64 --allow int3", "allow names 'int3'"),
        ("{models}:build_model --input 4x64 --min-sqnr-db nan", "min_sqnr_db is nan"),
        ("{models}:build_model --input 4x64 --device quantum", "device"),
        ("{models}:build_model --input 4x64 --threads 0", "--threads is 0"),
        ("{models}:build_model --input 4x64 --json nowhere/report.json", "there is no such folder"),
        ("{models}:build_model --input 4x64 --min-sqnr-db much", "invalid float value"),
    ],
)
def test_bad_arguments(models, capsys, spec, words):
    assert main(["tune", *spec.format(models=models).split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{models}:broken", "broken() raised RuntimeError"),
        ("{models}:build_model --input 4x63", "the model cannot be run with these inputs: RuntimeError"),
        ("raises.py:build_model --input 4x63", "raises.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_errors_of_the_model(models, tmp_path, capsys, spec, words):
    (tmp_path / "raises.py").write_text("1 / 0")
    assert main(["tune", *spec.format(models=models).split()]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" in err, "where it was raised"


def test_inputs():
    positional, named = inputs_of(["2x3", "4:int64:5", "1:bool", "2x2:bfloat16"])
    assert [tuple(t.shape) for t in positional] == [(2, 3), (4,), (1,), (2, 2)]
    assert [t.dtype for t in positional] == [torch.float32, torch.int64, torch.bool, torch.bfloat16]
    assert not named
    assert positional[1].max() < 5
    assert list(inputs_of(["ids=2:int64"])[1]) == ["ids"]
    with pytest.raises(UsageError, match="'not a name=2'"):
        inputs_of(["not a name=2"])


def test_an_interrupt(clock, models, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    clock.whole = interrupted
    assert main(["tune", f"{models}:with_inputs"]) == 130
    assert "pyops tune: interrupted" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "{info,tune,demo,bench}" in capsys.readouterr().out
    assert main(["tune", "--help"]) == 0
    assert "Exit codes: 0" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["demo", "--epochs", "0"]) == 2
