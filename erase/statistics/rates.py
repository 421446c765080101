"""The rate of one model: Wilson, or Clopper-Pearson with an effective number of images."""

from collections.abc import Sequence

from erase.statistics.clusters import Prompts, correlation, design_effect
from erase.statistics.figures import CONFIDENCE, ONE_PROMPT, Score, values_of
from erase.statistics.intervals import clopper_pearson, quantile, wilson


def rate(
    name: str, outcomes: Sequence[bool], *, higher_is_better: bool, clusters: Sequence[str] | None = None
) -> Score:
    """The share of outcomes that are true.

    Wilson's interval if no prompt has two images. Otherwise Clopper-Pearson's with n_eff = n / deff (z / t)^2, which
    is over prompts. With a single prompt, Wilson's over its images, named accordingly.

    clusters: the prompt (or any label) of each outcome.
    """
    values = values_of(name, outcomes)
    prompts = Prompts.of(name, len(values), clusters)
    n, k = len(values), int(values.sum())
    icc = correlation(prompts.sums(values), prompts.m, k / n * (1 - k / n))
    if prompts.are_clusters:
        low, high = clustered(k / n, n / design_effect(prompts.m, icc), prompts.count - 1)
        interval = "Clopper-Pearson over prompts"
    else:
        low, high = wilson(k, n, quantile(CONFIDENCE))
        interval = f"Wilson, {ONE_PROMPT}" if prompts.is_one else "Wilson"
    return Score(name, k / n, n, low, high, higher_is_better, k, interval, prompts.stated, icc)


def clustered(p: float, n: float, df: float) -> tuple[float, float]:
    """The interval of a rate p in n effective images, whose variance has df degrees of freedom."""
    effective = n * (quantile(CONFIDENCE) / quantile(CONFIDENCE, df)) ** 2
    return clopper_pearson(p * effective, effective, CONFIDENCE)
