"""Every outcome of a report as one CSV row: for pandas, R or a spreadsheet."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase import files

COLUMNS = ("report", "sample", "prompt", "score", "base", "erased")


def write_table(path: str | Path, results: Mapping[str, Any], outcomes: Mapping[str, Any]) -> int:
    """Write one row per image and score that looked at it, and return their number.

    A rate's outcome is 1 or 0, a mean's is its value; `base` is empty without a base model.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    num = 0
    for name, arms in outcomes["columns"].items():
        for place, erased in enumerate(arms["erased"]):
            if erased is None:
                continue
            sample, prompt = outcomes["samples"][place], outcomes["clusters"][place]
            base = arms["base"][place] if "base" in arms else None
            writer.writerow([results["name"], sample, prompt, name, _number(base), _number(erased)])
            num += 1
    files.write_text(path, text.getvalue())
    return num


def _number(value: bool | float | None) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else repr(value)
