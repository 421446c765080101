"""Every outcome of a report as one row, CSV or Parquet: for pandas, R or a spreadsheet."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from erase import files
from erase.errors import EraseError, missing

COLUMNS = ("report", "sample", "prompt", "score", "base", "erased")
SUFFIXES = (".csv", ".parquet")


def write_table(path: str | Path, results: Mapping[str, Any], outcomes: Mapping[str, Any]) -> int:
    """Write one row per image and score that looked at it, and return their number.

    A rate's outcome is 1 or 0, a mean's is its value; `base` is empty without a base model.

    path: ends in .csv or .parquet.

    Raises:
        EraseError: another ending, or pyarrow is not installed.
    """
    kind = Path(path).suffix.lower()
    if kind not in SUFFIXES:
        raise EraseError(f"{path} ends in {kind or 'nothing'!r}; choose a name that ends in {' or '.join(SUFFIXES)}")
    rows = list(_rows(results, outcomes))
    if kind == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*row[:4], *map(_number, row[4:])] for row in rows)
        files.write_text(path, text.getvalue())
        return len(rows)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing("pyarrow") from error
    types = [pyarrow.string()] * 4 + [pyarrow.float64()] * 2
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in COLUMNS]
    columns[4:] = [[None if value is None else float(value) for value in column] for column in columns[4:]]
    table = pyarrow.table(dict(zip(COLUMNS, columns, strict=True)), schema=schema)
    with files.replacing(path) as temporary:
        parquet.write_table(table, temporary)
    return len(rows)


def _rows(results: Mapping[str, Any], outcomes: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for name, arms in outcomes["columns"].items():
        for place, erased in enumerate(arms["erased"]):
            if erased is not None:
                base = arms["base"][place] if "base" in arms else None
                yield results["name"], outcomes["samples"][place], outcomes["clusters"][place], name, base, erased


def _number(value: bool | float | None) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else repr(value)
