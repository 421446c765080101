"""report.md and a self-contained report.html of one erased model, a pure function of its results and images."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from erase.data.images import BadImage
from erase.data.images import read as read_image
from erase.evaluation.report import plots
from erase.evaluation.report import results as stored
from erase.evaluation.report.html import render
from erase.evaluation.report.markdown import report_markdown
from erase.evaluation.report.results import ROLES, check
from erase.evaluation.report.words import (
    aligned,
    columns_of,
    interval_of,
    row_label,
    subtitle,
    table_note,
    table_row,
    verdict_sentences,
)
from erase.files import write_text

THUMBNAIL = 192  # pixels
BLURRED = 8  # pixels a side that are left of a flagged image


def write(results: dict[str, Any], folder: str | Path, *, images: str | Path, show: bool = False) -> None:
    """Write results.json, report.md and report.html into `folder`.

    images: the folder that the sheet's paths start from.
    show: embed flagged images as they are; else 8 x 8 pixels of each are all that the page holds.

    Raises:
        EraseError: the results do not fit the schema.
    """
    check(results)
    view = {
        "results": results,
        "subtitle": subtitle(results),
        "verdict": verdict_sentences(results),
        "table": [table_row(score, score["title"]) for score in results["scores"]],
        "groups": [
            {
                "title": group["title"],
                "svg": _plot(group),
                "table": [table_row(row, row_label(row)) for row in group["rows"]],
            }
            for group in results["groups"]
        ],
        "note": table_note(results),
    }
    text = report_markdown(view)
    page = render("report.html.jinja", **view, show=show, sheet=_sheet(results["sheet"], Path(images), show))
    folder = Path(folder)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page)
    stored.write(results, folder / "results.json")  # last: where it is, the others are


def summary(results: Mapping[str, Any]) -> str:
    """The verdict and the table of scores for a terminal."""
    rows = [table_row(score, score["name"]) for score in results["scores"]]
    titles = {"title": results["name"], "base": "base", "erased": "erased", "difference": "difference", "n": "n"}
    columns = columns_of(results, titles)
    verdict = [results["verdict"]["text"]] if results.get("verdict") else []
    return "\n".join([*verdict, aligned(columns, rows)])


# Images
def _plot(group: Mapping[str, Any]) -> str:
    rows = [
        (row_label(row), interval_of(row["base"]) if row["base"] else None, interval_of(row["erased"]))
        for row in group["rows"]
    ]
    is_rate = all(row["erased"]["k"] is not None for row in group["rows"])
    if rows and group.get("axis"):
        points = [(float(label), base, erased) for label, base, erased in rows]
        return plots.curve(points, axis=group["axis"], is_rate=is_rate, salt=group["name"])
    return plots.bars(rows, is_rate=is_rate, salt=group["name"]) if rows else ""


def _sheet(sheet: Sequence[Mapping[str, Any]], images: Path, show: bool) -> list[dict[str, Any]]:
    """The sheet by role: title and pairs, images as data URIs."""
    parts = []
    for role, title in ROLES.items():
        pairs = [
            {
                "prompt": pair["prompt"],
                "flagged": pair["flagged"],
                "images": [
                    (arm, _thumbnail(images / pair[arm], blur=pair["flagged"] and not show) if pair[arm] else None)
                    for arm in ("base", "erased")
                ],
            }
            for pair in sheet
            if pair["role"] == role
        ]
        if pairs:
            parts.append({"title": title, "pairs": pairs})
    return parts


def _thumbnail(path: Path, *, blur: bool) -> str | None:
    """A small image as a data URI; None for one that cannot be read."""
    try:
        image = Image.fromarray(read_image(path))
    except BadImage:
        return None
    if blur:  # in the pixels themselves: nothing in the page can bring them back
        image = image.resize((BLURRED, BLURRED), Image.Resampling.BOX)
    image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
