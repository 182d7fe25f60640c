"""Small corpora for tests: words with accents, other scripts, tabs and line ends; always the same for a seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

_TEXT = "noise mask token shard λ naïve 語 def return  import\t None \n\n é😀 x=1 "
WORDS = re.split(" ", _TEXT)


def make_text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=words))


def write_corpus(folder: Path, documents: int, seed: int = 0, words: int = 60) -> dict[str, str]:
    """Text files in nested folders; gives {name as `prepare` sees it: text}."""
    rng = np.random.default_rng(seed)
    texts = {}
    for i in range(documents):
        path = folder / f"part{i % 3}" / f"doc{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = make_text(rng, int(rng.integers(1, 2 * words)))
        path.write_bytes(text.encode())
        texts[f"{folder.name}/part{i % 3}/doc{i:04d}.txt"] = text
    return dict(sorted(texts.items()))


def write_talks(path: Path, count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Titled conversations of one to four answers, one a line; every seventh line is of no use and not given back."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    talks = []
    with open(path, "w") as file:
        for number in range(count):
            texts = [make_text(rng, int(rng.integers(1, 12))).strip() or "x" for _ in range(2 * rng.integers(1, 5))]
            talk = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
            if number % 7 == 3:
                talk[-1]["role"] = "critic"
            else:
                talks.append(talk)
            file.write(json.dumps({"messages": talk, "title": f"talk {number}"}) + "\n")
    return talks


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".prepare.lock"
    }
