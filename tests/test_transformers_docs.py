"""The Python in docs/transformers.md, block after block; in a process of its own, as it starts a process group."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKOUT

PAGE = CHECKOUT / "docs" / "transformers.md"


def test_every_block_runs(tmp_path: Path, python: Callable) -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    program = tmp_path / "blocks.py"
    program.write_text("\n".join([f"import os; os.chdir({str(tmp_path)!r})", *blocks]), encoding="utf-8")
    done = python(str(program), RANK=None, WORLD_SIZE=None)
    assert done.returncode == 0, done.stderr
    assert "int4_weight" in done.stdout
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
