"""The example of docs/data-stream.md runs as it is printed, on a real tar."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_without_our_trainer_runs(corpus, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data-stream.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 14
    shutil.copytree(corpus / "train", tmp_path / "data_mine" / "train")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, "docs/data-stream.md", "exec"), found)
    batch = found["batch"]
    assert batch.noisy_ids.shape[1] == 128 and batch.masked.any()
    assert (batch.noisy_ids[batch.masked] == 0).all() and not batch.masked[~batch.eligible].any()
