"""Reports as JSON and as a page, which a real browser opens."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess

import pytest
import torch
from torch import nn

import pyops
from pyops.report import Report, Row, Whole

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)


def report(count=4, **fields):
    choices = ("int8_dynamic", "int4_weight_g32", "sparse_oc_block16", "unchanged")
    rows = [
        Row(
            f"layers.{i}.<b>fc</b>", "Linear", choices[i % 4], "because & so on", (64, 32 + i), 8192, 2048 + i, (1, 32),
            1.0 + i, 0.25 + i, 20.0 + i,
        )
        for i in range(count)
    ]  # fmt: skip
    whole = Whole(12.31, 4.05, 31.2, ["channels_last: 1 -> 0.5 ms"])
    return Report(rows, **{"whole": whole, "machine": {"device": "A <CPU>", "threads": 2}, **fields})


# ------------------------------------------------------------------------------------------- words and JSON


def test_the_whole_model_is_told():
    text = str(report())
    assert "whole model: 12.31 -> 4.05 ms (3.04x), SQNR 31.2 dB\n  channels_last: 1 -> 0.5 ms" in text
    assert str(report(dry_run=True)).endswith("dry run: the model is as it was")
    assert "whole model: output exact" in str(report(whole=Whole(sqnr_db=math.inf)))
    assert "whole model" not in str(report(whole=None))
    assert str(Report([], Whole(1.0, 1.0))).splitlines() == [
        "No layer that this config is for.",
        "whole model: 1 -> 1 ms (1.00x)",
    ]


def test_json_is_strict_and_says_all(tmp_path):
    found = report(dry_run=True)
    found.rows[0].sqnr_db, found.rows[1].sqnr_db, found.whole.sqnr_db = math.inf, math.nan, -math.inf
    path = tmp_path / "report.json"
    text = found.to_json(path)

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(text, parse_constant=refuse)
    assert json.loads(path.read_text()) == read
    assert [row["sqnr_db"] for row in read["rows"]] == ["inf", "nan", 22.0, 23.0]
    assert read["whole"]["sqnr_db"] == "-inf"
    assert read["rows"][0]["ms_before"] == 1.0
    assert read["rows"][0]["shape"] == [64, 32]
    assert read["machine"] == {"device": "A <CPU>", "threads": 2}
    assert read["dry_run"] is True
    assert read["totals"]["layers"] == 4


def test_what_a_swap_without_example_inputs_says():
    found = pyops.swap_(nn.Sequential(nn.Linear(3, 4)), pyops.Int8Dynamic())
    assert found.to_dict().keys() == {"rows", "totals"}
    found = pyops.swap_(nn.Sequential(nn.Linear(3, 4)), pyops.Int8Dynamic(), example_inputs=torch.randn(2, 3))
    assert found.to_dict().keys() == {"rows", "totals"}
    assert found.machine["torch"] == torch.__version__, "for the page"


@pytest.mark.parametrize("save", ["to_json", "save_html"])
def test_a_file_that_cannot_be_written(tmp_path, save):
    with pytest.raises(OSError, match="nowhere"):
        getattr(report(), save)(tmp_path / "nowhere" / "report")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        getattr(report(), save)(folder)
    assert os.listdir(tmp_path) == ["folder"], "nothing is left lying about"


@pytest.mark.parametrize("save", ["to_json", "save_html"])
def test_an_error_leaves_the_file_as_it_was(tmp_path, monkeypatch, save):
    path = tmp_path / "report"
    path.write_text("what was there")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        getattr(report(), save)(path)
    assert path.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["report"]


# ------------------------------------------------------------------------------------------- the page


def page(found, tmp_path):
    return found.save_html(tmp_path / "report.html").read_text()


def test_a_page_holds_everything_and_needs_nothing(tmp_path):
    text = page(report(), tmp_path)
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "<b>fc</b>" not in text, "names are escaped"
    assert "layers.<wbr>0.<wbr>&lt;b&gt;fc&lt;/b&gt;" in text
    assert "because &amp; so on" in text
    assert "3.04×" in text
    assert "12.31 ms → 4.05 ms" in text
    assert "A &lt;CPU&gt;" in text
    assert text.count('<tr class="') == 4


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Report([]), "No layer that this config is for."),
        (Report([Row("a", "Linear", "int8_dynamic", "")]), "1 of 1"),
        (Report([Row("", "Odd", "unchanged", "x", (2, 2), 16, 16)]), "(the model)"),
        (report(dry_run=True), "A dry run"),
        (report(whole=Whole(sqnr_db=math.inf)), "exact"),
        (report(whole=Whole(sqnr_db=math.nan)), "nan dB"),
        (report(whole=None), "of the worst layer"),
        (report(300), "300"),
    ],
    ids=["empty", "unmeasured", "no name", "dry run", "exact", "nan", "no whole", "300 rows"],
)
def test_pages_of_all_kinds(tmp_path, found, words):
    assert words in page(found, tmp_path)


def browser():
    """The path of a browser; skips without one, or fails if PYOPS_REQUIRE_BROWSER says that there must be one."""
    found = os.environ.get("PYOPS_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("PYOPS_REQUIRE_BROWSER") == "1":
        pytest.fail(f"PYOPS_REQUIRE_BROWSER=1, and none of {', '.join(NAMES)} is there")
    return found or pytest.skip(f"none of {', '.join(NAMES)} is there, nor PYOPS_BROWSER")


def opened(tmp_path, address, *flags):
    command = [browser(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def test_a_browser_shows_the_page(tmp_path):
    report(6).save_html(tmp_path / "report.html")
    address = (tmp_path / "report.html").as_uri()
    dom = opened(tmp_path, address, "--dump-dom")
    rows = re.findall(r'<tr class="(\w+)" data-number="(\d)"', dom)
    assert [int(number) for _, number in rows] == [0, 1, 2, 3, 4, 5]
    assert [family for family, _ in rows][:4] == ["int8", "int4", "sparse", "unchanged"]
    assert html.escape("<b>fc</b>") in dom
    dom = opened(tmp_path, f"{address}#sort=ms", "--dump-dom")
    assert re.findall(r'data-number="(\d)"', dom) == list("543210"), "the script has sorted"
    assert 'aria-sort="descending"' in dom


def test_a_browser_draws_the_bars(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    report(6).save_html(tmp_path / "report.html")
    picture = tmp_path / "page.png"
    flags = (f"--screenshot={picture}", "--window-size=1400,1000")
    opened(tmp_path, (tmp_path / "report.html").as_uri(), *flags)
    pixels = torch.tensor(plt.imread(picture))[..., :3]
    assert tuple(pixels.shape[:2]) == (1000, 1400)

    def drawn(colour):
        wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return int(((pixels - wanted).abs().amax(-1) < 0.02).sum())

    assert drawn("#1f7a5c") > 500, "bars of int8 layers after"
    assert drawn("#b8c1cc") > 3000, "bars before"
