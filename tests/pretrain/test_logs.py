"""`logs` shows what all ranks said as one text, in order, once, from the end of files of any size."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from data.errors import InputError
from pretrain.logs.command import logs, moment_of
from pretrain.logs.files import RankFile, plain, split
from pretrain.logs.merge import FOLD_SECONDS
from pretrain.rank_set import ranges, ranks_of
from pretrain.watching.rank_log import STAMP, RankLog, log_path
from tests.distributed.launch import ROOT, environment

BEGIN = 1_800_000_000.0


def stamp(at: float) -> str:
    whole = int(at)
    return f"{time.strftime(STAMP, time.gmtime(whole))}.{round((at - whole) * 1000):03d}"


def write(run: Path, rank: int, said: list[tuple[float, str]]) -> Path:
    """Lines as RankLog writes them, at times of the test's own; what has no time is -1."""
    path = log_path(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for at, text in said:
            file.write(f"{text}\n" if at < 0 else f"{stamp(BEGIN + at)} {text}\n")
    return path


def shown(capsys, run: Path, **options) -> list[str]:
    assert logs(str(run), **options) == 0
    return capsys.readouterr().out.splitlines()


def texts(lines: list[str]) -> list[str]:
    """Rank and text of each line, without times, days and marks."""
    return [line[13:] for line in lines if not line.startswith("---")]


def test_the_format_is_that_of_the_writer(tmp_path, capsys):
    began = time.time()
    for rank in range(3):
        log = RankLog(tmp_path, rank, 3, "77-0-0")
        log.line("ready")
        if rank == 1:
            log.line("slow disk")
    lines = shown(capsys, tmp_path)
    assert [re.sub(r" on .*", "", line) for line in texts(lines)] == [
        "[0-2] === start 77-0-0: 3 of 3 ranks",
        "[0-2] ready",
        "[1] slow disk",
    ]
    at, text = split(log_path(tmp_path, 1).read_bytes().splitlines()[-1])
    assert text == "slow disk" and began - 0.01 <= at <= time.time()


def test_lines_are_in_the_order_of_time_with_what_belongs_to_them(tmp_path, capsys):
    write(tmp_path, 0, [(0, "a"), (2, "c"), (-1, "Traceback (most recent call last):"), (-1, '  File "x"'), (5, "e")])
    write(tmp_path, 1, [(1, "b"), (3.25, "d"), (-1, "of b's library")])
    lines = shown(capsys, tmp_path)
    assert lines[0] == "--- 2027-01-15 (UTC)"
    assert texts(lines) == [
        "[0] a",
        "[1] b",
        "[0] c",
        "    Traceback (most recent call last):",
        '      File "x"',
        "[1] d",
        "    of b's library",
        "[0] e",
    ]
    assert lines[6].startswith("08:00:03.250 ")


def reference(said: dict[int, list[tuple[float, str]]]) -> list[tuple[str, set[int]]]:
    """What must be shown, found without any of the product's tricks: all of it in memory, quadratic."""
    everything = sorted((at, rank, i, text) for rank, lines in said.items() for i, (at, text) in enumerate(lines))
    groups: list[tuple[float, str, set[int]]] = []
    for at, rank, _, text in everything:
        same = [g for g in groups if g[1] == text and at - g[0] <= FOLD_SECONDS]
        if same and rank not in same[-1][2]:
            same[-1][2].add(rank)
        else:
            groups.append((at, text, {rank}))
    return [(text, ranks) for _, text, ranks in groups]


@pytest.mark.parametrize("seed", range(6))
def test_random_logs_are_shown_as_a_plain_reading_of_all_of_them_would(tmp_path, capsys, seed):
    draw = random.Random(seed)
    said: dict[int, list[tuple[float, str]]] = {}
    for rank in range(draw.choice([1, 3, 9])):
        at, lines = draw.uniform(0, 5), []
        for _ in range(draw.choice([0, 7, 400, 900])):
            at += draw.expovariate(draw.choice([0.5, 5.0]))
            lines.append(
                (round(at, 3), draw.choice(["tick", "tock", f"word {draw.randrange(9)}", "x" * draw.randrange(200)]))
            )
        said[rank] = lines
        write(tmp_path, rank, lines)
    expected = [f"[{ranges(ranks)}] {text}" for text, ranks in reference(said)]

    def found(**options) -> list[str]:
        return [line.rstrip() for line in texts(shown(capsys, tmp_path, **options))]

    whole = [line.rstrip() for line in expected]
    assert found(last=100_000) == whole
    for last in (1, 7, 50, 300):
        assert found(last=last) == whole[-last:]
    assert found(grep="^t", last=20) == [line for line in whole if re.match(r"\[[\d,-]+(\.\.)?\] t", line)][-20:]
    # Groups that begin before `since` are cut by it, so ranks alone are compared with the plain reading.
    since = draw.uniform(0, 100)
    moment = time.strftime(STAMP, time.gmtime(BEGIN + int(since)))
    later = {rank: [(at, text) for at, text in lines if at >= int(since)] for rank, lines in said.items()}
    assert found(since=moment) == [f"[{ranges(ranks)}] {text}".rstrip() for text, ranks in reference(later)]


def test_the_same_words_of_many_ranks_are_one_line_of_one_rank_two(tmp_path, capsys):
    for rank in (0, 1, 2, 4):
        write(tmp_path, rank, [(rank * 0.1, "loading"), (3, "ready"), (3.5, "ready")])
    assert texts(shown(capsys, tmp_path)) == ["[0-2,4] loading", "[0-2,4] ready", "[0-2,4] ready"]


def test_one_start_of_several_can_be_chosen(tmp_path, capsys):
    for rank in range(2):
        for i, launch in enumerate(("77-0-0", "77-0-1", "77-0-2")):
            header = f"=== start {launch}: rank {rank} of 2 on n{rank}, process {10 * i + rank}"
            write(tmp_path, rank, [(100 * i, header), (100 * i + 10, f"work {i}"), (-1, "more")])
    write(tmp_path, 2, [(0, "=== start 77-0-0: rank 2 of 3 on n2, process 9"), (1, "only in the first")])
    middle = texts(shown(capsys, tmp_path, start="77-0-1"))
    assert middle == ["[0-1] === start 77-0-1: 2 of 2 ranks on n0, n1", "[0-1] work 1", "      more"]
    assert texts(shown(capsys, tmp_path, start="last"))[1] == "[0-1] work 2"
    assert "[2] only in the first" in texts(shown(capsys, tmp_path, start="77-0-0"))
    assert texts(shown(capsys, tmp_path, start="77-0-1", last=1)) == ["[0-1] work 1", "      more"]
    with pytest.raises(InputError, match="no rank knows it; the newest is 77-0-2"):
        logs(str(tmp_path), start="77-0-9")


def test_a_rank_that_falls_silent_while_others_speak_is_marked(tmp_path, capsys):
    write(tmp_path, 0, [(10 * i, f"step {i}") for i in range(100)])
    write(tmp_path, 1, [(10 * i + 1, f"mine {i}") for i in [*range(20), *range(60, 70)]])
    write(tmp_path, 2, [(5, "hello")])  # says little: nothing to mark
    lines = shown(capsys, tmp_path)
    marks = [line for line in lines if "silent" in line]
    assert marks == ["--- [1] silent for 6 min 50 s", "--- [1] silent for the last 4 min 59 s"]
    assert lines[lines.index(marks[0]) + 1].endswith("[1] mine 60") and lines[-1] == marks[1]


def test_a_pause_of_all_ranks_is_one_mark(tmp_path, capsys):
    for rank in range(2):
        write(tmp_path, rank, [(t, f"{rank} at {t}") for t in [*range(0, 100, 10), *range(1000, 1100, 10)]])
    lines = shown(capsys, tmp_path)
    assert [line for line in lines[1:] if line.startswith("---")] == ["--- nobody said anything for 15 min 10 s"]


def test_what_a_terminal_would_take_for_commands_is_made_visible(tmp_path, capsys):
    path = write(tmp_path, 0, [(0, "a")])
    with open(path, "ab") as file:
        file.write(
            stamp(BEGIN + 1).encode()
            + b" 10%\r50%\rdone \x1b[31mred\x1b[0m\x07\xff \xc3\xa9\n"
            + b"y" * 100_000
            + b"\n"
        )
    lines = shown(capsys, tmp_path)
    assert texts(lines)[1] == "[0] done red\\x07\ufffd \u00e9"
    assert lines[-1].strip().startswith("yyy") and lines[-1].endswith(" ...") and len(lines[-1]) < 20_000
    assert plain(b"tab\tstays\r\n") == "tab\tstays"


def test_a_thousand_ranks_with_large_logs_are_read_from_their_ends_in_little_memory(tmp_path, capsys):
    line = "step 12345: 0.071 s, of which 0.003 s waiting for data"
    block = "".join(f"{stamp(BEGIN + i * 0.01)} {line} {i}\n" for i in range(400))
    (tmp_path / "logs").mkdir()
    for rank in range(1000):
        log_path(tmp_path, rank).write_text(block)
    with open(log_path(tmp_path, 7), "a") as file:  # one that is huge: 256 MiB
        large = "".join(f"{stamp(BEGIN + 4 + i * 0.01)} chatter {i}\n" for i in range(20_000))
        for _ in range((256 << 20) // len(large)):
            file.write(large)
        file.write(f"{stamp(BEGIN + 20_000)} the last word\n")
    tracemalloc.start()
    began = time.process_time()  # of this process: the machine may be busy
    lines = shown(capsys, tmp_path, last=20)
    took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines[-2].endswith("[7] the last word") and lines[-1].startswith("--- [")
    assert peak < 100e6 and took < 20


def test_lines_without_any_time_are_searched_only_so_far(tmp_path, capsys):
    path = write(tmp_path, 0, [(0, "begin")])
    with open(path, "a") as file:
        for i in range(400_000):
            file.write(f"NCCL INFO {i} without any time\n")
    began = time.process_time()
    lines = shown(capsys, tmp_path, last=5)
    assert time.process_time() - began < 3
    assert lines[-1].endswith("NCCL INFO 399999 without any time") and len(lines) < 1000
    assert any("lines left out" in line for line in lines)
    assert not any("begin" in line for line in lines), "it is further up than is searched"


def wait_for(stream, words: str) -> str:
    """Lines up to the one with these words; the test's own time limit ends it otherwise."""
    said = ""
    for line in stream:
        said += line
        if words in line:
            return said
    raise AssertionError(f"ended without {words!r}:\n{said}")


def test_following_shows_what_comes_also_of_ranks_that_come(tmp_path):
    log = RankLog(tmp_path, 0, 2, "77-0-0")
    code = f"from pretrain.logs.command import logs; raise SystemExit(logs({str(tmp_path)!r}, follow=True))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        wait_for(process.stdout, "=== start")
        log.line("first")
        with open(log.path, "a") as file:
            file.write("Traceback\n  belongs to first\n")
        assert re.search(r"\[0\] first\n +Traceback\n +belongs to first", wait_for(process.stdout, "belongs"))
        other = RankLog(tmp_path, 1, 2, "77-0-0")
        log.line("together")
        other.line("together")
        wait_for(process.stdout, "[0-1] together")
        other.path.write_text("")  # cut, and begun anew
        other.line("anew")
        wait_for(process.stdout, "[1] anew")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    write(tmp_path, 0, [(i, f"line {i} " + "x" * 500) for i in range(2000)])
    code = f"from pretrain.logs.command import logs; raise SystemExit(logs({str(tmp_path)!r}, last=2000))"
    command = f"{sys.executable} -c {code!r} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "--- 2027-01-15 (UTC)\n" and done.stderr == ""


def test_colours_are_for_terminals_alone(tmp_path):
    write(tmp_path, 0, [(0, "an error")])
    code = f"from pretrain.logs.command import logs; logs({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    env = environment(TERM="xterm")
    env.pop("NO_COLOR", None)
    plainly = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60, env=env).stdout
    on_terminal = subprocess.run(
        ["script", "-qec", f"{sys.executable} -c {code!r}", "/dev/null"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        env=env,
    ).stdout
    assert "\x1b" not in plainly and "\x1b[31man error" in on_terminal


def test_times_can_be_said_in_many_ways():
    now = BEGIN + 3600
    assert moment_of("10m", now) == now - 600 and moment_of("1.5h", now) == now - 5400
    assert moment_of("2027-01-15T08:00:05", now) == moment_of("2027-01-15 08:00:05", now) == BEGIN + 5
    assert moment_of("2027-01-15T08:00", now) == moment_of("08:00", now) == moment_of("8:00:00", now) == BEGIN
    assert moment_of("2027-01-15", now) == BEGIN - 8 * 3600
    assert ranks_of("0,3-5", "x") == {0, 3, 4, 5} and ranges({5, 0, 4, 3}) == "0,3-5"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ranks": "0,x"}, "--ranks is '0,x', it must be like 0,3-5"),
        ({"ranks": "5-3"}, "--ranks"),
        ({"ranks": "0,9"}, "--ranks 9: no log of that; there are logs of ranks 0"),
        ({"last": 0}, "--last is 0"),
        ({"since": "yesterday"}, "--since is 'yesterday'"),
        ({"since": "2027-02-31"}, "--since"),
        ({"grep": "("}, "--grep"),
        ({"start": "nothing"}, "no rank knows it"),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, words):
    write(tmp_path, 0, [(0, "a")])
    with pytest.raises(InputError) as error:
        logs(str(tmp_path), **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_logs_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        logs(str(tmp_path))
    (tmp_path / "logs").mkdir()
    with pytest.raises(InputError, match="holds no rank-NNNNN.log"):
        logs(str(tmp_path))


def test_a_place_in_time_is_found_in_a_file_as_reading_all_of_it_would_find_it(tmp_path):
    draw = random.Random(3)
    at, said = 0.0, []
    for i in range(3000):
        at += draw.expovariate(1.0)
        said.append((round(at, 3), f"{i} " + "z" * draw.randrange(300)))
        if draw.random() < 0.2:
            said.append((-1, "no time " * draw.randrange(40)))
    path = write(tmp_path, 0, said)
    content = path.read_bytes()
    file = RankFile(path, 0)
    for since in [-5.0, 0.0, at, at + 1, *(draw.uniform(0, at) for _ in range(40))]:
        first = next((f"{stamp(BEGIN + t)} {text}\n" for t, text in said if t >= since and t >= 0), None)
        expected = len(content) if first is None else content.index(first.encode())
        assert file.from_time(BEGIN + since) == expected
