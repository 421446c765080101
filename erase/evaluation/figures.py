"""Figures with intervals from the outcomes of one or two arms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase import statistics
from erase.evaluation import score
from erase.evaluation.plan import Column, Curve, Group, Plan, column_of
from erase.evaluation.tasks.protocol import Sample


def score_row(column: Column, base: Column | None, clusters: Sequence[str], chosen: Sequence[int]) -> dict[str, Any]:
    """A row of the table of scores: erased, base, and their pairs, over the chosen samples."""
    rows = [i for i in chosen if column.values[i] is not None and (base is None or base.values[i] is not None)]
    named, direction = [clusters[i] for i in rows], column.higher_is_better

    def of(values: Sequence[Any]) -> dict[str, Any]:
        picked = [values[i] for i in rows]
        is_rate = all(isinstance(value, bool) for value in picked)
        figure = statistics.rate if is_rate else statistics.mean
        return statistics.to_json(figure(column.name, picked, higher_is_better=direction, clusters=named))

    row = {"name": column.name, "title": column.title, "about": column.about, "higher_is_better": direction}
    row |= {"base": None, "erased": of(column.values), "comparison": None, "copy_of": column.copy_of}
    if base is not None:
        pair = [base.values[i] for i in rows], [column.values[i] for i in rows]
        compare: Any = statistics.paired_rate if isinstance(pair[0][0], bool) else statistics.paired_mean
        row["base"] = of(base.values)
        row["comparison"] = statistics.to_json(compare(column.name, *pair, clusters=named))
    return row


def group_rows(group: Group, plan: Plan, base: Plan | None, samples: Sequence[Sample]) -> dict[str, Any]:
    """The rows of a group, one a label, with p-values corrected over them."""
    column, clusters = column_of(plan, group.column), [sample.cluster for sample in samples]
    if column is None:
        return {"name": group.name, "title": group.title, "rows": []}
    rows: list[dict[str, Any]] = []
    for label in sorted({label for labels in group.labels for label in labels}):
        chosen = [i for i, labels in enumerate(group.labels) if label in labels and column.values[i] is not None]
        roles = {samples[i].role for i in chosen}
        figures = score_row(column, column_of(base, group.column), clusters, chosen)
        rows.append(_group_row(label, roles.pop() if len(roles) == 1 else "", figures))
    return {"name": group.name, "title": group.title, "rows": _corrected(rows)}


def curve_rows(curve: Curve, base: Plan | None, samples: Sequence[Sample]) -> dict[str, Any]:
    """The rows of a curve, one a value of its setting, with p-values corrected over them."""
    before = next((c for c in base.curves if c.name == curve.name), None) if base else None
    clusters, rows = [sample.cluster for sample in samples], []
    for value, column in curve.columns.items():
        figures = score_row(column, before and before.columns[value], clusters, range(len(samples)))
        rows.append(_group_row(f"{value:g}", "", figures))
    return {"name": curve.name, "title": curve.title, "rows": _corrected(rows), "axis": curve.axis}


def _group_row(label: str, role: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": label, "role": role, **{key: figures[key] for key in ("base", "erased", "comparison")}}


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with Holm's p-values over them."""
    corrected = statistics.holm([row["comparison"] and row["comparison"]["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        if row["comparison"]:
            row["comparison"]["p_holm"] = p
    return rows


def num_invalid(folder: Path, judges: Sequence[str]) -> dict[str, int]:
    """How many images of an arm are invalid, of how many."""
    lines = score.load(folder, judges[0])
    return {"k": sum(bool(line["invalid"]) for line in lines), "n": len(lines)}
