"""results.json of 0.1.0, as the present version has it."""

from collections.abc import Mapping, Sequence
from typing import Any

EARLIER = 1  # the format of 0.1.0
NOTE = (
    "was written by version 0.1.0, whose intervals are too narrow; eval-concept report on the same folders makes "
    "them again"
)


def upgraded(results: Any) -> Any:
    """Results of format 1 as those of format 2; anything else as it is.

    Intervals over prompts replace those over images where both are there. An interval of length 0, and the spread of
    KID's subsets, which was no interval, become None.
    """
    if not isinstance(results, Mapping) or results.get("format") != EARLIER:
        return results
    return _converted(results) | {"format": EARLIER + 1}


def _converted(part: Any) -> Any:
    if isinstance(part, Mapping):
        found = {key: _converted(value) for key, value in part.items()}
        return _figure(found) if {"low", "high", "interval"} <= found.keys() else found
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [_converted(one) for one in part]
    return part


def _figure(figure: dict[str, Any]) -> dict[str, Any]:
    over_prompts = figure.pop("cluster_low", None), figure.pop("cluster_high", None)
    if None not in over_prompts:
        figure["low"], figure["high"] = over_prompts
    if figure["low"] == figure["high"] or figure["interval"] == "subsets":
        figure |= {"low": None, "high": None, "interval": "cannot tell"}
        if "p" in figure:
            figure["p"] = figure["p_holm"] = None
    return {**figure, "icc": None}
