"""Show one training sample to a person: what is masked, where documents begin, what is prompt, what is padding."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

# Each state: how it looks in colour (an ANSI code), and the marks around it without.
STYLES = {
    "plain": ("", "", ""),
    "masked": ("30;43", "[", "]"),
    "prompt": ("36", "{", "}"),
    "dropped": ("9;31", "{-", "-}"),
    "padding": ("2", "<", ">"),
}
LEGEND = {
    "masked": "masked, to be predicted",
    "prompt": "prompt or condition, shown clean",
    "dropped": "condition, dropped",
    "padding": "padding",
}


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], show_special: bool = False) -> str:
        """The text of some token ids."""
        ...


class _Run(NamedTuple):
    state: str
    begin: int
    end: int


def render_sample(
    tokens: np.ndarray,
    masked: np.ndarray,
    document_starts: np.ndarray,
    prompt: np.ndarray,
    padding: np.ndarray,
    dropped: bool,
    t: float | np.ndarray,
    weight: np.ndarray,
    tokenizer: Decoder,
    width: int = 100,
    colour: bool = True,
) -> str:
    """A sample of L tokens as lines of at most `width` columns, readable with colours and, by marks, without.

    tokens: [L] ids before masking. masked, prompt, padding: bool [L]. document_starts: ascending positions in [0, L).
    dropped: the prompt was hidden from the model. t: the noise level of the sample, or [L]. weight: [L], of the loss.
    Control characters of the text are shown as their pictures: no document can steer the terminal.

    Raises ValueError when the arrays have different lengths.
    """
    length = len(tokens)
    levels = np.broadcast_to(np.asarray(t, np.float64), (length,))
    for name, array in (("masked", masked), ("prompt", prompt), ("padding", padding), ("weight", weight)):
        if len(array) != length:
            raise ValueError(f"{name} has {len(array)} entries, tokens has {length}")
    state = np.full(length, 0)
    names = list(STYLES)
    state[np.asarray(prompt, bool)] = names.index("dropped" if dropped else "prompt")
    state[np.asarray(masked, bool)] = names.index("masked")
    state[np.asarray(padding, bool)] = names.index("padding")
    starts = sorted({int(s) for s in np.asarray(document_starts) if 0 < s < length})
    lines = list(_head(length, state, names, len(starts), dropped, levels, weight, colour))
    borders = [0, *starts, length]
    for number, (begin, end) in enumerate(zip(borders, borders[1:])):
        if number:
            lines.append(_border(number + 1, begin, end, levels, weight, state == names.index("masked"), width))
        cells: list[tuple[str, str]] = []
        for run in _runs(state[begin:end], names, begin):
            cells += _cells(run, tokens, tokenizer, colour)
        lines += _wrap(cells, width, colour)
    return "\n".join(lines)


def _head(
    length: int,
    state: np.ndarray,
    names: list[str],
    borders: int,
    dropped: bool,
    levels: np.ndarray,
    weight: np.ndarray,
    colour: bool,
) -> Iterator[str]:
    counts = {name: int((state == names.index(name)).sum()) for name in names}
    noise = f"t {levels[0]:.4f}" if length and (levels == levels[0]).all() else "t of each document"
    share = 100 * counts["masked"] / max(length - counts["padding"] - counts["prompt"] - counts["dropped"], 1)
    counted = np.asarray(weight)[state == names.index("masked")]
    mean = f", weight {counted.mean():.3f}" if len(counted) else ""
    hidden = f", {counts['dropped']} prompt tokens dropped" if dropped else f", {counts['prompt']} prompt tokens"
    yield (
        f"{length} tokens, {borders + 1} document{'s' if borders else ''}, {noise}, {counts['masked']} masked"
        f" ({share:.1f}%){mean}{hidden}, {counts['padding']} padding"
    )
    shown = [name for name in LEGEND if counts[name]]
    if shown:
        yield "  ".join(f"{_painted(name, 'text', colour)} {LEGEND[name]}" for name in shown)


def _border(
    number: int, begin: int, end: int, levels: np.ndarray, weight: np.ndarray, masked: np.ndarray, width: int
) -> str:
    here = masked[begin:end]
    said = f"── document {number}, {end - begin} tokens, t {levels[begin]:.4f}, {int(here.sum())} masked"
    if here.any():
        said += f", weight {np.asarray(weight)[begin:end][here].mean():.3f}"
    return (said + " ").ljust(width, "─")[:width]


def _runs(state: np.ndarray, names: list[str], first: int) -> Iterator[_Run]:
    at = first
    for value, group in groupby(state.tolist()):
        count = len(list(group))
        yield _Run(names[value], at, at + count)
        at += count


def _cells(run: _Run, tokens: np.ndarray, tokenizer: Decoder, colour: bool) -> Iterator[tuple[str, str]]:
    """(character or line end, state) of the text of a run; padding is told, not shown."""
    if run.state == "padding":
        text = f"padding x {run.end - run.begin}"
    else:
        text = tokenizer.decode([int(i) for i in tokens[run.begin : run.end]], show_special=True)
    _, before, after = STYLES[run.state]
    if not colour:
        text = f"{before}{text}{after}"
    for character in text:
        if character == "\n":
            yield "↵", run.state
            yield "\n", run.state
        else:
            yield _visible(character), run.state


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "→"
    if code < 32:
        return chr(0x2400 + code)
    kind = unicodedata.category(character)
    # Other controls, directions of writing, halves of pairs, line separators: what a terminal might obey or stumble over.
    return "\N{REPLACEMENT CHARACTER}" if code == 127 or kind in ("Cc", "Cf", "Cs", "Zl", "Zp") else character


def _wrap(cells: Sequence[tuple[str, str]], width: int, colour: bool) -> Iterator[str]:
    line: list[tuple[str, str]] = []
    used = 0
    for character, state in cells:
        columns = _columns(character)
        if character == "\n" or used + columns > width:
            yield _line(line, colour)
            line, used = [], 0
        if character != "\n":
            line.append((character, state))
            used += columns
    if line:
        yield _line(line, colour)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _line(cells: Sequence[tuple[str, str]], colour: bool) -> str:
    if not colour:
        return "".join(character for character, _ in cells)
    runs = groupby(cells, key=lambda cell: cell[1])
    return "".join(_painted(state, "".join(character for character, _ in run), True) for state, run in runs)


def _painted(state: str, text: str, colour: bool) -> str:
    code, before, after = STYLES[state]
    if colour:
        return f"\x1b[{code}m{text}\x1b[0m" if code else text
    return f"{before}{text}{after}"
