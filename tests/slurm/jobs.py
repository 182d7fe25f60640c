"""Jobs on the lab: to submit them, to wait for what they do (never for ever), to see how they ended."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pretrain.submission.package import hash_list
from tests.slurm.lab import ROOT, Lab

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass(frozen=True)
class Job:
    """One job; `output` is what its batch script said, over all its starts."""

    lab: Lab
    number: str
    output: Path

    def field(self, name: str) -> str:
        """One word of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S*)", self.lab.ask("scontrol", "-o", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def state(self) -> str:
        return self.field("JobState")

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds: float, until: Callable[[], object], what: str) -> None:
        """Until `until()` is true; AssertionError, with what the job said, after `seconds` or if it has ended before."""
        deadline = time.monotonic() + seconds
        while not until():
            ended = self.state in ENDED and not until()
            assert not ended and time.monotonic() < deadline, (
                f"job {self.number} {'ended' if ended else f'in {seconds} s'} without: {what}; {self.state}\n{self.said()}"
            )
            time.sleep(0.2)

    def finish(self, seconds: float) -> str:
        """Waits for its end; its state."""
        deadline = time.monotonic() + seconds
        while (state := self.state) not in ENDED:
            assert time.monotonic() < deadline, f"job {self.number} is {state} after {seconds} s\n{self.said()}"
            time.sleep(0.2)
        return state

    @property
    def exit_code(self) -> int:
        return int(self.field("ExitCode").split(":")[0])


@dataclass(frozen=True)
class StandIn:
    """A submitted folder whose code is tests/slurm/stand_in.py, and what it left there."""

    folder: Path

    def steps(self) -> list[dict]:
        file = self.folder / "steps.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def lines(self, name: str) -> list[str]:
        for place in (self.folder / name, self.folder.parents[1] / name):
            if place.exists():
                return place.read_text().splitlines()
        return []

    def requests(self, name: str, start: int) -> dict[int, list[float]]:
        """Rank -> when it got this signal, in one start."""
        found: dict[int, list[float]] = {}
        for line in self.lines("signals.txt"):
            signal, rank, of_start, when = line.split()
            if (signal, of_start) == (name, str(start)):
                found.setdefault(int(rank), []).append(float(when))
        return found

    def steps_of(self, start: int) -> int:
        return sum(line["start"] == str(start) for line in self.steps())


def stand_in(root: Path, **options) -> StandIn:
    """A run folder with one submission; `options` as stand_in.py takes them."""
    folder = root / "run" / "submitted" / "one"
    package = folder / "code" / "pretrain"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copyfile(Path(__file__).with_name("stand_in.py"), package / "__main__.py")
    (folder / "code" / "slurm").mkdir()
    for kept in ("pretrain/submission/slurm_start.py", "slurm/job.sh"):
        (folder / "code" / kept).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / kept, folder / "code" / kept)
    files = sorted(path.relative_to(folder / "code") for path in (folder / "code").rglob("*") if path.is_file())
    (folder / "code.sha256").write_text(hash_list(folder / "code", files))
    (folder / "config.yaml").write_text(json.dumps({"steps": 10, "seconds": 0.1} | options))
    return StandIn(folder)


def submit(lab: Lab, run: StandIn, *options: str, signal: str = "USR1", **environ: str) -> Job:
    """One job over a stand-in through slurm/pretrain.sbatch; two nodes with one rank each unless `options` say otherwise."""
    output = run.folder / "out.txt"
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=5", *options]
    words = [
        *command,
        f"--output={output}",
        str(ROOT / "slurm" / "pretrain.sbatch"),
        str(run.folder),
        sys.executable,
        signal,
    ]
    return Job(lab, lab.ask(*words, **environ), output)
