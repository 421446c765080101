"""Requirements on results (--require): read, checked and applied."""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from erase.errors import EraseError
from erase.evaluation.plan import Expected

_REQUIREMENT = re.compile(r"\s*([\w.-]+?)(_drop|_low|_high)?\s*(>=|<=|>|<)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*")
MOST_INVALID = 0.05  # share of invalid images above which a rule that does not count them as failures is not met
_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Rule:
    """One --require: NAME>=NUMBER (or <=, >, <), NAME one of the scores.

    suffix: "_drop" is the base's value minus the erased one's, "_low" and "_high" are the ends of the 95 % interval
    that the report prints, "" is the value itself.
    """

    text: str
    name: str
    suffix: str
    sign: str
    bound: float


def rule(text: str, names: Collection[str], *, has_base: bool = True) -> Rule:
    """The rule that a text says.

    names: of the scores that there are, or will be.

    Raises:
        EraseError: it cannot be read, names no such score, or needs a base where there is none.
    """
    parts = _REQUIREMENT.fullmatch(text)
    if parts is None:
        raise EraseError(f"--require {text!r} cannot be read; write it as 'mini.ua>=0.95'")
    name, suffix, sign, bound = parts.groups(default="")
    if name not in names and name + suffix in names:
        name, suffix = name + suffix, ""
    if name not in names:
        raise EraseError(f"--require {text!r}: there is no score {name!r}; there are {', '.join(names)}")
    if suffix == "_drop" and not has_base:
        raise EraseError(f"--require {text!r} needs a base to compare with; give --base")
    if not math.isfinite(float(bound)):
        raise EraseError(f"--require {text!r}: {bound[:40]} is too large a number")
    return Rule(text, name, suffix, sign, float(bound))


def names_of(results: Mapping[str, Any]) -> list[str]:
    """The scores of a report, and those that no image could be judged for."""
    return [*(row["name"] for row in results["scores"]), *results.get("unjudged", [])]


def unmet(results: Mapping[str, Any], requirements: Sequence[str]) -> list[str]:
    """The requirements that the results do not meet, each as a line that says what they are instead.

    Raises:
        EraseError: a requirement that cannot be read, or no such score.
    """
    rows, failures = {row["name"]: row for row in results["scores"]}, []
    for text in requirements:
        asked = rule(text, names_of(results))
        if asked.name not in rows:
            failures.append(f"{results['name']}: {text} is not met: no image could be judged for {asked.name}")
            continue
        row = rows[asked.name]
        if not _counts_invalid(asked, row) and (num := results["invalid"]["erased"])["k"] > MOST_INVALID * num["n"]:
            failures.append(
                f"{results['name']}: {text} is not met: {num['k']:,} of {num['n']:,} images are invalid, which "
                f"{asked.name} does not count"
            )
            continue
        if asked.suffix == "_drop":
            if row["comparison"] is None:
                raise EraseError(f"--require {text!r} needs a base to compare with; give --base")
            value = -row["comparison"]["difference"]
        else:
            value = row["erased"][(asked.suffix or "_value")[1:]]
        if value is None:
            failures.append(
                f"{results['name']}: {text} is not met: {asked.name} has no interval, so nothing can be decided"
            )
        elif not _HOLDS[asked.sign](value, asked.bound):
            failures.append(f"{results['name']}: {text} is not met: {asked.name}{asked.suffix} is {value:.4f}")
    return failures


def _counts_invalid(asked: Rule, row: Mapping[str, Any]) -> bool:
    """Whether invalid images make the rule harder to meet: for a rate, if the rule asks for the better direction."""
    wants_more = (asked.sign in {">", ">="}) != (asked.suffix == "_drop")
    return row["erased"]["k"] is not None and wants_more == row["higher_is_better"]


def check_rules(
    requirements: Sequence[str], scores: Sequence[Mapping[str, Expected]], *, has_base: bool = True
) -> None:
    """Each rule can be read, is about a score of at least one report, and can be met and not met.

    scores: of each report, by name; see `expected.scores`.

    Raises:
        EraseError: see `rule`; or a rule that every value in the score's range meets, or none, or the difference of a
            score that has none.
    """
    every = {name: one for some in scores for name, one in some.items()}
    for text in requirements:
        asked = rule(text, every, has_base=has_base)
        _check_bound(asked, every[asked.name])


def _check_bound(asked: Rule, score: Expected) -> None:
    is_drop = asked.suffix == "_drop"
    if is_drop and not score.is_compared:
        raise EraseError(f"--require {asked.text!r}: {asked.name} is not compared with the base's, so it has no _drop")
    if score.range is None or (asked.suffix in {"_low", "_high"} and not score.is_rate):
        return  # the interval of a mean may reach beyond the values that it is made of
    low, high = score.range
    if is_drop:
        low, high = low - high, high - low
    at_low, at_high = (_HOLDS[asked.sign](end, asked.bound) for end in (low, high))
    if at_low != at_high:
        return
    when = "always" if at_low else "never"
    reach = f"from {low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
    is_percent = score.is_rate and 2 <= asked.bound <= 100
    hint = f"; write {asked.bound / 100:g} for {asked.bound:g} %" if is_percent else ""
    raise EraseError(f"--require {asked.text!r}: {asked.name}{asked.suffix} is {reach}, so this is {when} met{hint}")


def unmet_of_all(results: Sequence[Mapping[str, Any]], requirements: Sequence[str]) -> list[str]:
    """Lines that say which requirement which report does not meet; a rule holds for reports that have its score."""
    scores = [names_of(one) for one in results]
    every = list(dict.fromkeys(name for some in scores for name in some))
    named = {text: rule(text, every).name for text in requirements}
    return [
        line
        for one, names in zip(results, scores, strict=True)
        for line in unmet(one, [text for text, name in named.items() if name in names])
    ]
