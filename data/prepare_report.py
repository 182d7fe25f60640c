"""What `prepare` tells when it is done, read from the published sets themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.encoding import DROP_REASONS
from data.progress import StageTime, duration
from data.shard_set import ShardSet


@dataclass(frozen=True)
class SetReport:
    """One published set; `fill` is the share of its tokens that are no padding."""

    folder: Path
    documents: int
    tokens: int
    utf8_bytes: int
    shards: int
    split_documents: int
    truncated_documents: int
    row_tokens: int
    fill: float

    def lines(self, name: str) -> list[str]:
        """What is in the set, and what was done to its documents."""
        bytes_each = self.utf8_bytes / (self.fill * self.tokens)
        lines = [
            f"{name}: {self.documents:,} documents, {self.tokens:,} tokens ({bytes_each:.2f} bytes each)"
            f" in {self.shards} shard{'s' if self.shards > 1 else ''} at {self.folder}"
        ]
        if self.row_tokens:
            rows = self.tokens // self.row_tokens
            lines.append(f"{name}: {rows:,} rows of {self.row_tokens:,} tokens, {100 * self.fill:.1f}% filled")
        if self.truncated_documents:
            lines.append(
                f"{name}: {self.truncated_documents:,} of them lost their end, being longer than the limit;"
                " --long_documents split keeps it"
            )
        if self.split_documents:
            lines.append(f"{name}: {self.split_documents:,} of them are stored in several pieces")
        return lines


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` made or found; `resumed_shards` were finished by an earlier, interrupted run.

    times: of the stages `reading` (the survey) and `encoding` (which reads once more), as far as they ran.
    """

    sets: dict[str, SetReport]
    vocab_size: int
    skipped: dict[str, int]
    seconds: float
    times: dict[str, StageTime]
    resumed_shards: int = 0
    already_complete: bool = False

    def lines(self) -> list[str]:
        """The report for a person: some lines for each set and one for what was left out."""
        lines = [line for name, report in self.sets.items() for line in report.lines(name)]
        if self.skipped:
            lines.append("skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items()))
        done = (
            "nothing to do, it was complete already" if self.already_complete else f"done in {duration(self.seconds)}"
        )
        if stages := ", ".join(f"{name} {duration(time.wall)}" for name, time in self.times.items()):
            done += f" ({stages})"
        return [*lines, f"{done}; vocabulary {self.vocab_size:,}"]


def report_sets(
    out: Path,
    names: Sequence[str],
    skipped: Counter[str],
    seconds: float,
    times: dict[str, StageTime],
    resumed: int,
    already_complete: bool,
) -> PrepareReport:
    """Open every published set once more, so that a report means that the sets can be read.

    skipped: what the reading of the inputs left out; what was dropped for its length is added from the sets.
    """
    opened = {name: ShardSet.open(out / name, verify="size").manifest for name in names}
    for manifest in opened.values():
        for source in manifest.sources:
            skipped = skipped + Counter({reason: source.skipped.get(reason, 0) for reason in DROP_REASONS})
    sets = {
        name: SetReport(
            folder=out / name,
            documents=manifest.documents,
            tokens=manifest.tokens,
            utf8_bytes=manifest.utf8_bytes,
            shards=len(manifest.shards),
            split_documents=manifest.split_documents,
            truncated_documents=manifest.truncated_documents,
            row_tokens=manifest.row_tokens,
            fill=1 - manifest.padding_tokens / manifest.tokens,
        )
        for name, manifest in opened.items()
    }
    return PrepareReport(
        sets, opened[names[0]].vocab_size, dict(sorted(skipped.items())), seconds, times, resumed, already_complete
    )
