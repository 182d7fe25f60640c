"""Tables of results whose rows are planned before anything runs: none can go missing without a printed reason."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NOT_REACHED = "not run: the task ended before this row"
GIB = 2**30


@dataclass
class Table:
    """rows: label -> cells by column, plus `status`: `ok`, or why there are none ("not run: ...", "failed: ...")."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Any]]
    notes: list[str]

    @classmethod
    def planned(cls, key: str, title: str, columns: tuple[str, ...], labels: list[str], *notes: str) -> Table:
        return cls(key, title, columns, {label: {"status": NOT_REACHED} for label in labels}, list(notes))

    def fill(self, label: str, cells: dict[str, Any]) -> None:
        """Gives a planned row its figures. Raises KeyError for a row or a column that was not planned."""
        for column in cells:
            if column not in self.columns:
                raise KeyError(f"{self.key}: no column {column}")
        self.rows[label].update(cells, status="ok")

    def refuse(self, label: str, why: str) -> None:
        self.rows[label]["status"] = why

    def refuse_rest(self, why: str) -> None:
        """Gives every row that is still to come the reason why it does not."""
        for row in self.rows.values():
            if row["status"] == NOT_REACHED:
                row["status"] = why

    def markdown(self) -> str:
        header = ["", *self.columns]
        lines = [[label, *self._cells(row)] for label, row in self.rows.items()]
        widths = [len(name) for name in header]
        for line, row in zip(lines, self.rows.values(), strict=True):
            for i, cell in enumerate(line if row["status"] == "ok" else line[:1]):  # a reason may run over its column
                widths[i] = max(widths[i], len(cell))
        text = [f"### {self.title}", "", _row(header, widths), _row(["-" * w for w in widths], widths)]
        text += [_row(line, widths) for line in lines]
        return "\n".join([*text, "", *(f"- {note}" for note in self.notes)])

    def _cells(self, row: dict[str, Any]) -> list[str]:
        if row["status"] != "ok":
            return [row["status"]] + [""] * (len(self.columns) - 1)
        return [cell_text(column, row.get(column)) for column in self.columns]


def _row(cells: list[str], widths: list[int]) -> str:
    return "| " + " | ".join(f"{cell:{width}s}" for cell, width in zip(cells, widths, strict=True)) + " |"


def cell_text(column: str, value: Any) -> str:
    """A figure as a person reads it; the JSON keeps it raw (seconds, bytes, FLOP/s, fractions)."""
    if value is None:
        return "-"
    if isinstance(value, dict):  # a timing
        return timing_text(**value)
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, (int, float)):
        return str(value)
    if column in ("MFU", "masked"):
        return f"{value:.1%}"
    if column.endswith("GiB"):
        return f"{value / GIB:.1f}"
    if column.endswith("MiB"):
        return f"{value / 2**20:.0f}"
    if column.endswith("TFLOP/s"):
        return f"{value / 1e12:.4g}"
    if column == "tokens/s":
        return f"{value:,.0f}"
    if column.startswith("x "):
        return f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def timing_text(median_s: float, least_s: float, most_s: float, repeats: int) -> str:
    """`median (least-most, n=repeats)` in milliseconds."""
    digits = 1 if median_s >= 0.1 else 2 if median_s >= 0.001 else 3
    median, least, most = (f"{x * 1e3:.{digits}f}" for x in (median_s, least_s, most_s))
    return f"{median} ({least}-{most}, n={repeats})"


def write_tables(file: Path, tables: list[Table], **more: Any) -> None:
    """All tables as JSON, replaced as a whole, so that a reader never sees half of one."""
    fresh = file.with_suffix(".part")
    fresh.write_text(json.dumps({**more, "tables": [asdict(t) for t in tables]}, indent=1))
    fresh.replace(file)


def read_tables(file: Path) -> tuple[list[Table], dict[str, Any]]:
    """(the tables, what else was written with them)."""
    content = json.loads(file.read_text())
    return [Table(**{**t, "columns": tuple(t["columns"])}) for t in content.pop("tables")], content
