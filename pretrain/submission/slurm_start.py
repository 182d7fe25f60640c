"""Where the ranks of a Slurm job meet: the address of its first node, and a port there that stays this job's own.

    python -m pretrain.submission.slurm_start NODELIST          prints "ADDRESS PORT" and holds the port until its parent ends

The batch script runs it on the first node of the job, which is where rank 0 will run. The port is bound but not listened on:
Linux then gives it to nobody else, other jobs of any user included, but to a program that listens with SO_REUSEADDR, as
torch's store does. So there is no moment between the choice and the use of a port in which another job could take it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

PORTS = range(20000, 30000)  # below what the kernel hands out by itself (32768 and up)
ASK_SECONDS = 60  # a controller that restarts is back by then


class NoStart(RuntimeError):
    """Why the ranks cannot meet, and what to do, in one line."""


def candidates(job: int, ports: range) -> Iterator[int]:
    """Every port once, beginning at a place that follows from the job: two jobs rarely begin at the same one."""
    # 7919 is prime: jobs submitted one after the other begin far apart.
    first = job * 7919 % len(ports)
    return (ports[(first + i) % len(ports)] for i in range(len(ports)))


def ports_from(text: str) -> range:
    """ "20000-29999" as a range; NoStart if it is none."""
    found = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if not found or not 1024 <= int(found[1]) <= int(found[2]) <= 65535:
        raise NoStart(f"PALIMPSEST_PORTS is {text!r}: it must be FIRST-LAST, both between 1024 and 65535")
    return range(int(found[1]), int(found[2]) + 1)


def hold_port(ports: Iterable[int]) -> socket.socket:
    """A socket bound to the first of `ports` that nobody uses on this host; NoStart if there is none.

    While it is open nobody else can bind the port, but who sets SO_REUSEADDR may listen on it.
    """
    tried = 0
    for port in ports:
        held = socket.socket()
        try:
            held.bind(("", port))  # without SO_REUSEADDR: any other socket at this port is a refusal
        except OSError:
            held.close()
            tried += 1
            continue
        # Only now: the kernel asks both sides at the time of the second bind.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise NoStart(f"all {tried} ports tried on {socket.gethostname()} are in use: set PALIMPSEST_PORTS=FIRST-LAST")


def first_address(nodelist: str, ask: Callable[..., str]) -> str:
    """The address that Slurm itself reaches the first node of `nodelist` by; node names need not resolve."""
    node = ask("scontrol", "show", "hostnames", nodelist).splitlines()[0]
    found = re.search(r"\bNodeAddr=(\S+)", ask("scontrol", "--oneliner", "show", "node", node))
    return found[1] if found else node


def meeting_address(nodelist: str, ask: Callable[..., str]) -> str:
    """`first_address`; this host's own name if Slurm does not answer, since the batch script runs on the first node."""
    try:
        return first_address(nodelist, ask)
    except NoStart as error:
        name = socket.gethostname()
        print(f"warning: {error}; the ranks meet at this host's own name, {name}", file=sys.stderr, flush=True)
        return name


def ask_slurm(*command: str) -> str:
    """What a command of Slurm's prints, tried again for ASK_SECONDS; NoStart with its own words behind that."""
    deadline = time.monotonic() + ASK_SECONDS
    while True:
        try:
            done = subprocess.run(command, text=True, capture_output=True, timeout=ASK_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoStart(f"{' '.join(command)}: {error}") from None
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
        if time.monotonic() > deadline:
            raise NoStart(f"{' '.join(command)}: {done.stderr.strip() or 'no answer'}")
        time.sleep(2)


def main(arguments: list[str]) -> int:
    parent = os.getppid()
    try:
        ports = ports_from(os.environ.get("PALIMPSEST_PORTS", f"{PORTS.start}-{PORTS.stop - 1}"))
        address = meeting_address(arguments[0], ask_slurm)
        held = hold_port(candidates(int(os.environ.get("SLURM_JOB_ID", "0")), ports))
    except NoStart as error:
        print(f"error: the ranks have nowhere to meet: {error}", file=sys.stderr)
        return 1
    print(address, held.getsockname()[1], flush=True)
    while os.getppid() == parent:
        time.sleep(2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
