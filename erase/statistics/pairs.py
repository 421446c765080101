"""The difference of two models' rates on the same samples: Tango's score interval and its p-value."""

import math
from collections.abc import Sequence

from erase.statistics.clusters import Prompts, correlation, design_effect
from erase.statistics.figures import CONFIDENCE, ONE_PROMPT, Comparison, pairs_of
from erase.statistics.intervals import quantile, tango, two_sided


def paired_rate(
    name: str, base: Sequence[bool], erased: Sequence[bool], *, clusters: Sequence[str] | None = None
) -> Comparison:
    """Two rates on the same samples, in the same order.

    p is that of McNemar's score test. If prompts have several images, the counts are divided by the design effect, and
    Student's t with one degree of freedom less than prompts replaces the normal distribution.
    """
    before, after = pairs_of(name, base, erased)
    prompts = Prompts.of(name, len(before), clusters)
    n = len(before)
    lost, gained = int((before > after).sum()), int((after > before).sum())
    changed = prompts.sums(after - before)
    icc = correlation(changed, prompts.m, (lost + gained) / n - ((gained - lost) / n) ** 2)
    df = prompts.count - 1 if prompts.are_clusters else None
    low, high, p = tested(lost, gained, n, design_effect(prompts.m, icc), df)
    over = " over prompts" if prompts.are_clusters else ""
    return Comparison(
        name,
        base=float(before.mean()),
        erased=float(after.mean()),
        difference=(gained - lost) / n,
        low=low,
        high=high,
        n=n,
        p=p,
        only_base=lost,
        only_erased=gained,
        clusters=prompts.stated,
        interval=f"Tango, {ONE_PROMPT}" if prompts.is_one else f"Tango{over}",
        test=f"McNemar score{over}",
        icc=icc,
    )


def tested(lost: int, gained: int, n: int, deff: float, df: float | None) -> tuple[float, float, float]:
    """Low and high end and p of a difference of rates. df: None for the normal distribution."""
    low, high = tango(lost / deff, gained / deff, n / deff, quantile(CONFIDENCE, df))
    changed = lost + gained
    return low, high, two_sided((gained - lost) / math.sqrt(deff * changed), df) if changed else 1.0
