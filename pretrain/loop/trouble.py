"""What becomes of a run whose numbers go wrong: what is noted, when nothing may be saved, when it goes back.

A step whose loss or gradient is not finite is skipped by the engine and noted with its samples; a spike is noted. Enough of
them and the run rolls back (pretrain.loop.roll_back) to before the first, and goes on behind the samples that it has read since.

Everything here but `judge` follows from what all ranks agreed on, so all ranks do the same. No collectives, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.config import HealthConfig
from pretrain.loop.spikes import SpikeDetector, Verdict

MOST_RECORDS = 1000  # skipped steps that a checkpoint lists, the newest
MOST_RANGES = 64  # ranges of sample numbers that one of them names

Range = list[int]  # [first, last]


@dataclass(frozen=True)
class Action:
    """What to do after a step. said: a line for the log ("": nothing to say). first_bad: if not 0, go back to before that step;
    reason: why, for the record.
    """

    said: str = ""
    first_bad: int = 0
    reason: str = ""


class Trouble:
    """The trouble of one run. Steps are counted as checkpoints count them: step n is the n-th that was taken, from 1 on."""

    def __init__(self, health: HealthConfig, max_skipped: int):
        """max_skipped: non-finite steps in a row that make the run roll back."""
        self._health, self._max_skipped = health, max_skipped
        self._detector = SpikeDetector(health.spike_sigma, health.spike_window)
        self._non_finite: list[int] = []  # steps in a row
        self._spikes: list[int] = []  # steps within the last `_horizon`
        self._waits_since = 0  # the step at which a save was first refused for spikes; 0: none was
        self._roll_backs = 0  # since the last new checkpoint
        self._skipped: list[dict[str, Any]] = []
        self._forgotten = 0

    @property
    def _horizon(self) -> int:
        return 2 * self._health.spike_patience

    @property
    def in_a_row(self) -> int:
        """Steps up to this one whose loss or gradient was not finite."""
        return len(self._non_finite)

    def judge(self, loss: float, grad_norm: float, applied: bool) -> Verdict:
        """What this rank makes of a step; the largest of all ranks' verdicts goes to `after_step`."""
        return self._detector.observe(loss, grad_norm, applied)

    def after_step(self, step: int, verdict: Verdict, samples: Iterable[int] = (), reason: str = "") -> Action:
        """The step's consequence. samples: of a step that is not finite, those that may be to blame; reason: what was seen.

        Not for steps that had nothing to learn from. Raises RuntimeError, with what to do, for a roll-back too many.
        """
        if verdict == Verdict.NON_FINITE:
            self._non_finite.append(step)
            self._note(step, samples, reason)
            if self.in_a_row < self._max_skipped:
                return Action(f"step {step}: {reason}")
            why = f"{self.in_a_row} steps in a row were not finite (train.max_skipped), the last because {reason}"
            return self._go_back(step, self._non_finite[0], why)
        self._non_finite.clear()
        self._spikes = self._recent(step) + ([step] if verdict == Verdict.SPIKE else [])
        if verdict != Verdict.SPIKE:
            return Action()
        count = len(self._spikes)
        if count < self._health.spike_patience:
            return Action(f"step {step}: the loss is a spike ({count} in the last {self._horizon} steps)")
        why = f"{count} losses of the last {self._horizon} steps were spikes (health.spike_patience)"
        return self._go_back(step, self._spikes[0], why)

    def may_save(self, step: int) -> bool:
        """Whether the state behind `step` is good enough to go back to; asked at each step behind which a checkpoint is due.

        Not while trouble is under way. Spikes that neither end nor become enough of them hold a checkpoint up no longer than
        they are remembered: then the run has lived through them.
        """
        if self._non_finite:
            return False
        if not self._recent(step):
            return True
        self._waits_since = self._waits_since or step
        return step - self._waits_since >= self._horizon

    def saved(self) -> None:
        """A new checkpoint was made: the run has got past its trouble, unless some of it is remembered yet."""
        self._waits_since = 0
        if not self._non_finite and not self._spikes:
            self._roll_backs = 0

    def rolled_back(self, trainer: Mapping[str, Any]) -> None:
        """The run is where a checkpoint with this trainer.json ({}: its beginning) left it. What was skipped stays on record."""
        self._resume(trainer.get("trouble") or {})
        self._spikes, self._non_finite, self._waits_since = [], [], 0

    def state(self) -> dict[str, Any]:
        """Keys for trainer.json."""
        return {
            "skipped": {"records": self._skipped, "older": self._forgotten},
            "trouble": {
                "non_finite": self._non_finite,
                "spikes": self._spikes,
                "detector": self._detector.state(),
            },
        }

    def restore(self, trainer: Mapping[str, Any]) -> None:
        """As `state` put it into a checkpoint's trainer.json; one from before there was such a thing begins anew."""
        skipped = trainer.get("skipped") or {}
        self._skipped, self._forgotten = list(skipped.get("records", ())), skipped.get("older", 0)
        self._resume(trainer.get("trouble") or {})

    def _resume(self, stored: Mapping[str, Any]) -> None:
        self._non_finite, self._spikes = (list(stored.get(key, ())) for key in ("non_finite", "spikes"))
        self._detector.restore(stored.get("detector") or {})

    def _recent(self, step: int) -> list[int]:
        return [spike for spike in self._spikes if spike > step - self._horizon]

    def _note(self, step: int, samples: Iterable[int], reason: str) -> None:
        self._skipped.append({"step": step, "samples": ranges(samples), "reason": reason})
        self._forgotten += max(0, len(self._skipped) - MOST_RECORDS)
        self._skipped = self._skipped[-MOST_RECORDS:]

    def _go_back(self, step: int, first_bad: int, why: str) -> Action:
        most = self._health.max_rollbacks
        if self._roll_backs >= most:
            again = f"and the run has rolled back {most} times without a new checkpoint since" if most else "and"
            raise RuntimeError(
                f"step {step}: {why}, {again} (health.max_rollbacks {most}): lower optimizer.lr, look at the samples that "
                "`checkpoint inspect` lists, or raise the limit; the newest checkpoint is from before the trouble"
            )
        self._roll_backs += 1
        return Action(f"step {step}: {why}; rolling back ({self._roll_backs} of {most})", first_bad, why)


def ranges(numbers: Iterable[int], most: int = MOST_RANGES) -> list[Range]:
    """Numbers as at most `most` ranges [first, last] in order that hold all of them: the narrowest gaps are filled first."""
    found: list[Range] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    gaps = sorted(range(1, len(found)), key=lambda i: (found[i][0] - found[i - 1][1], i))
    filled = set(gaps[: max(0, len(found) - most)])
    merged: list[Range] = []
    for i, (first, last) in enumerate(found):
        if i in filled:
            merged[-1][1] = last
        else:
            merged.append([first, last])
    return merged


def describe(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's trainer.json says of trouble, for `checkpoint inspect`: counts and text, None where there was none."""
    skipped = trainer.get("skipped") or {}
    records: Sequence[Mapping[str, Any]] = skipped.get("records", ())
    left_out: Sequence[Mapping[str, Any]] = (trainer.get("stream") or {}).get("skips", ())
    steps = len(records) + skipped.get("older", 0)
    shown = [f"step {r['step']} ({r['reason']}; samples {_text(r['samples'])})" for r in records[-5:]]
    ends = [f"{_text([r['samples']])} before step {r['step'] + 1} ({r['reason']})" for r in left_out[-5:]]
    return {
        "skipped_steps": _listed(steps, shown),
        "skipped_samples": _listed(len(left_out), ends),
    }


def _listed(count: int, newest: Sequence[str]) -> str | None:
    """The count and the newest few."""
    if not count:
        return None
    return f"{count}: {'... ' if count > len(newest) else ''}{'; '.join(newest)}"


def _text(found: Sequence[Sequence[int]]) -> str:
    shown = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found[:8])
    return shown + (f" and {len(found) - 8} more ranges" if len(found) > 8 else "")
