"""Runs contenders of the engine benchmark: each on ranks of a launch of its own, or several on one rank that take turns."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.comm_counter import KINDS
from bench.engines_cases import Contender, Sizes
from bench.engines_worker import ANSWER
from bench.step_trace import PARTS
from tests.distributed import launch

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, dict[str, Any]]  # contender -> what its ranks found


def task_of(contender: Contender, sizes: Sizes, timeout: int) -> dict[str, Any]:
    return {
        "sizes": asdict(sizes), "layout": asdict(contender.layout), "plain": contender.plain,
        "traced": contender.traced, "timeout_seconds": timeout,
    }  # fmt: skip


def run_ranks(contender: Contender, sizes: Sizes, timeout: int) -> list[dict[str, Any]]:
    """What every rank of a launch of its own found, with memory that is its own. AssertionError if one failed."""
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps(task_of(contender, sizes, timeout)))
        ranks = launch.start("bench.engines_worker", [str(task), folder], sizes.ranks)
        try:
            launch.wait(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(sizes.ranks)]


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One contender: of each step the slowest rank's seconds and the cpu seconds of all; of each volume the rank with most."""
    steps = list(zip(*(rank["steps"] for rank in ranks)))
    volumes = {}
    for kind in KINDS:
        seen = [rank["volumes"].get(kind, {"calls": 0, "bytes": 0}) for rank in ranks]
        volumes[kind] = max(seen, key=lambda volume: (volume["bytes"], volume["calls"]))
    found: dict[str, Any] = {
        "wall_s": [max(one["wall"] for one in step) for step in steps],
        "cpu_s": [sum(one["cpu"] for one in step) for step in steps],
        "loss": steps[-1][0]["loss"], "norm": steps[-1][0]["norm"],
        "volumes": volumes,
        "peak_bytes": max((r["peak_bytes"] - r["idle_bytes"] for r in ranks if r["peak_bytes"]), default=None),
        "build_peak_bytes": max((r["build_peak_bytes"] - r["idle_bytes"] for r in ranks if r["peak_bytes"]), default=None),
    }  # fmt: skip
    traces = [rank["trace"] for rank in ranks if "trace" in rank]
    if traces:
        found["trace"] = {
            "seconds": statistics.mean(t["seconds"] for t in traces),
            "parts": {part: statistics.mean(t["parts"][part] for t in traces) for part in PARTS},
            "rest": traces[0]["rest"],
        }
    return found


class TurnTaker:
    """One contender on one rank in a process of its own, which takes a step when told to and is idle otherwise."""

    def __init__(self, contender: Contender, sizes: Sizes, folder: Path, timeout: int):
        self.name = contender.name
        task = folder / f"{contender.name}.json"
        task.write_text(json.dumps(task_of(replace(contender, traced=False), sizes, timeout)))
        self._errors = (folder / f"{contender.name}.errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.engines_worker", str(task), str(folder), "--turns"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=launch.environment(),
        )

    def answer(self) -> dict[str, float]:
        """What it says next: first that it is ready, then the figures of each step. RuntimeError if it has ended."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line[len(ANSWER) :])
        self._errors.seek(0)
        raise RuntimeError(f"{self.name} ended: {self._errors.read().strip()}")

    def step(self) -> dict[str, float]:
        assert self._process.stdin
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def run_in_turns(contenders: Sequence[Contender], sizes: Sizes, timeout: int) -> tuple[Figures, dict[str, Exception]]:
    """(figures, failures). Round after round each takes a step, another one first every time: drift meets all alike."""
    failures: dict[str, Exception] = {}
    with tempfile.TemporaryDirectory() as folder:
        started: list[TurnTaker] = []
        try:
            started += [TurnTaker(contender, sizes, Path(folder), timeout) for contender in contenders]
            for taker in started:
                try:
                    taker.answer()
                except RuntimeError as error:
                    failures[taker.name] = error
            takers = [taker for taker in started if taker.name not in failures]
            steps: dict[str, list] = {taker.name: [] for taker in takers}
            for turn in range(sizes.steps):
                first = turn % max(1, len(takers))
                for taker in takers[first:] + takers[:first]:
                    steps[taker.name].append(taker.step())
        finally:
            for taker in started:
                taker.end()
    return {name: merged([{"steps": s, "volumes": {}, "peak_bytes": None}]) for name, s in steps.items()}, failures
