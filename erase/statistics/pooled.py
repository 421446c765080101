"""Figures over several erasure runs on the same prompts: the variance between prompts plus that between runs.

    vp = C/(C-1) sum_i (sum_r E)^2 / N^2      vr = R/(R-1) sum_r (sum_i E)^2 / N^2      V = vp + vr
    df = V^2 / (vp^2/(C-1) + vr^2/(R-1))

with E[r, i] the sum of a prompt's values in a run less its share of the mean, and Satterthwaite's degrees of freedom
(1946). A hard prompt is hard for every run, so more runs do not make up for few prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from erase.errors import EraseError
from erase.statistics.clusters import MIN_ICC, Prompts
from erase.statistics.figures import CONFIDENCE, ONE_PROMPT, Comparison, Score, pairs_of, values_of
from erase.statistics.intervals import quantile, two_sided
from erase.statistics.means import CANNOT_TELL, mean, paired_mean
from erase.statistics.pairs import paired_rate, tested
from erase.statistics.rates import clustered, rate

if TYPE_CHECKING:
    from erase.statistics.figures import Array


def pooled(
    name: str, runs: Sequence[Sequence[float]], *, higher_is_better: bool, clusters: Sequence[str] | None = None
) -> Score:
    """A rate or a mean over several erasures of one concept (other training seeds); one run is `rate` or `mean`.

    runs: values [run][sample], the same samples in each run; True and False for a rate.
    clusters: the prompt of each sample; without it, each sample is a prompt of its own.

    Raises:
        EraseError: the runs hold different samples.
    """
    is_rate = _are_outcomes(runs)
    if len(runs) == 1:
        one = rate if is_rate else mean
        return one(name, runs[0], higher_is_better=higher_is_better, clusters=clusters)  # pyright: ignore
    values, prompts = _same_samples(name, runs), Prompts.of(name, len(runs[0]), clusters)
    layout = _layout(np.stack([prompts.sums(run) for run in values]), prompts.m, float(values.var()))
    value, n, over = float(values.mean()), values.size, _over(prompts, len(runs))
    if is_rate:
        low, high = clustered(value, n / layout.deff, layout.df)
        k, interval = int(values.sum()), f"Clopper-Pearson {over}"
    else:
        (low, high, _), k, interval = layout.of_mean(value), None, f"t {over}"
    interval = CANNOT_TELL if low is None else interval
    return Score(name, value, n, low, high, higher_is_better, k, interval, prompts.count, layout.icc)


def paired_pooled(
    name: str,
    base: Sequence[Sequence[float]],
    erased: Sequence[Sequence[float]],
    *,
    clusters: Sequence[str] | None = None,
) -> Comparison:
    """The difference of two rates or two means over several erasures; one run is `paired_rate` or `paired_mean`.

    base, erased: values [run][sample]; a pair has the same place in both.

    Raises:
        EraseError: the runs hold different samples.
    """
    is_rate = _are_outcomes([*base, *erased])
    if len(base) == len(erased) == 1:
        return (paired_rate if is_rate else paired_mean)(name, base[0], erased[0], clusters=clusters)  # pyright: ignore
    before, after = _same_samples(name, base), _same_samples(name, erased)
    pairs_of(name, before.ravel().tolist(), after.ravel().tolist())
    prompts, apart = Prompts.of(name, before.shape[1], clusters), after - before
    over = _over(prompts, len(before))
    layout = _layout(np.stack([prompts.sums(run) for run in apart]), prompts.m, float(apart.var()))
    lost, gained = int((apart < 0).sum()), int((apart > 0).sum())
    if is_rate:
        low, high, p = tested(lost, gained, apart.size, layout.deff, layout.df)
    else:
        low, high, p = layout.of_mean(float(apart.mean()))
    return Comparison(
        name,
        base=float(before.mean()),
        erased=float(after.mean()),
        difference=float(apart.mean()),
        low=low,
        high=high,
        n=apart.size,
        p=p,
        only_base=lost if is_rate else None,
        only_erased=gained if is_rate else None,
        clusters=prompts.count,
        interval=CANNOT_TELL if low is None else f"{'Tango' if is_rate else 't'} {over}",
        test="none" if p is None else f"{'McNemar score' if is_rate else 't'} over runs and prompts",
        icc=layout.icc,
    )


@dataclass(frozen=True)
class _Layout:
    """v: variance of the mean. df: its degrees of freedom. deff: against independent values. icc: as observed."""

    v: float
    df: float
    deff: float
    icc: float | None

    def of_mean(self, value: float) -> tuple[float | None, float | None, float | None]:
        if self.v <= 0:
            return None, None, None
        reach = quantile(CONFIDENCE, self.df) * self.v**0.5
        return value - reach, value + reach, two_sided(value / self.v**0.5, self.df)


def _layout(sums: "Array", m: "Array", variance: float) -> _Layout:
    """sums: of each run and prompt, [R, C]. m: images of each prompt. variance: of one value."""
    num_runs, count = sums.shape
    n = int(num_runs * m.sum())
    rest = sums - m * sums.sum() / n
    vp = count / (count - 1) * float((rest.sum(0) ** 2).sum()) / n**2 if count > 1 else 0.0
    vr = num_runs / (num_runs - 1) * float((rest.sum(1) ** 2).sum()) / n**2
    mbar, v = float(num_runs * (m**2).sum() / m.sum()), vp + vr
    free = (vp**2 / (count - 1) if count > 1 else 0.0) + vr**2 / (num_runs - 1)
    df = v * v / free if free > 0 else float(count - 1 if count > 1 else num_runs - 1)
    icc = (v / (variance / n) - 1) / (mbar - 1) if variance > 0 else None
    return _Layout(v, df, 1 + (mbar - 1) * max(MIN_ICC, icc or 0.0), icc)  # not cut at 1: runs may differ more


def _same_samples(name: str, runs: Sequence[Sequence[float]]) -> "Array":
    """[run, sample]."""
    values = [values_of(f"{name}, run {number}", run) for number, run in enumerate(runs, 1)]
    if not values or len({len(run) for run in values}) > 1:
        raise EraseError(f"'{name}': the runs hold different prompts; evaluate every run on the same task")
    return np.stack(values)


def _are_outcomes(runs: Sequence[Sequence[float]]) -> bool:
    return all(isinstance(value, bool | np.bool_) for run in runs for value in run)


def _over(prompts: Prompts, num_runs: int) -> str:
    if prompts.count == 1:
        return f"over {num_runs} runs, {ONE_PROMPT}"
    return f"over {num_runs} runs and {prompts.count} prompts"
