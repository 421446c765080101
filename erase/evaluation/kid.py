"""KID: the squared maximum mean discrepancy of two sets of features with the kernel k(x, y) = (x.y / d + 1)^3.

    pairs   mean over images i, j of different prompts:  k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i)
    sets    mean k(a_i, a_j) + mean k(b_i, b_j) - 2 mean k(a_i, b_j), within a set over different prompts only

Images of two models on the same prompts and seeds are pairs: without the terms k(a_i, b_i), KID of a set and itself is
0 (Gretton et al., JMLR 2012, lemma 6). Images of one prompt resemble each other, which would count as distance, so they
never meet either. The interval is the jackknife over prompts with Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from erase import statistics
from erase.errors import EraseError
from erase.evaluation.quality import checked
from erase.statistics.clusters import Prompts
from erase.statistics.intervals import quantile

MIN_KID = 4
MOST_KID = 5000  # images; of more, evenly chosen prompts are used, because time grows with the square
_BLOCK = 1000  # images whose kernels are computed at a time


@dataclass(frozen=True)
class Kid:
    """KID and its 95 % interval, which is None with fewer than three prompts; n: images of the smaller set."""

    value: float
    low: float | None
    high: float | None
    n: int
    interval: str = "jackknife over prompts"


def kid_of_pairs(a: np.ndarray, b: np.ndarray, prompts: Sequence[str] | None = None) -> Kid:
    """KID of two models' features, [n, d] each; a[i] and b[i] are of the same prompt and seed.

    prompts: of each image; without it each image is a prompt of its own, and so it is with a single prompt, for which
        the interval says nothing of other prompts.

    Raises:
        EraseError: too few features, or not equally many.
    """
    from_a, from_b = checked(a, b)
    _require_enough(min(len(from_a), len(from_b)))
    if len(from_a) != len(from_b):
        raise EraseError(f"{len(from_a)} and {len(from_b)} features are no pairs; give the same images of both models")
    labels, is_one = _labels(prompts, len(from_a))
    kept = _chosen(labels)
    x, y, of = from_a[kept], from_b[kept], Prompts.of("KID", len(kept), [labels[i] for i in kept])
    crossed = _sums(x, y, of, of)
    part = _Part.of(_sums(x, x, of, of) + _sums(y, y, of, of) - crossed - crossed.T, of.m)
    variance = _variance(part.without) if of.count > 2 else 0.0
    return _with_reach(part.mean, variance, of.count, len(kept), is_one)


def kid_of_sets(a: np.ndarray, b: np.ndarray, prompts: Sequence[str] | None = None) -> Kid:
    """KID of a model's features, [n, d], and those of other images, [m, d], each of which is a prompt of its own.

    prompts: of the model's images. The interval leaves out one prompt of the model, or one other image, at a time.

    Raises:
        EraseError: too few features.
    """
    from_a, from_b = checked(a, b)
    _require_enough(min(len(from_a), len(from_b)))
    labels, is_one = _labels(prompts, len(from_a))
    kept, others = _chosen(labels), _chosen([str(i) for i in range(len(from_b))])
    x, y = from_a[kept], from_b[others]
    of_a, of_b = Prompts.of("KID", len(x), [labels[i] for i in kept]), Prompts.of("KID", len(y), None)
    within_a, within_b = _Part.of(_sums(x, x, of_a, of_a), of_a.m), _Part.of(_sums(y, y, of_b, of_b), of_b.m)
    crossed = _sums(x, y, of_a, of_b)
    total, size_a, size_b, count = crossed.sum(), len(x), len(y), min(of_a.count, of_b.count)
    value = within_a.mean + within_b.mean - 2 * total / (size_a * size_b)
    variance = 0.0
    if count > 2:
        less_a, less_b = (size_a - of_a.m) * size_b, size_a * (size_b - of_b.m)
        without_a = within_a.without + within_b.mean - 2 * (total - crossed.sum(1)) / less_a
        without_b = within_a.mean + within_b.without - 2 * (total - crossed.sum(0)) / less_b
        variance = _variance(without_a) + _variance(without_b)
    return _with_reach(float(value), variance, count, min(size_a, size_b), is_one)


def _labels(prompts: Sequence[str] | None, n: int) -> tuple[list[str], bool]:
    """The prompt of each image, and whether there is only one; then images are labelled instead."""
    is_one = prompts is not None and len(set(prompts)) == 1 and n > 1
    return ([str(i) for i in range(n)] if prompts is None or is_one else list(prompts)), is_one


def _chosen(labels: Sequence[str]) -> list[int]:
    """The images of evenly chosen prompts, `MOST_KID` at most."""
    prompts = list(dict.fromkeys(labels))
    num = min(len(prompts), max(3, MOST_KID * len(prompts) // len(labels)))
    chosen = {prompts[i * len(prompts) // num] for i in range(num)}
    return [i for i, label in enumerate(labels) if label in chosen]


def _sums(x: torch.Tensor, y: torch.Tensor, of_x: Prompts, of_y: Prompts) -> np.ndarray:
    """Of the kernel over each pair of prompts, [C, D]."""
    found = torch.zeros(of_x.count, of_y.count, dtype=torch.float64)
    rows, columns = torch.tensor(of_x.index), torch.tensor(of_y.index)
    for start in range(0, len(x), _BLOCK):
        kernel = ((x[start : start + _BLOCK] @ y.T) / x.shape[1] + 1) ** 3
        by_prompt = torch.zeros(len(kernel), of_y.count, dtype=torch.float64).index_add_(1, columns, kernel)
        found.index_add_(0, rows[start : start + _BLOCK], by_prompt)
    return found.numpy()


@dataclass(frozen=True)
class _Part:
    """A mean over images of different prompts, and what leaving out each prompt takes from its sum and its number."""

    total: float
    number: float
    rows: np.ndarray
    less: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray, m: np.ndarray) -> "_Part":
        """sums: of the kernel over each pair of prompts. m: images of each prompt."""
        n, own = m.sum(), np.diag(sums)
        number = float(n * n - (m**2).sum())
        return cls(float(sums.sum() - own.sum()), number, sums.sum(0) + sums.sum(1) - 2 * own, 2 * m * (n - m))

    @property
    def mean(self) -> float:
        return self.total / self.number

    @property
    def without(self) -> np.ndarray:
        """The mean without each prompt."""
        return (self.total - self.rows) / (self.number - self.less)


def _variance(without: np.ndarray) -> float:
    """The jackknife's, from the values without each prompt."""
    count = len(without)
    return float((count - 1) / count * ((without - without.mean()) ** 2).sum())


def _with_reach(value: float, variance: float, count: int, n: int, is_one: bool) -> Kid:
    if variance <= 0:
        return Kid(value, None, None, n, "cannot tell")
    reach = quantile(statistics.CONFIDENCE, count - 1) * variance**0.5
    interval = f"jackknife over images, {statistics.ONE_PROMPT}" if is_one else "jackknife over prompts"
    return Kid(value, value - reach, value + reach, n, interval)


def _require_enough(n: int) -> None:
    if n < MIN_KID:
        raise EraseError(f"KID of {n} images is meaningless; it needs at least {MIN_KID}")
