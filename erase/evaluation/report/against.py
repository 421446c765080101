"""Method against method on the same prompts and seeds: paired tests of the outcomes that their reports keep."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from erase import statistics
from erase.evaluation.report.pool import judged


def against(
    methods: Sequence[str], outcomes: Sequence[Sequence[Mapping[str, Any]]], scores: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The difference of every two methods in these scores, first minus second, with Holm-corrected p-values.

    Methods with different numbers of erasures, or of other samples, are left out: their images are no pairs.

    outcomes: of each method's erasures, as outcomes.json has them. scores: with "name" and "title".
    """
    rows = []
    for score in scores:
        for (first, ours), (second, theirs) in itertools.combinations(zip(methods, outcomes, strict=True), 2):
            comparison = _compared(score["name"], ours, theirs)
            if comparison:
                rows.append({"score": score["name"], "title": score["title"], "first": first, "second": second}
                            | {"comparison": statistics.to_json(comparison)})  # fmt: skip
    corrected = statistics.holm([row["comparison"]["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row["comparison"]["p_holm"] = p
    return rows


def _compared(
    name: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> statistics.Comparison | None:
    """First minus second on the images that both could judge in every run; None if they are no pairs."""
    runs = [*ours, *theirs]
    if len(ours) != len(theirs) or any(run["samples"] != runs[0]["samples"] for run in runs):
        return None
    places = judged([run["columns"].get(name) for run in runs], has_base=False)
    if not places:
        return None
    first, second = (
        [[run["columns"][name]["erased"][place] for place in places] for run in side] for side in (ours, theirs)
    )
    return statistics.paired_pooled(name, second, first, clusters=[runs[0]["clusters"][place] for place in places])
