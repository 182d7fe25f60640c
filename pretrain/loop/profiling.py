"""`train --profile`: where a few steps spend their time, recorded by torch.profiler.

    RUN/profile/step-00000005/rank-00000.json.gz    opens in https://ui.perfetto.dev and chrome://tracing
    RUN/profile/step-00000005/top.txt               what took longest

No number of the run changes. A run that is not profiled pays nothing: it has `OFF` in this place, whose methods do nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol

from data.errors import InputError
from pretrain.rank_set import ranks_of

if TYPE_CHECKING:
    from torch.autograd.profiler import record_function
    from torch.profiler import profile

ROWS = 30  # of the table
ALL = "all"
_NUMBERS = {"steps": 1, "warmup": 1, "wait": 0}  # option -> least value


@dataclass(frozen=True)
class ProfileOptions:
    """What is recorded.

    steps: recorded ones. wait: first steps of the process that are left out, because they compile and allocate. warmup: steps
    behind those that the profiler watches without keeping them. ranks: "0", "0,3-5" or "all". stacks: also the lines of Python
    above each operation (large, slow). memory, flops: columns of the table.
    """

    steps: int = 3
    warmup: int = 2
    wait: int = 2
    ranks: str = "0"
    stacks: bool = False
    memory: bool = False
    flops: bool = False


def profile_options(text: str) -> ProfileOptions:
    """Options as they stand behind --profile: "" or `steps=5,ranks=all,memory`, several ranks as `ranks=0+3-5`. InputError."""
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.strip().partition("=")
        least = _NUMBERS.get(name)
        if least is not None and re.fullmatch(r"\d{1,4}", value) and int(value) >= least:
            values[name] = int(value)
        elif name == "ranks" and value:
            values[name] = value.replace("+", ",")
            if value != ALL:
                ranks_of(values[name], "--profile: ranks")
        elif name in ("stacks", "memory", "flops") and not equals:
            values[name] = True
        else:
            raise InputError(
                f"--profile: {part.strip()!r} is none of steps=N and warmup=N (both >= 1), wait=N, ranks=all, ranks=0+3-5, "
                "stacks, memory, flops"
            )
    return ProfileOptions(**values)


class Profiling(Protocol):
    """What the training loop calls."""

    def mark(self, name: str) -> None:
        """From here on, until the next mark or the end of the step, this process does `name`."""

    def step(self) -> None:
        """A step of the loop is over, with all that came behind it."""

    def close(self) -> None:
        """The loop is over."""


class _Off:
    """Nothing is recorded."""

    def mark(self, name: str) -> None:
        pass

    def step(self) -> None:
        pass

    def close(self) -> None:
        pass


OFF = _Off()


def profiler_for(
    options: Optional[ProfileOptions], folder: Path, rank: int, start_step: int, say: Callable[[str], None]
) -> Profiling:
    """A Profiler if this rank is to be profiled, else OFF."""
    if options is None or (options.ranks != ALL and rank not in ranks_of(options.ranks, "--profile: ranks")):
        return OFF
    return Profiler(folder, rank, start_step, options, say)


class Profiler:
    """Records steps start_step + wait + warmup + 1 and on of one process, then writes them and records nothing any more.

    A failure (a full disk, no room for the recorder) is said and ends the profile, not the run.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        start_step: int,
        options: ProfileOptions = ProfileOptions(),
        say: Callable[[str], None] = print,
    ):
        """folder: of the run. start_step: steps taken before this process's first. say: prints the table."""
        self.first = start_step + options.wait + options.warmup + 1
        self.folder = folder / "profile" / f"step-{self.first:08d}"
        self._rank, self._options, self._say = rank, options, say
        self._left = options.wait
        self._profile: Optional[profile] = None
        self._label: Optional[record_function] = None
        self._names: dict[str, None] = {}  # of the labels, in the order in which they came
        self._over = False
        self._began, self._seconds = 0.0, 0.0
        if not self._left:
            self._start()

    def mark(self, name: str) -> None:
        if self._profile is None:
            return
        from torch.profiler import record_function

        self._unmark()
        self._names[name] = None
        self._label = record_function(name)
        self._label.__enter__()

    def step(self) -> None:
        if self._over:
            return
        if self._profile is None:
            self._left -= 1
            if self._left <= 0:
                self._start()
            return
        self._unmark()
        self._left += 1  # from 0 on: steps that the profiler has seen
        whole = self._options.warmup + self._options.steps
        if self._left == whole:
            self._seconds = (time.perf_counter() - self._began) / self._options.steps
        self._guarded(self._profile.step)
        if self._left == self._options.warmup:  # starting to record takes its time
            self._began = time.perf_counter()
        if self._left == whole:
            self.close()

    def close(self) -> None:
        """A profile that is not complete is not written."""
        if self._over:
            return
        self._unmark()
        recorder, self._profile, self._over = self._profile, None, True
        if not self._seconds:
            self._say(f"profile: the run ended before step {self.first + self._options.steps - 1}: nothing was written")
        if recorder is not None:
            self._guarded(recorder.stop)

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks on the console else; read when it first starts
        from torch.profiler import profile, schedule

        options = self._options
        self._left = 0

        def begin() -> None:
            recorder = profile(
                schedule=schedule(wait=0, warmup=options.warmup, active=options.steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                with_stack=options.stacks,
                profile_memory=options.memory,
                with_flops=options.flops,
            )
            recorder.start()
            self._profile = recorder

        self._guarded(begin)

    def _unmark(self) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:
            self._over, self._profile = True, None
            self._say(f"WARNING: the profile was not written: {' '.join(str(error).split())[:300]}")

    def _write(self, recorder: Any) -> None:
        if not self._seconds:  # cut short
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"rank-{self._rank:05d}.json.gz"
        temporary = self.folder / f".rank-{self._rank:05d}.{os.getpid()}.json.gz"  # torch zips what is named so
        try:
            recorder.export_chrome_trace(str(temporary))
            os.replace(temporary, trace)
        finally:
            temporary.unlink(missing_ok=True)
        events = recorder.key_averages()
        text = self._summary(events)
        least = 0 if self._options.ranks == ALL else min(ranks_of(self._options.ranks, "--profile: ranks"))
        name = "top.txt" if self._rank == least else f"top-rank-{self._rank:05d}.txt"
        partial = self.folder / f".{name}.{os.getpid()}"
        partial.write_text(text)
        os.replace(partial, self.folder / name)
        self._say(text)
        self._say(f"profile: {trace}; open it in https://ui.perfetto.dev or chrome://tracing")

    def _summary(self, events: Any) -> str:
        """How the steps divide among the labels, then torch's table of single operations."""
        steps = self._options.steps
        head = (
            f"steps {self.first} to {self.first + steps - 1} of rank {self._rank}: {1e3 * self._seconds:.1f} ms a step"
        )
        lines = [head, ""]
        spent = dict.fromkeys(self._names, 0.0)
        for event in events:
            if event.key in spent:
                spent[event.key] += event.cpu_time_total / 1e6 / steps
        for name, seconds in spent.items():
            lines.append(f"  {name:<24} {1e3 * seconds:10.1f} ms {100 * seconds / self._seconds:6.1f}%")
        rest = max(self._seconds - sum(spent.values()), 0.0)
        lines.append(f"  {'(between them)':<24} {1e3 * rest:10.1f} ms {100 * rest / self._seconds:6.1f}%")
        on_device = any(event.self_device_time_total > 0 for event in events)
        by = "self_device_time_total" if on_device else "self_cpu_time_total"
        events[:] = [e for e in events if e.key not in spent and not e.key.startswith("ProfilerStep")]
        return "\n".join([*lines, "", events.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)])
