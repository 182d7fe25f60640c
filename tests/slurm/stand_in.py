"""Stands where `python -m pretrain` is, in tests of what Slurm and slurm/pretrain.sbatch do: no torch, starts in milliseconds.

A submitted folder whose code/pretrain/__main__.py is this file runs it. config.yaml (JSON here) says what happens:
    steps, seconds    steps to take in all, and how long each takes
    code              what to end with behind the last step
    save_seconds      how long leaving takes
    ignore            signals do nothing
`watch train`: rank 0 listens where all ranks are told to meet, takes the steps, and notes each as a line of steps.jsonl; every
rank notes the signals that it gets in signals.txt. `restart`: 75 stays 75, and so does every end that is no 0 and no 2, as
the real one decides for a first fault, unless a file `decision` in the run folder says a code; told.txt notes what it was asked
and what had ended the start, looked-back.txt a question after an end that nobody noted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path


def note(file: Path, *words: object) -> None:
    with open(file, "a") as out:  # one write: lines of several ranks stay whole
        out.write(" ".join(map(str, words)) + "\n")


def meet(rank: int, world: int) -> list[socket.socket]:
    """Rank 0: a connection to each other rank; others: one to rank 0."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.create_server(address, backlog=world)  # with SO_REUSEADDR, as torch's store
        server.settimeout(30)
        found = []
        for _ in range(world - 1):
            peer, _ = server.accept()
            found.append(peer)
        return found
    deadline = time.monotonic() + 30
    while True:
        try:
            return [socket.create_connection(address, timeout=120)]
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def train(config: Path) -> int:
    options = json.loads(config.read_text())
    folder, start = config.parent, os.environ.get("SLURM_RESTART_COUNT", "0")
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        note(folder / "signals.txt", signal.Signals(number).name, rank, start, round(time.time(), 3))
        asked.append(number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    peers = meet(rank, world)
    if rank:
        code = peers[0].recv(1)
        return code[0] if code else 1
    note(folder / "meetings.txt", os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], "start", start)
    steps = folder / "steps.jsonl"
    taken = len(steps.read_text().splitlines()) if steps.exists() else 0
    code = options.get("code", 0)
    while taken < options["steps"]:
        time.sleep(options["seconds"])
        if asked and not options.get("ignore"):
            time.sleep(options.get("save_seconds", 0))
            code = 75
            break
        taken += 1
        note(steps, json.dumps({"step": taken, "start": start, "host": os.environ["SLURMD_NODENAME"]}))
    for peer in peers:
        peer.sendall(bytes([code]))
    return code


def restart(run: Path, code: int) -> int:
    why = os.environ["PALIMPSEST_ENDED_BY"]
    note(run / ("looked-back.txt" if why == "lost" else "told.txt"), code, why)
    decision = run / "decision"
    return code if code in (0, 2) else int(decision.read_text()) if decision.exists() else 75


def main(arguments: list[str]) -> int:
    values = dict(zip(arguments[1::1], arguments[2::1]))
    if arguments[0] == "watch":
        return train(Path(values["--config"]))
    return restart(Path(values["--run"]), int(values["--code"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
