"""The plot is drawn from the spool alone, whatever a run leaves in it."""

from __future__ import annotations

import json

import pytest

from data.errors import InputError
from pretrain.plot import plot


def spool(folder, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_with_values_that_are_not_finite_and_steps_without_masks_is_drawn(tmp_path):
    lines = [{"step": s, "train/loss": 5.0 / s, "train/ce_loss": 4.0 / s} for s in range(1, 9)]
    lines[3] = {"step": 4, "train/loss": "nan", "train/ce_loss": "nan"}
    lines[5] = {"step": 6, "train/loss": 0.0}
    lines.append({"step": 8, "val/nelbo": 3.0, "val/nelbo_se": "nan", "val/unigram_entropy": 5.0})
    spool(tmp_path, lines)
    picture = plot(str(tmp_path))
    assert picture == tmp_path / "loss.png" and picture.read_bytes().startswith(b"\x89PNG")
    assert plot(str(tmp_path), str(tmp_path / "other.svg")).read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("output", ["/nowhere/x.png", "x.foo"])
def test_a_picture_that_cannot_be_written_is_a_mistake_of_one_line(tmp_path, output):
    spool(tmp_path, [{"step": 1, "train/loss": 5.0, "train/ce_loss": 4.0}])
    with pytest.raises(InputError, match="--output"):
        plot(str(tmp_path), output)


def test_a_spool_that_is_not_json_is_named_with_its_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\nnonsense\n')
    with pytest.raises(InputError, match="metrics.jsonl.*byte 31"):
        plot(str(tmp_path))
