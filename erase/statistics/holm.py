"""p-values corrected for being looked at together."""

import itertools
from collections.abc import Hashable, Sequence


def holm(p: Sequence[float | None], tests: Sequence[Hashable] | None = None) -> list[float | None]:
    """Holm's correction (1979); None stays None and is not counted.

    tests: what each p-value tests. Equal ones are copies of one test: they count once and share the corrected value.
    """
    labels = list(range(len(p))) if tests is None else list(tests)
    known = {label: value for label, value in zip(labels, p, strict=True) if value is not None}
    order = sorted(known.items(), key=lambda item: item[1])
    steps = (min(1.0, (len(order) - rank) * value) for rank, (_, value) in enumerate(order))
    corrected = dict(zip((label for label, _ in order), itertools.accumulate(steps, max), strict=True))
    return [None if value is None else corrected[label] for label, value in zip(labels, p, strict=True)]
