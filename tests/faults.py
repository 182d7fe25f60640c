"""Faults that tests inject, and the page that their results write: docs/faults.md.

A test that injects a fault says so:

    @pytest.mark.fault("SIGKILL of one rank", happens="...", lost="...")
    def test_...(measured):
        measured("named after", f"{seconds:.1f} s")

Every passing one leaves a record in build/faults/. `python -m tests.faults` writes the page from the records of this checkout, and
fails if a test that is marked has left none: a row of the page is a test that has passed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "build" / "faults"
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# Faults: what happens, what is lost, and the test that shows it

Written by `make faults` from the results of the tests themselves: each row is a fault that was injected into real processes, and a
test that passed. "Measured" is what that run measured, on two slow processor cores.

| fault | what happens | what is lost | measured | test |
|---|---|---|---|---|
"""


@dataclass
class Record:
    """One passed test of one fault."""

    test: str
    fault: str
    happens: str
    lost: str
    measured: dict[str, str] = field(default_factory=dict)

    def path(self) -> Path:
        return RECORDS / f"{hashlib.sha256(self.test.encode()).hexdigest()[:16]}.json"

    def write(self) -> None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        self.path().write_text(json.dumps(asdict(self), indent=1))


def row(records: list[Record]) -> str:
    """The line of one test, of all its cases."""
    first = records[0]
    measured = "; ".join(f"{what} {value}" for record in records for what, value in record.measured.items())
    function = first.test.partition("[")[0] + (f" ({len(records)} cases)" if len(records) > 1 else "")
    cells = (first.fault, first.happens, first.lost, measured or "-", function)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def marked_tests() -> list[str]:
    """Ids of all tests that say that they inject a fault, whether they ran or not."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "fault"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [line for line in listed.stdout.splitlines() if "::" in line]
    if not found:
        raise SystemExit(f"faults: no test could be listed:\n{listed.stdout[-2000:]}{listed.stderr[-2000:]}")
    return found


def main() -> int:
    tests = marked_tests()
    records = [Record(**json.loads(path.read_text())) for path in sorted(RECORDS.glob("*.json"))]
    passed = {record.test: record for record in records}
    if missing := [test for test in tests if test not in passed]:
        print("faults: no result of\n  " + "\n  ".join(missing) + "\nrun them first (make faults)", file=sys.stderr)
        return 1
    groups: dict[tuple[str, str], list[Record]] = {}
    for test in tests:
        groups.setdefault((test.partition("[")[0], passed[test].fault), []).append(passed[test])
    PAGE.write_text(HEAD + "\n".join(row(records) for records in groups.values()) + "\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(groups)} faults, {len(tests)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
