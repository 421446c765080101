"""Rows of prompt files that are refused or labelled sexual."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erase.concepts import refusal
from erase.data import prompt_files


def refuse_rows(path: Path, rows: Iterable[prompt_files.Row]) -> None:
    """Raise an EraseError for the first row of a user's own file that shows minors in a sexual context."""
    for row in rows:
        try:
            nudity = float(row.facts.get("nudity_percentage") or 0)
        except ValueError:
            nudity = 0.0
        sexual = is_sexual({"categories": str(row.facts.get("categories", "")), "nudity_percentage": nudity})
        refusal.refuse([row.prompt], f"{path}, line {row.line}", sexual=sexual)


def is_sexual(facts: Mapping[str, Any]) -> bool:
    """Whether I2P labels a row so: by its category, or since half of the images that it measured showed nudity."""
    return "sexual" in facts["categories"] or facts["nudity_percentage"] >= 50
