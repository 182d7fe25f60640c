"""Run folders for tests of what reads them: written by the writers that training itself uses, at times that the test chooses."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from pretrain.config import Config
from pretrain.load_config import save_config
from pretrain.watching.faults import Fault, fault_path
from pretrain.watching.heartbeat import PUBLISHED_BYTES, rank_path, write_in_place

NOW = 1_800_000_000.0
LAUNCH = "77-0-0"


class RunFolder:
    """One run folder under construction; ages in seconds before NOW."""

    def __init__(self, path: Path, **train: Any):
        self.path = path
        (path / "health").mkdir(parents=True)
        self.config = Config()
        self.config.tracking.uri = "none"
        for key, value in train.items():
            setattr(self.config.train, key, value)
        save_config(self.config, path / "config.yaml")

    def start(self, age: float, *, attempt: int = 1, launch: str = LAUNCH, step: int = 0, job: str = "") -> None:
        line = {"attempt": attempt, "time": NOW - age, "launch": launch, "job": job, "world": 4, "step": step}
        self._append("health/attempts.jsonl", line)

    def end(self, age: float, code: int, *, launch: str = LAUNCH, step: int = 0, decision: str = "") -> None:
        line = {"ended": 1, "time": NOW - age, "launch": launch, "job": "", "code": code, "step": step, "fault": None}
        self._append("health/attempts.jsonl", {**line, "decision": decision, "wait_seconds": 0})

    def rank(self, rank: int, age: float = 1.0, *, step: Optional[int] = 7, launch: str = LAUNCH, **said: Any) -> None:
        values = {
            "rank": rank,
            "world": 4,
            "host": f"n{rank // 2}",
            "pid": 100 + rank,
            "time": NOW - age,
            "launch": launch,
            "phase": "step",
            "step": step,
            "doing": "train_step",
            "since": 0.5,
            "idle": 0.5,
            "collectives": {"world": 10},
            "beats": 50,
            **said,
        }
        path = rank_path(self.path, rank)
        write_in_place(path, values, PUBLISHED_BYTES)
        os.utime(path, (NOW - age, NOW - age))

    def fault(self, age: float, launch: str = LAUNCH, **values: Any) -> None:
        fault = Fault(**{"kind": "stalled", "rank": 3, "host": "n1", "phase": "step", "step": 7, **values})
        fault_path(self.path, launch).write_text(json.dumps({**asdict(fault), "time": NOW - age, "launch": launch}))

    def checkpoint(self, step: int, age: float = 5.0, size: int = 1000, **trainer: Any) -> None:
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes(size))
        (folder / "trainer.json").write_text(json.dumps({"format": 1, "step": step, **trainer}))
        os.utime(folder / "trainer.json", (NOW - age, NOW - age))

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def steps(self, first: int, last: int, end: float, seconds: float = 1.0, loss: float = 4.0) -> None:
        """Lines of these steps, the last one at the age `end`."""
        self.metrics(
            [
                {
                    "step": step,
                    "time": NOW - end - (last - step) * seconds,
                    "train/loss": loss,
                    "train/applied_steps": step,
                    "train/tokens": step * 256,
                    "perf/step_time": seconds,
                    "perf/tokens_per_second": 256 / seconds,
                }
                for step in range(first, last + 1)
            ]
        )

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(line) + "\n")
