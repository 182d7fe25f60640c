"""`data verify` and `data inspect` on the command line: exit codes, lines, JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cli import execute
from tests.distributed.launch import ROOT


@pytest.fixture(scope="module")
def train_set(corpus: Path) -> Path:
    return corpus / "train"


def test_a_whole_set_is_said_to_be_whole_by_a_process_of_its_own(train_set: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "data", "verify", str(train_set), "--processes", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "v.json")], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{train_set}: whole (") and done.stdout.count("\n") == 1
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["faults"] == [] and report["tokens"] > 10_000 and report["shards"] >= 1


def test_every_fault_is_a_line_and_the_exit_code_is_2(train_set: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(train_set, bad)
    content = bytearray((bad / "shard-000000.tar").read_bytes())
    content[700] ^= 1
    (bad / "shard-000000.tar").write_bytes(content)
    (bad / "shard-000000.index.npy").unlink()
    assert execute(["data", "verify", str(bad), "--processes", "1"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].startswith(f"{bad}: 3 faults (")
    assert all(line.startswith(f"{bad}/shard-000000.") for line in lines[:-1])


def test_inspect_shows_the_set(train_set: Path, tmp_path: Path, capsys) -> None:
    assert execute(["data", "inspect", str(train_set), "--json", str(tmp_path / "i.json"), "--chunks", "3"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "i.json").read_text())
    assert f"{found['tokens']:,} (uint16, vocabulary 512)" in out and "piece length" in out
    assert 1 < found["bytes_per_token"] < 4 and found["sources"]


def test_inspect_shows_samples_as_training_draws_them(train_set: Path, capsys) -> None:
    command = ["data", "inspect", str(train_set), "--chunks", "1", "--batch", "2"]
    assert execute(command) == 0
    out = capsys.readouterr().out
    assert "=== sample 0" in out and "=== sample 1" in out and "[text] masked, to be predicted" in out
    assert "\x1b" not in out  # no terminal, no colour
    assert execute([*command, "--step", "1"]) == 0
    assert "=== sample 0" not in capsys.readouterr().out
    rows = re.findall(r"(0\.\d) - [01]\.\d +([\d.]+)% \( *([\d.]+)%\) +of +([\d,]+) tokens", out)
    assert len(rows) >= 8, "masked by noise level"
    for low, rate, expected, tokens in rows:
        count = int(tokens.replace(",", ""))
        assert 100 * float(low) - 0.1 <= float(expected) <= 100 * float(low) + 10.1
        assert abs(float(rate) - float(expected)) < 5 * 50 / count**0.5


@pytest.mark.parametrize("kind", ["uniform", "flow", "block", "autoregressive"])
def test_inspect_shows_what_each_objective_hides_as_often_as_expected(
    train_set: Path, tmp_path: Path, capsys, kind
) -> None:
    size = 32 if kind == "block" else 0
    (tmp_path / "c.yaml").write_text(f"objective: {{kind: {kind}, block_size: {size}}}\nmodel: {{vocab_size: 512}}\n")
    command = ["data", "inspect", str(train_set), "--chunks", "1", "--batch", "1", "--config", str(tmp_path / "c.yaml")]
    assert execute(command) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"(0\.\d) - [01]\.\d +([\d.]+)% \( *([\d.]+)%\) +of +([\d,]+) tokens", out)
    if kind == "autoregressive":
        assert not rows and "nothing is hidden" in out
        return
    assert len(rows) >= 8 and float(rows[0][1]) < 15
    for _, rate, expected, tokens in rows:
        assert abs(float(rate) - float(expected)) < 5 * 50 / int(tokens.replace(",", "")) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say `data verify LOCATION`"),
        (["check"], "say `data verify LOCATION`"),
        (["verify"], "location"),
        (["verify", "/nowhere"], "/nowhere: no such folder"),
        (["verify", "ftp://host/x"], "ftp:// is unknown"),
        (["verify", "/nowhere", "--processes", "-1"], "--processes -1"),
        (["verify", "/nowhere", "--processes", "many"], "processes"),
        (["inspect", "/nowhere", "--chunks", "0"], "--chunks 0"),
        (["inspect", "/nowhere", "--batch", "-1"], "--batch -1"),
        (["inspect", "http://127.0.0.1:1/x", "--retries", "0", "--timeout_seconds", "0"], "cache timeout_seconds"),
        (["inspect", "http://127.0.0.1:1/x", "--retries", "0"], "127.0.0.1:1/x/manifest.json: cannot be fetched"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert execute(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_help_names_both(capsys) -> None:
    assert execute(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data verify LOCATION" in out and "data inspect LOCATION" in out
