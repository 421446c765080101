"""The ratio of two rates, and how many prompts show that a concept is erased or that the rest is kept."""

import math
from collections.abc import Callable

from erase.statistics.clusters import MIN_ICC
from erase.statistics.figures import CONFIDENCE, Score
from erase.statistics.intervals import clopper_pearson, quantile
from erase.statistics.rates import clustered

MOST_PROMPTS = 100_000  # more are not counted


def ratio(erased: Score, base: Score) -> tuple[float, float]:
    """The 95 % interval of erased / base for two rates; the upper end is infinite if the base's may be 0.

    Square-and-add (Donner & Zou, Stat. Methods Med. Res. 2012). The correlation of the two models is ignored, which
    widens the interval.
    """
    return _ratio(_ends(erased), _ends(base))


def prompts_to_show_kept(margin: float, images: int) -> int | None:
    """The smallest number of prompts that shows a loss below the margin, if no pair is lost.

    images: per prompt. None if more than `MOST_PROMPTS` are needed.
    """

    def shows(count: int) -> bool:
        q = quantile(CONFIDENCE, count - 1 if images > 1 else None)
        return q * q / (count * images / (1 + MIN_ICC * (images - 1)) + q * q) <= margin

    return _smallest(shows)


def prompts_to_show_erased(base_rate: float, images: int, most: float) -> int | None:
    """The smallest number of prompts that shows a ratio of at most `most`, if no image shows the concept any more.

    base_rate: how often the base shows it. images: per prompt. None if more than `MOST_PROMPTS` are needed.
    """

    def shows(count: int) -> bool:
        n = count * images / (1 + MIN_ICC * (images - 1))

        def ends(p: float) -> tuple[float, float, float]:
            found = clustered(p, n, count - 1) if images > 1 else clopper_pearson(p * n, n, CONFIDENCE)
            return (p, *found)

        return _ratio(ends(0.0), ends(base_rate))[1] <= most

    return _smallest(shows)


def _ends(score: Score) -> tuple[float, float, float]:
    """Value, low and high; Clopper-Pearson's if each prompt has one image, as square-and-add needs exact ends."""
    assert score.k is not None and score.low is not None and score.high is not None, "a ratio is of two rates"
    if score.clusters is None:
        return (score.value, *clopper_pearson(score.k, score.n, CONFIDENCE))
    return score.value, score.low, score.high


def _ratio(erased: tuple[float, float, float], base: tuple[float, float, float]) -> tuple[float, float]:
    (e, e_low, e_high), (b, b_low, b_high) = erased, base
    both = e * b
    above, below = b_low * (2 * b - b_low), b_high * (2 * b - b_high)
    inside = both**2 - e_high * (2 * e - e_high) * above
    high = (both + math.sqrt(max(inside, 0.0))) / above if above > 0 else math.inf
    inside = both**2 - e_low * (2 * e - e_low) * below
    low = max(0.0, (both - math.sqrt(max(inside, 0.0))) / below) if below > 0 else 0.0
    return low, high


def _smallest(shows: Callable[[int], bool]) -> int | None:
    """The least count of prompts, from 2, at which it holds; once it holds it holds for more."""
    high = 2
    while not shows(high):
        high *= 2
        if high > MOST_PROMPTS:
            return None
    low = high // 2 if high > 2 else 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high
