"""What ties a fit to the results that it was made of."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path


def digest_of(results: Path) -> str:
    """sha256 of what a fit takes from a study's results.csv: the rows that are done, and which are excluded.

    Not of the rest, which changes while cells run: where they are, in what words they failed. "" for a file that cannot be read.
    """
    try:
        with open(results, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return ""
    done = [{**row, "reason": ""} for row in rows if row.get("status") == "done"]
    excluded = [row.get("cell") for row in rows if row.get("status") == "excluded"]
    return hashlib.sha256(json.dumps([done, excluded], sort_keys=True).encode()).hexdigest()
