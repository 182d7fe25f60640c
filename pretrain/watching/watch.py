"""`watch train ...`: the parent of one rank's training process, outside of it, so that a hang has somebody who ends it.

A watch forwards signals, keeps an eye on its own rank, and looks once a second for the fault of this start (faults.py): the
first watch that knows one names it, all others then write their rank's stacks, kill it and end with the same code. The watch of
rank 0 also reads what all ranks publish and says which of them the others wait for (judge.py); if it is gone, any other does.
No torch here: a watch is small, starts at once, and cannot hang where training does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from data.errors import InputError
from pretrain.config import HealthConfig
from pretrain.launch import LAUNCH, launch_name, never_used_before, rank_and_world
from pretrain.watching.cause import LastWords, how_it_ended, last_words, memory_kills
from pretrain.watching.child import Child
from pretrain.watching.faults import FAULT, INTERRUPTED, LEAVES, MISTAKE, Fault, FaultFile, stacks_folder
from pretrain.watching.judge import STOPPED, Limits
from pretrain.watching.observer import POLL_SECONDS, Observer
from pretrain.watching.own import OwnRank
from pretrain.watching.rank_log import log_path
from pretrain.watching.stacks import catches, dump_stacks

# All but the last are forwarded.
SIGNALS = {signal.SIGUSR1, signal.SIGHUP, signal.SIGURG, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
GUARD_SECONDS = 25.0  # from the fault to the end of this process, whatever hangs
HOLD_SECONDS = 4.0  # from the fault to the kill: ranks that wait for this one lose their stacks when it goes
EVIDENCE_SECONDS = 3.0  # for another watch to name the fault that ended this rank
LONGEST_EVIDENCE_SECONDS = 20.0  # to find a rank that vanished together with its watch
AGAIN_SECONDS = 2.0  # a second Ctrl-C after so long means now
ITS_SIGNAL_SECONDS = 10.0  # a process that dies of a signal that this one got so lately was asked to leave
LATE_JUDGE = 1.5  # times its limit that a rank other than 0 waits for rank 0's watch to judge


def watch(arguments: Sequence[str], command: Optional[Sequence[str]] = None) -> int:
    """Runs `python -m pretrain ARGUMENTS` (`train ...`) as a child and watches it; the exit code that its fate asks for.

    command: what to start instead. 0 and 2 are the child's own; 75: it left with a checkpoint; 76: a fault ended it; 130: Ctrl-C.
    """
    if not arguments or arguments[0] != "train":
        raise InputError(
            "watch: what can be watched is training: `watch train --config FILE [--section.key value ...]`"
        )
    if sys.platform != "linux":
        raise InputError("watch: needs Linux; `train` alone runs without it")
    heard = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN} | {signal.SIGCHLD}
    # From now on they wait until there is somebody to forward them to. What is ignored (HUP under nohup) stays so.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    try:
        folder, health = _run_folder(arguments[1:])
        child = command or [sys.executable, "-m", "pretrain", *arguments]
        return _Watch(child, folder, health, os.environ, heard).run(before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_folder(arguments: Sequence[str]) -> tuple[Optional[Path], HealthConfig]:
    """Where `train` with these arguments keeps its run, None where it only shows something. InputError for a mistake in them."""
    from pretrain.load_config import config_parser, parse

    if any(argument in ("-h", "--help") or argument.startswith("--print_config") for argument in arguments):
        return None, HealthConfig()
    parser = config_parser()
    parser.add_argument("--profile", nargs="?", const="")  # train's own
    config, _ = parse(parser, arguments)
    return Path(config.run.dir) / config.run.name, config.health


class _Watch:
    def __init__(
        self,
        command: Sequence[str],
        folder: Optional[Path],
        health: HealthConfig,
        environ: Mapping[str, str],
        heard: set[signal.Signals],
    ):
        environ = {key: value for key, value in environ.items() if key != LAUNCH}
        try:
            self.rank, self.world = rank_and_world(environ)
        except ValueError:
            self.rank, self.world, folder = 0, 1, None  # the child says it
        self.launch = launch_name(environ)
        self.folder = folder
        self.limits = Limits(health.stall_seconds, health.beat_seconds)
        self.own = OwnRank(self.rank, self.world, self.launch)
        self._command, self._heard = command, heard
        self._environ = {**environ, LAUNCH: self.launch, **self.own.environ}
        self._left_at: Optional[float] = None
        self._got: dict[int, float] = {}
        self._ending: Optional[int] = None
        self._guard: Optional[threading.Timer] = None
        if folder is not None:
            believe_old = never_used_before(environ)
            self.faults = FaultFile(folder, self.launch, believe_old=believe_old)
            self.log = log_path(folder, self.rank)
            self._log_start = self.log.stat().st_size if self.log.exists() else 0
            self.observer = Observer(folder, self.own, self.limits, self.faults, believe_old=believe_old)

    def run(self, mask: set[int]) -> int:
        """mask: the signals blocked in the child; those that are heard are blocked in this process."""
        self.child = Child(self._command, self._environ, self.own.files, mask)
        try:
            if self.folder is not None:
                self.observer.start()
            return self._follow()
        finally:
            self.child.end()
            if self.folder is not None:
                self.observer.stop()
            if self._guard:
                self._guard.cancel()

    def _follow(self) -> int:
        """Until the child has ended, by itself or not; the exit code."""
        while True:
            self._wait(POLL_SECONDS)
            if (code := self.child.code()) is not None:
                return self._over(code)
            if self._ending is not None:
                return self._leave(self._ending)
            if self.folder is None:
                continue
            self.own.look(self.child.pid)
            if fault := self.observer.fault:
                return self._end(fault)
            if self.observer.leaving:
                if self._waited_for_leaving():
                    self._say(f"rank {self.rank} did not follow the others that left with a checkpoint: ended")
                    self._arm(LEAVES)
                    self._write_stacks()
                    self.child.end()
                    return LEAVES
            elif found := self._verdict():
                return self._end(self._name(found))

    def _wait(self, seconds: float) -> None:
        """Until a signal (forwarded at once), the end of the child, or `seconds`."""
        info = signal.sigtimedwait(self._heard, seconds)
        if info is None or info.si_signo == signal.SIGCHLD:
            return
        number, now = info.si_signo, time.monotonic()
        before = self._got.get(number)
        self._got[number] = now
        if self.child.code() is not None:
            return  # what is left to do is bounded, and says more than an end without it
        if number == signal.SIGINT and before is not None and now - before > AGAIN_SECONDS:
            self._ending = INTERRUPTED
        elif number in (signal.SIGINT, signal.SIGURG) or catches(self.child.pid, number):
            self.child.send(number)
        else:  # it is still starting: the signal would only kill it, and there is nothing to save yet
            self._ending = LEAVES

    def _verdict(self) -> Optional[Fault]:
        if self.own.stopped >= self.limits.stall:
            return self.own.fault("stopped", STOPPED)
        if self.rank == 0:
            return self.observer.verdict
        limit = self.limits.of(self.own.record.phase)
        self.observer.judging = self.own.idle >= 0.9 * limit
        patience = LATE_JUDGE * limit + 0.25 * (self.rank % 64)  # not all at once
        return self.observer.verdict if self.own.idle >= patience else None

    def _waited_for_leaving(self) -> bool:
        self._left_at = self.own.seconds if self._left_at is None else self._left_at
        return self.own.seconds - self._left_at >= self.limits.stall

    def _over(self, code: int) -> int:
        """The child has ended with `code` (minus a signal's number)."""
        number = -code
        if number in self._got and time.monotonic() - self._got[number] < ITS_SIGNAL_SECONDS:
            code = INTERRUPTED if number == signal.SIGINT else LEAVES
        if code in (0, INTERRUPTED) or self.folder is None:
            return code if code >= 0 else 128 - code
        self._arm(MISTAKE if code == MISTAKE else LEAVES if code == LEAVES else FAULT)
        with contextlib.suppress(OSError):
            self.observer.write_note(f"ended {code}")
        if fault := self.faults.read():
            return fault.code
        if code == LEAVES or (code != MISTAKE and self.faults.leaving()):
            return self._leave(LEAVES)
        words = last_words(self.log, self._log_start)
        if code == MISTAKE:
            self._name(self.own.fault("mistake", words.cause or "a mistake, said in the job's output", MISTAKE))
            return MISTAKE
        found = self._cause(code, words)
        return self._name(found).code if found else self._leave(LEAVES)

    def _cause(self, code: int, words: LastWords) -> Optional[Fault]:
        """What ended the child: its own doing, another rank's, or what another watch has named meanwhile. None: no fault, another
        rank has left to be requeued.
        """
        how = how_it_ended(code, self.own.kills[0], memory_kills())
        if code < 0 and -code != signal.SIGABRT:
            return self.own.fault("died", how)
        mine = self.own.fault("died" if code < 0 else "crashed", "; ".join(filter(None, (words.cause, how))))
        if self.world == 1 or (words.cause and not words.follows):
            return mine if words.rank in (None, self.rank) else self._of_other(words)
        found = self._evidence()
        return None if found is None and self.faults.leaving() else found or mine

    def _evidence(self) -> Optional[Fault]:
        """Another rank's end that this one's followed from: named by its watch, or of a rank that vanished with its watch. None at
        once when another rank has left.
        """
        patience = EVIDENCE_SECONDS + 0.02 * min(self.rank, 100)
        if 1.5 * self.limits.beat + patience <= LONGEST_EVIDENCE_SECONDS:
            patience += 1.5 * self.limits.beat
        self._arm(FAULT, patience)
        before = {rank: self.observer.record(rank) for rank in range(self.world)}
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if fault := self.faults.read():
                return fault
            if self.faults.leaving():
                return None
            self._wait(0.5)
        if patience < 1.5 * self.limits.beat:
            return None
        for rank, then in before.items():
            if rank == self.rank or then is None or then.phase == "end":
                continue
            if self.observer.note(rank).get("process", "late") != "late":
                continue  # its watch is there
            if self.observer.record(rank) == then:
                cause = "its process and its watch are gone without a word: the host is down, cut off, or was cleared"
                return Fault("silent host", rank, then.host, then.phase, then.step, then.doing, cause)
        return None

    def _of_other(self, words: LastWords) -> Fault:
        record = (self.observer.record(words.rank) if words.rank is not None else None) or self.own.record
        return Fault("crashed", words.rank, words.host, record.phase, record.step, record.doing, words.cause)

    def _name(self, fault: Fault) -> Fault:
        """Writes the fault of this start; the one that stands, which may be another watch's."""
        if self._guard is None:
            self._arm(fault.code)
        try:
            stands = self.faults.name(fault)
        except OSError as error:
            self._say(
                f"{self.faults.path} cannot be written ({error.strerror}): the other ranks find out by themselves"
            )
            stands = fault
        first = (stands.kind, stands.rank, stands.cause) == (fault.kind, fault.rank, fault.cause)
        if stands.kind != "mistake" and (first or self.rank == 0):  # a mistake has been said by who made it out
            self._say(stands.sentence())
        return stands

    def _end(self, fault: Fault) -> int:
        """Writes the rank's stacks and kills it."""
        self._arm(fault.code)
        until = time.monotonic() + HOLD_SECONDS
        if fault.kind != "mistake":
            self._write_stacks(fault)
        while self.child.code() is None and time.monotonic() < until:
            self._wait(0.1)
        if not self.child.end():
            self._say(f"rank {self.rank}: process {self.child.pid} or one of its own does not go away after SIGKILL")
        return fault.code

    def _leave(self, code: int) -> int:
        """Ends the child, if it still runs, for a reason that is no fault, unless a fault is why this process was asked to."""
        self._arm(code)
        if self.folder is not None and (fault := self.faults.read()):
            return self._end(fault)
        if self.child.code() is None:
            self._say(f"rank {self.rank}: asked to leave while the training process could not listen: ended at once")
            self.child.end()
        if code == LEAVES and self.folder is not None:
            with contextlib.suppress(OSError):
                self.faults.say_leaving(self.rank)
        return code

    def _write_stacks(self, fault: Optional[Fault] = None) -> None:
        assert self.folder is not None
        path = stacks_folder(self.folder, self.launch) / f"rank-{self.rank:05d}.txt"
        own = self.own.record
        where = f"phase {own.phase}, step {own.step}, {own.doing or '-'}; last beat {self.own.idle:.1f} s ago"
        header = f"rank {self.rank} of {self.world} on {own.host}, {where}\n"
        if fault:
            header += f"fault: {fault.sentence()}\n"
        text = dump_stacks(self.child.pid, self.own.answers, header)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            self._say(f"{path} cannot be written ({error.strerror}); rank {self.rank}'s stacks:\n{text}")

    def _arm(self, code: int, before: float = 0.0) -> None:
        """This process ends with `code` within GUARD_SECONDS, and `before` more, even if it hangs on a file system."""
        if self._guard:
            self._guard.cancel()

        def now() -> None:
            self.child.kill_group()
            os._exit(code)

        self._guard = threading.Timer(before + GUARD_SECONDS, now)
        self._guard.daemon = True
        self._guard.start()

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"watch: {text}", file=sys.stderr, flush=True)
