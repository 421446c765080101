"""Figures with intervals from the outcomes of one or two arms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erase import statistics
from erase.evaluation import score
from erase.evaluation.plan import Column, Curve, Group, Plan, column_of
from erase.evaluation.tasks.protocol import Sample


def score_row(
    column: Column,
    base: Column | None,
    samples: Sequence[Sample],
    chosen: Sequence[int] | None = None,
    *,
    gold: Column | None = None,
) -> dict[str, Any]:
    """A row of the table of scores: erased, base, and their pairs, over the chosen samples; by default over all.

    Samples of several runs of an attack are pooled, so that the interval holds the variance between runs.

    gold: the column of the model that was trained without the concept.
    """
    chosen = range(len(samples)) if chosen is None else chosen
    rows = [i for i in chosen if column.values[i] is not None and (base is None or base.values[i] is not None)]
    runs = [[i for i in rows if samples[i].run == run] for run in dict.fromkeys(samples[i].run for i in rows)]
    named, direction = [samples[i].cluster for i in runs[0]] if runs else [], column.higher_is_better

    def by_run(values: Sequence[Any]) -> list[list[Any]]:
        return [[values[i] for i in run] for run in runs] or [[]]

    def of(values: Sequence[Any]) -> dict[str, Any]:
        found = statistics.pooled(column.name, by_run(values), higher_is_better=direction, clusters=named)
        if column.range and found.low is not None and found.high is not None:  # no value outside is possible
            least, most = column.range
            found = replace(found, low=max(found.low, least), high=min(found.high, most))
        return statistics.to_json(found)

    row = {"name": column.name, "title": column.title, "about": column.about, "higher_is_better": direction}
    row |= {"base": None, "erased": of(column.values), "comparison": None, "copy_of": column.copy_of}
    if base is not None:
        row["base"] = of(base.values)
        pair = by_run(base.values), by_run(column.values)
        row["comparison"] = statistics.to_json(statistics.paired_pooled(column.name, *pair, clusters=named))
    if gold is not None and all(gold.values[i] is not None for i in rows):
        row["gold"] = of(gold.values)
    return row


def group_rows(
    group: Group, plan: Plan, base: Plan | None, samples: Sequence[Sample], *, gold: Plan | None = None
) -> dict[str, Any]:
    """The rows of a group, one a label, with p-values corrected over them; labels that begin with a number by it."""
    column, other = column_of(plan, group.column), column_of(base, group.column)
    if column is None:
        return {"name": group.name, "title": group.title, "rows": []}
    rows: list[dict[str, Any]] = []
    for label in sorted({label for labels in group.labels for label in labels}, key=_place):
        chosen = [i for i, labels in enumerate(group.labels) if label in labels and column.values[i] is not None]
        roles = {samples[i].role for i in chosen}
        figures = score_row(column, other, samples, chosen, gold=column_of(gold, group.column))
        rows.append(_group_row(label, roles.pop() if len(roles) == 1 else "", figures))
    return {"name": group.name, "title": group.title, "rows": _corrected(rows)}


def curve_rows(curve: Curve, base: Plan | None, samples: Sequence[Sample]) -> dict[str, Any]:
    """The rows of a curve, one a value of its setting, with p-values corrected over them."""
    before = next((c for c in base.curves if c.name == curve.name), None) if base else None
    rows: list[dict[str, Any]] = []
    for value, column in curve.columns.items():
        figures = score_row(column, before and before.columns[value], samples, range(len(samples)))
        rows.append(_group_row(f"{value:g}", "", figures))
    return {"name": curve.name, "title": curve.title, "rows": _corrected(rows), "axis": curve.axis}


def _group_row(label: str, role: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    keys = [key for key in ("base", "erased", "comparison", "gold") if key in figures]
    return {"label": label, "role": role, **{key: figures[key] for key in keys}}


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with Holm's p-values over them."""
    corrected = statistics.holm([row["comparison"] and row["comparison"]["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        if row["comparison"]:
            row["comparison"]["p_holm"] = p
    return rows


def _place(label: str) -> tuple[float, str]:
    number = re.match(r"\d+(\.\d+)?", label)
    return (float(number[0]) if number else -1.0, label)


def num_invalid(folder: Path, judges: Sequence[str]) -> dict[str, int]:
    """How many images of an arm are invalid, of how many."""
    lines = score.load(folder, judges[0])
    return {"k": sum(bool(line["invalid"]) for line in lines), "n": len(lines)}
