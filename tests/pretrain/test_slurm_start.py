"""Where the ranks of a job meet, and the words of a study's cell: what needs no Slurm to be shown."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from data.errors import InputError
from pretrain.submission.slurm_cell import cell
from pretrain.submission.slurm_start import NoStart, candidates, first_address, hold_port, meeting_address, ports_from
from tests.distributed.launch import ROOT, free_port


def listens(port: int, reuse: bool) -> bool:
    """Whether another program can listen at this port."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        try:
            other.bind(("", port))
            other.listen()
        except OSError:
            return False
    return True


def test_a_held_port_is_no_other_jobs_and_no_strangers_but_the_ranks_can_meet_there():
    port = free_port()
    held = hold_port([port])
    with pytest.raises(NoStart, match="in use"):
        hold_port([port])
    assert not listens(port, reuse=False)
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
    store.set("met", "yes")
    assert store.get("met") == b"yes"
    del store
    held.close()
    assert listens(port, reuse=True)


def test_a_port_that_somebody_uses_is_passed_over():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken, free = stranger.getsockname()[1], free_port()
        held = hold_port([taken, free])
        assert held.getsockname()[1] == free
        held.close()


@pytest.mark.parametrize("job", [0, 1, 17, 4_000_000])
def test_every_port_is_tried_once_from_a_place_that_follows_from_the_job(job):
    ports = range(20000, 20150)
    assert sorted(candidates(job, ports)) == list(ports)
    assert next(candidates(job, ports)) != next(candidates(job + 1, ports))


def test_a_range_of_ports_is_checked():
    assert ports_from("20000-20001") == range(20000, 20002)
    for text in ("20000", "20001-20000", "80-90", "60000-70000", "a-b", ""):
        with pytest.raises(NoStart, match="PALIMPSEST_PORTS"):
            ports_from(text)


def test_the_address_is_slurms_own_of_the_first_node():
    answers = {
        ("scontrol", "show", "hostnames", "n[3-4]"): "n3\nn4\n",
        ("scontrol", "--oneliner", "show", "node", "n3"): "NodeName=n3 Arch=x86_64 NodeAddr=10.0.0.3 NodeHostName=n3\n",
    }
    assert first_address("n[3-4]", lambda *command: answers[command]) == "10.0.0.3"


def test_without_slurms_answer_the_ranks_meet_at_this_hosts_own_name(capsys):
    """The batch script, and so this helper, runs on the first node."""

    def away(*command: str) -> str:
        raise NoStart("scontrol: Unable to contact slurm controller")

    assert meeting_address("n[3-4]", away) == socket.gethostname()
    assert "Unable to contact slurm controller; the ranks meet at this host's own name" in capsys.readouterr().err
    assert meeting_address("n3", lambda *command: "n3\n") == "n3"


def test_the_helper_holds_the_port_until_its_parent_ends(tmp_path):
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\necho n1 NodeAddr=127.0.0.1\n")
    fake.chmod(0o755)
    port = free_port()
    start = 'exec {fd}< <(exec "$0" -m pretrain.submission.slurm_start n1)'
    program = f'{start}; read -r address port <&"$fd"; echo "$address $port"; read -r'
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PALIMPSEST_PORTS": f"{port}-{port}"}
    parent = subprocess.Popen(
        ["bash", "-c", program, sys.executable],
        cwd=ROOT,
        env=environ,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout and parent.stdin
    assert parent.stdout.readline() == f"127.0.0.1 {port}\n"
    assert not listens(port, reuse=False)
    parent.stdin.close()
    parent.wait(timeout=10)
    deadline = time.monotonic() + 10
    while not listens(port, reuse=False):
        assert time.monotonic() < deadline, "the helper outlived its parent"
        time.sleep(0.1)


def test_a_cell_is_its_run_folder_and_the_words_of_its_line(tmp_path):
    (tmp_path / "a b.yaml").write_text("run: {dir: runs, name: one}\n")
    cells = tmp_path / "cells.txt"
    nasty = "$(touch pwned);x"
    cells.write_text(
        f"'{tmp_path}/a b.yaml'\n'{tmp_path}/a b.yaml' --run.name two --run.dir '{tmp_path}/{nasty}'\n\n--x y\n'a\n"
    )
    assert cell(cells, 1) == [os.path.abspath("runs/one"), f"{tmp_path}/a b.yaml"]
    assert cell(cells, 2)[0] == f"{tmp_path}/{nasty}/two"
    assert cell(cells, 2)[2:] == ["--run.name", "two", "--run.dir", f"{tmp_path}/{nasty}"]
    for number, said in {0: "no line 0", 3: "must begin", 4: "must begin", 5: "cannot be read", 9: "no line 9"}.items():
        with pytest.raises(InputError, match=said):
            cell(cells, number)
