"""Intervals as pure formulas of counts, which need not be whole numbers.

Wilson 1927; Clopper & Pearson 1934, with an effective n as in Korn & Graubard, Survey Methodology 1998; Tango,
Stat. Med. 1998; Hall, J. R. Stat. Soc. B 1992.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from erase.statistics.figures import Array


def quantile(confidence: float, df: float | None = None) -> float:
    """Of the normal distribution, or of Student's t with these degrees of freedom; two-sided."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri((1 + confidence) / 2) if df is None else stdtrit(df, (1 + confidence) / 2))


def two_sided(x: float, df: float | None = None) -> float:
    """The probability of a value at least as far from 0 as x."""
    from scipy.special import ndtr, stdtr

    return float(2 * (ndtr(-abs(x)) if df is None else stdtr(df, -abs(x))))


def wilson(k: float, n: float, q: float) -> tuple[float, float]:
    """Of k successes in n."""
    p = k / n
    centre = (p + q * q / (2 * n)) / (1 + q * q / n)
    half = q / (1 + q * q / n) * math.sqrt(p * (1 - p) / n + q * q / (4 * n * n))
    return (0.0 if k <= 0 else max(0.0, centre - half)), (1.0 if k >= n else min(1.0, centre + half))


def clopper_pearson(k: float, n: float, confidence: float) -> tuple[float, float]:
    """Of k successes in n; neither needs to be whole, and n may be below 1."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if k <= 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if n - k <= 1e-12 else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def tango(lost: float, gained: float, n: float, q: float) -> tuple[float, float]:
    """Of the difference (gained - lost) / n of two rates in n pairs: all differences whose score is within q."""

    def score(d: float) -> float:
        a, b, c = 2 * n, -lost - gained + (2 * n - gained + lost) * d, -lost * d * (1 - d)
        x = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # likeliest share of lost pairs
        variance, distance = n * (2 * x + d * (1 - d)), gained - lost - n * d
        if variance > 1e-300:
            return distance / math.sqrt(variance)
        return 0.0 if abs(distance) < 1e-12 else math.copysign(math.inf, distance)

    ends = []
    for outer in (-1.0, 1.0):
        inner = (gained - lost) / n
        for _ in range(80):
            middle = (inner + outer) / 2
            if abs(score(middle)) <= q:
                inner = middle
            else:
                outer = middle
        ends.append(inner)
    return ends[0], ends[1]


def hall(centre: float, residuals: "Array", confidence: float) -> tuple[float, float, float] | None:
    """Of a mean: Student's t, widened to Hall's skewness-corrected t where that reaches further; and its p against 0.

    residuals: one a prompt, [C], whose mean is 0. None if there are fewer than two or all are 0.
    """
    count = len(residuals)
    if count < 2 or np.abs(residuals).max() <= 1e-12 * max(abs(centre), 1e-300):
        return None
    q, root = quantile(confidence, count - 1), math.sqrt(count)
    se = math.sqrt(float((residuals**2).sum()) / (count - 1)) / root
    skewness = float((residuals**3).mean()) / float((residuals**2).mean()) ** 1.5
    a, shift = skewness / (3 * root), skewness / (6 * root)

    def corrected(w: float) -> float:
        return w if abs(a) < 1e-9 else (float(np.cbrt(1 + 3 * a * (w - shift))) - 1) / a

    low = min(centre - q * se, centre - corrected(q) * se)
    high = max(centre + q * se, centre - corrected(-q) * se)
    t = centre / se
    g = t if abs(a) < 1e-9 else t + a * t * t + a * a * t**3 / 3 + shift
    return low, high, max(two_sided(t, count - 1), two_sided(g, count - 1))
