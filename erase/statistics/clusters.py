"""How many independent images a sample is worth: sums per prompt, and the design effect.

    deff = 1 + (mbar - 1) * min(1, max(MIN_ICC, icc)),   mbar = sum(m_i^2) / n,   n_eff = n / deff

The floor is what keeps intervals honest when few events were seen: many small losses can hide that one prompt in a
hundred is lost altogether, and the observed correlation cannot show that (Kish 1965; Franco et al., J. Surv. Stat.
Methodol. 2019).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from erase.errors import EraseError

if TYPE_CHECKING:
    from erase.statistics.figures import Array

MIN_ICC = 0.3


@dataclass(frozen=True)
class Prompts:
    """Which prompt each value belongs to. index: of each value, [n]. m: values of each prompt, [C]."""

    index: "np.ndarray"
    m: "Array"

    @classmethod
    def of(cls, name: str, n: int, labels: Sequence[str] | None) -> "Prompts":
        """From each value's label; without labels, each value is a prompt of its own.

        Raises:
            EraseError: another number of labels than values.
        """
        if labels is None:
            return cls(np.arange(n), np.ones(n))
        if len(labels) != n:
            raise EraseError(f"'{name}': {len(labels)} cluster labels for {n} samples; give one label each")
        _, index = np.unique(np.asarray(labels), return_inverse=True)
        return cls(index, np.bincount(index).astype(np.float64))

    @property
    def count(self) -> int:
        return len(self.m)

    @property
    def are_clusters(self) -> bool:
        """Whether there are two prompts or more, and any of them has two images or more."""
        return self.count > 1 and self.m.max() > 1

    @property
    def is_one(self) -> bool:
        """Whether all of several values are of one prompt."""
        return self.count == 1 and self.m[0] > 1

    @property
    def stated(self) -> int | None:
        """The number of prompts, if any has several images."""
        return self.count if self.m.max() > 1 else None

    def sums(self, values: "Array") -> "Array":
        """Of the values of each prompt, [C]."""
        return np.bincount(self.index, weights=values, minlength=self.count).astype(np.float64)


def correlation(sums: "Array", m: "Array", v0: float) -> float | None:
    """The observed intraclass correlation; None if it cannot be observed.

    sums: of each prompt's values. m: images of each prompt. v0: variance of one value.
    """
    count, n = len(m), m.sum()
    mbar = (m**2).sum() / n
    if count < 2 or mbar <= 1 or v0 <= 0:
        return None
    v = count / (count - 1) * ((sums - m * sums.sum() / n) ** 2).sum() / n**2
    return float((v / (v0 / n) - 1) / (mbar - 1))


def design_effect(m: "Array", icc: float | None) -> float:
    """By how much fewer images are worth, for an observed correlation; 1 for one image per prompt, or one prompt."""
    mbar = float((m**2).sum() / m.sum())
    if len(m) < 2 or mbar <= 1:
        return 1.0
    return 1 + (mbar - 1) * min(1.0, max(MIN_ICC, icc or 0.0))
