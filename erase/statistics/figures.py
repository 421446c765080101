"""What a figure is: a score of one model, and the comparison of two models on the same samples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from erase.errors import EraseError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIDENCE = 0.95
ONE_PROMPT = "this prompt only"  # ends the name of an interval that says nothing of other prompts


@dataclass(frozen=True)
class Score:
    """One figure of one model.

    low, high: 95 % interval, made as `interval` says; None where no interval can be given.
    k: successes, for a rate.
    clusters: number of prompts, if any prompt has several images. The interval is then over prompts.
    icc: observed intraclass correlation of the images of one prompt; None if it cannot be observed.
    """

    name: str
    value: float
    n: int
    low: float | None
    high: float | None
    higher_is_better: bool
    k: int | None = None
    interval: str = "Wilson"
    clusters: int | None = None
    icc: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The erased model against the base on the same samples.

    difference: erased minus base, with its 95 % interval, over prompts if any prompt has several images.
    low, high: None where no interval can be given.
    n: number of pairs.
    only_base, only_erased: pairs in which the outcome was true for this model alone, for a rate.
    p: two-sided, by `test`; below .05 if and only if the interval excludes 0. None if there is no interval.
    p_holm: p corrected for all comparisons in a table.
    icc: as in `Score`, of the differences.
    """

    name: str
    base: float
    erased: float
    difference: float
    low: float | None
    high: float | None
    n: int
    p: float | None
    only_base: int | None = None
    only_erased: int | None = None
    clusters: int | None = None
    p_holm: float | None = None
    interval: str = "Tango"
    test: str = "McNemar score"
    icc: float | None = None


def to_json(figure: Score | Comparison) -> dict[str, Any]:
    """Its fields as plain JSON values."""
    return asdict(figure)


def values_of(name: str, values: Sequence[float]) -> "Array":
    """The values as float64, [n].

    Raises:
        EraseError: there are none, or some are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise EraseError(f"'{name}' has no samples (n = 0); check the subset or the folder that it was to be made from")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise EraseError(
            f"'{name}' has {bad} values of {len(array)} that are no numbers; count those images as invalid"
        )
    return array


def pairs_of(name: str, base: Sequence[float], erased: Sequence[float]) -> "tuple[Array, Array]":
    """Both models' values as float64, [n] each.

    Raises:
        EraseError: see `values_of`; or they are not equally many.
    """
    before, after = values_of(name, base), values_of(name, erased)
    if len(before) != len(after):
        raise EraseError(f"'{name}': {len(before)} samples of the base but {len(after)} of the erased model; pair them")
    return before, after
