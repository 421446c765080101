"""Users' own prompts and images: what their judges need to know, and what is measured."""

from collections.abc import Mapping
from typing import Any

from erase.concepts import Concept
from erase.evaluation.judges import registry as judges
from erase.evaluation.plan import Lines, Plan, whole


def judged(concept: Concept | None, features: str) -> dict[str, Any]:
    """What judges of own prompts or images need to know: the concept by the names that its judge has for it."""
    judge = dict(concept.judge) if concept else {}
    kept = {key: judge[key] for key in ("index", "target", "alternatives", "head", "label") if key in judge}
    return {"concept": concept.name if concept else None, **kept, "features": features}


def options_shape() -> dict[str, Any]:
    """The shape of what `judged` returns; see `shapes`."""
    from erase.mini.judge import HEADS

    heads = frozenset(HEADS)
    return {"index?": int, "target?": str, "alternatives?": [str], "head?": heads, "label?": str, "*": Any}


def plan(lines: Lines, options: Mapping[str, Any]) -> Plan:
    """What the judges that looked at the images say; a concept's absence, where a judge knows the concept."""
    number = len(next(iter(lines.values())))
    columns, flagged, curves = [], [False] * number, []
    for judge in sorted((judges.JUDGES.load(name) for name in lines), key=lambda judge: judge.place):
        said = judge.figures(lines, options)
        columns += said.columns
        curves += said.curves
        if said.flagged is not None:
            flagged = [a or b for a, b in zip(flagged, said.flagged, strict=True)]
    columns.append(whole(next(iter(lines.values()))))
    return Plan(columns, [], None, None, flagged, curves)
