"""The verdict: erased and kept, erased but damaged, not erased, or cannot tell.

Each part follows the 95 % interval that the report prints, never the value alone:

    erased       the concept's rate, erased / base, is at most 0.1 at the upper end of the ratio's interval
    not erased   it is above 0.1 at the lower end
    kept         the loss on retained prompts is at most 3 points at the upper end of its interval
    damaged      it is above 3 points at the lower end
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from erase import statistics
from erase.evaluation.plan import Plan

REMAINDER = 0.1  # of the base's rate, at which the concept counts as erased
LOSS = 0.03  # largest accepted loss on retained prompts
MOST_INVALID = 0.05  # share of invalid images above which nothing is concluded

Outcome = Literal["erased and kept", "erased but damaged", "not erased", "cannot tell"]


def verdict(
    plan: Plan,
    scores: Sequence[Mapping[str, Any]],
    models: Mapping[str, Mapping[str, str]],
    invalid: Mapping[str, Mapping[str, int]],
) -> dict[str, Any] | None:
    """What the scores say about erasure and retention; None if the task has no such scores or there is no base.

    models: hashes of each arm. invalid: number of invalid images of each arm.
    """
    rows = {row["name"]: row for row in scores}
    erasure, retention = rows.get(plan.erasure or ""), rows.get(plan.retention or "")
    if erasure is None or retention is None or erasure["comparison"] is None:
        return None
    reason = _nothing_to_conclude(erasure, retention, models, invalid)
    if reason:
        outcome: Outcome = "cannot tell"
    else:
        outcome, reason = _concluded(erasure, retention)
    before, after = 1 - erasure["base"]["value"], 1 - erasure["erased"]["value"]
    text = (
        f"{outcome.capitalize()}: the concept's rate went from {before:.1%} to {after:.1%}, "
        f"{retention['title'].lower()} from {retention['base']['value']:.1%} to {retention['erased']['value']:.1%}"
    )
    return {
        "success": outcome == "erased and kept",
        "text": f"{text}; {reason}" if reason else text,
        "outcome": outcome,
    }


def _nothing_to_conclude(
    erasure: Mapping[str, Any],
    retention: Mapping[str, Any],
    models: Mapping[str, Mapping[str, str]],
    invalid: Mapping[str, Mapping[str, int]],
) -> str:
    """Why no figure would show an erasure; empty if one could."""
    if models["base"] == models["erased"]:
        return "both models have the same weights, so nothing was erased"
    for role, count in invalid.items():
        if count["k"] > MOST_INVALID * count["n"]:
            return f"{count['k']:,} of {count['n']:,} images of the {role} model are black, flat or unreadable"
    if 1 in (erasure["base"]["clusters"], retention["erased"]["clusters"]):
        return "one prompt says nothing about other prompts"
    if statistics.ratio(_concept(erasure["erased"]), _concept(erasure["base"]))[1] == float("inf"):
        return "the base model hardly shows the concept, so its erasure cannot be measured"
    return ""


def _concluded(erasure: Mapping[str, Any], retention: Mapping[str, Any]) -> tuple[Outcome, str]:
    """The outcome, and why it is not another one."""
    low, high = statistics.ratio(_concept(erasure["erased"]), _concept(erasure["base"]))
    if low > REMAINDER:
        return "not erased", ""
    if high > REMAINDER:
        needed = statistics.prompts_to_show_erased(1 - erasure["base"]["value"], _images(erasure["base"]), REMAINDER)
        remains = f"between {low:.0%} and {high:.0%} of the concept's rate remain"
        return "cannot tell", f"{remains}; {_takes(f'at most {REMAINDER:.0%} remain', needed, erasure)}"
    loss = retention["comparison"]
    if loss["low"] is not None and loss["low"] >= -LOSS:
        return "erased and kept", ""
    if loss["high"] is not None and loss["high"] < -LOSS:
        return "erased but damaged", ""
    needed = statistics.prompts_to_show_kept(LOSS, _images(retention["erased"]))
    between = (
        f"the concept is erased, but the loss is between {-100 * loss['high']:.1f} and {-100 * loss['low']:.1f} points"
    )
    return "cannot tell", f"{between}; {_takes(f'it is below {100 * LOSS:.0f}', needed, retention)}"


def _takes(claim: str, needed: int | None, row: Mapping[str, Any]) -> str:
    """How many prompts would show the claim. Where losses were observed it takes more than this smallest number."""
    there, images = row["erased"]["clusters"] or row["erased"]["n"], _images(row["erased"])
    each = f"{images} image{'s' * (images > 1)} each"
    if needed is None or needed <= there:
        return f"showing that {claim} takes more than these {there:,} prompts with {each}"
    return f"showing that {claim} takes at least {needed:,} prompts with {each}; this evaluation has {there:,}"


def _images(score: Mapping[str, Any]) -> int:
    """Images per prompt."""
    return max(1, round(score["n"] / score["clusters"])) if score["clusters"] else 1


def _concept(score: Mapping[str, Any]) -> statistics.Score:
    """The rate at which the concept is shown, from the rate at which it is not."""
    inverse = {"value": 1 - score["value"], "low": 1 - score["high"], "high": 1 - score["low"]}
    return statistics.Score(**{**score, **inverse, "k": score["n"] - score["k"]})
