"""What README and docs show: every block of Python runs, every command and every file that is named is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT

from pyops.__main__ import parser
from pyops.bench.case import op_names

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
NEEDS = {"checkpoints": ("transformers", "compressed_tensors"), "transformers": ("transformers",)}
SHOWN = {"transformers": "int4_weight", "README": "whole model"}
"""Words that the blocks of a page print."""
MADE = {
    "checkpoints": ["sharded/model-00001-of-*.safetensors"],
    "transformers": ["again/model-00001-of-*.safetensors"],
    "auto": ["demo_output/auto.json", "demo_output/auto.html"],
}
"""Files that they write."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_every_block_of_python_runs(page: Path, tmp_path: Path, python: Callable) -> None:
    """One after the other, in a process of their own and an empty folder."""
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    (tmp_path / "demo_output").mkdir()
    program = tmp_path / "blocks.py"
    program.write_text(
        "\n".join([f"import os; os.chdir({str(tmp_path)!r})", *blocks(page, "python")]), encoding="utf-8"
    )
    done = python(str(program), RANK=None, WORLD_SIZE=None, PYOPS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert SHOWN.get(page.stem, "") in done.stdout
    for pattern in MADE.get(page.stem, ()):
        assert list(tmp_path.glob(pattern)), pattern


def commands(page: Path) -> list[list[str]]:
    """Command lines in blocks without a language, and in the text between backticks, as words."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    lines += re.findall(r"`((?:make|python|pytest|torchrun) [^`\n]+)`", text)
    found = [
        shlex.split(line, comments=True) for line in lines if re.match(r"\s*(make|python|pytest|torchrun)\s", line)
    ]
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one(page: Path) -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
        elif words[1:3] == ["-m", "pyops"]:
            check_command(words[3:])
        elif words[1:2] and words[1].endswith(".py"):
            assert (CHECKOUT / words[1]).is_file(), words


def check_command(words: list[str]) -> None:
    if words[0] == "bench":
        ops = [word for word in words[1:] if re.fullmatch(r"[a-z0-9_]+", word) and word not in ("cuda", "cpu")]
        assert all(word in op_names() or words[words.index(word) - 1].startswith("--") for word in ops), words
    else:
        parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
        if "://" not in target:
            headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (target, anchor)
