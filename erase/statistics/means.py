"""Means, and paired differences of means: Student's t over prompts, widened where the values are skewed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from erase.statistics.clusters import Prompts, correlation
from erase.statistics.figures import CONFIDENCE, ONE_PROMPT, Comparison, Score, pairs_of, values_of
from erase.statistics.intervals import hall

if TYPE_CHECKING:
    from erase.statistics.figures import Array

FEW = 10  # prompts with a value other than 0; with fewer no interval of a mean can be trusted
CANNOT_TELL = "cannot tell"
FEW_VALUES = "few values other than 0: not to be trusted"  # ends the name of an interval


def mean(name: str, values: Sequence[float], *, higher_is_better: bool, clusters: Sequence[str] | None = None) -> Score:
    """The mean of one value per image; no interval if all prompts have the same value.

    clusters: the prompt (or any label) of each value.
    """
    array = values_of(name, values)
    prompts = Prompts.of(name, len(array), clusters)
    icc = correlation(prompts.sums(array), prompts.m, float(array.var()))
    low, high, _, interval = _interval(array, prompts)
    return Score(
        name, float(array.mean()), len(array), low, high, higher_is_better, None, interval, prompts.stated, icc
    )


def paired_mean(
    name: str, base: Sequence[float], erased: Sequence[float], *, clusters: Sequence[str] | None = None
) -> Comparison:
    """Two means on the same samples, in the same order; no interval and no p if all prompts differ equally."""
    before, after = pairs_of(name, base, erased)
    prompts, apart = Prompts.of(name, len(before), clusters), after - before
    low, high, p, interval = _interval(apart, prompts)
    return Comparison(
        name,
        base=float(before.mean()),
        erased=float(after.mean()),
        difference=float(apart.mean()),
        low=low,
        high=high,
        n=len(before),
        p=p,
        clusters=prompts.stated,
        interval=interval,
        test="t, skewness-corrected" if p is not None else "none",
        icc=correlation(prompts.sums(apart), prompts.m, float(apart.var())),
    )


def _interval(values: "Array", prompts: Prompts) -> tuple[float | None, float | None, float | None, str]:
    """Low and high end, p against 0, and what the interval is called."""
    if prompts.is_one:
        prompts, over = Prompts(np.arange(len(values)), np.ones(len(values))), f"t over images, {ONE_PROMPT}"
    else:
        over = "t over prompts"
    centre, sums = float(values.mean()), prompts.sums(values)
    found = hall(centre, (sums - prompts.m * centre) / prompts.m.mean(), CONFIDENCE)
    if found is None:
        return None, None, None, CANNOT_TELL
    num_other = int((prompts.sums(np.abs(values)) > 0).sum())
    return *found, f"{over}, {FEW_VALUES}" if num_other < min(FEW, prompts.count) else over
