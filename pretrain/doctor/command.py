"""`doctor`: what this machine has and lacks for pretraining, and what to do about each lack.

Every check runs beside the others and has CHECK_SECONDS: one that raises or hangs (a dead network filesystem, a driver
in trouble) becomes a finding.
"""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data.errors import InputError
from pretrain.doctor import checks as look
from pretrain.doctor.checks import Finding, Machine
from pretrain.doctor.probes import REPOSITORY, one_line
from pretrain.json_file import write_json

CHECK_SECONDS = 10.0

Check = Callable[[Machine], Sequence[Finding]]

CHECKS: dict[str, Check] = {
    "Python": look.check_python,
    "torch": look.check_torch,
    "GPU links": look.check_gpu_links,
    "InfiniBand": look.check_infiniband,
    "packages": look.check_packages,
    "DeepSpeed ops": look.check_deepspeed_ops,
    "NVIDIA apex": look.check_apex,
    "Slurm": look.check_slurm,
    "tracking store": look.check_tracking_store,
    "disk": look.check_disk,
    "RAM": look.check_memory,
    "limits": look.check_limits,
}


def run_checks(checks: Mapping[str, Check], machine: Machine, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """All findings in the order of `checks`; takes at most `seconds`, and never raises."""
    found: dict[str, Sequence[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            found[name] = check(machine)
        except Exception as error:
            found[name] = [Finding(name, "warn", f"the check failed: {one_line(error)}", "the rest is not affected")]

    deadline = time.monotonic() + seconds
    # Daemon threads: one that hangs in a system call can be left behind, the process still ends.
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = "the machine may be busy or a network filesystem may hang: run doctor again"
    return [f for name in checks for f in found.get(name, [Finding(name, "warn", f"no answer in {seconds:g} s", late)])]


def run_doctor(folder: str | Path = ".") -> list[Finding]:
    """Looks at this machine, and at `folder` as the place that runs are written to; InputError if it is no folder."""
    if not Path(folder).is_dir():
        raise InputError(f"doctor: {folder} is not a folder: give an existing one (where runs will be written)")
    return run_checks(CHECKS, Machine(Path(folder), look.pinned_versions(REPOSITORY / "requirements.txt")))


def print_doctor(findings: Sequence[Finding]) -> None:
    """One line per finding, what to do below it; coloured and wrapped on a terminal, plain lines in a log."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    width = max(console.width, 60) if console.file.isatty() else sys.maxsize
    colours = {"ok": "green", "missing": "yellow", "warn": "bold red"}
    for finding in findings:
        line = Text(_hang(f"{finding.status:<8}{finding.name:<15} ", finding.detail, width))
        line.stylize(colours[finding.status], 0, len(finding.status))
        console.print(line)
        if finding.advice:
            console.print(Text(_hang(f"{'':<24}-> ", finding.advice, width), style="dim"))
    counts = {status: sum(f.status == status for f in findings) for status in colours}
    console.print(Text(f"\n{counts['ok']} ok, {counts['missing']} missing, {counts['warn']} to look at"))


def _hang(head: str, text: str, width: int) -> str:
    """`head` and `text`, broken between words at `width` columns, later lines below the start of `text`."""
    lines = textwrap.wrap(text, max(width - len(head), 1), break_long_words=False, break_on_hyphens=False)
    return head + f"\n{'':<{len(head)}}".join(lines)


def doctor(json_path: str | None = None, folder: str = ".") -> int:
    """Prints the findings, writes them to `json_path` as well if given, and returns 0: a report is not a failure."""
    if json_path:
        try:
            Path(json_path).touch()
        except OSError as error:
            raise InputError(f"doctor: --json {json_path}: {error.strerror}; choose another file") from None
    findings = run_doctor(folder)
    print_doctor(findings)
    if json_path:
        write_json(json_path, {"findings": [asdict(f) for f in findings]})
    return 0
