"""What `--json FILE` writes, and where it must not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data.errors import InputError
from pretrain.json_file import write_json


def test_what_is_not_finite_becomes_null_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), 1: (2.5, float("inf"))})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "1": [2.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "1\n"


def test_standard_output_that_goes_to_a_file_is_written_and_not_replaced(tmp_path):
    program = "from pretrain.json_file import write_json; write_json('/dev/stdout', 7)"
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, timeout=60)
    assert (tmp_path / "out").read_text() == "7\n"


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--json .*cannot be written"):
        write_json(tmp_path / "no" / "x.json", 1)
