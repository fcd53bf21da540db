"""The Python in docs/checkpoints.md, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"


def test_every_block_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
