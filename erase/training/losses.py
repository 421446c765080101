"""Losses of the steps; on a GPU they stay there until they are read, so that no step waits for it."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

READ_EVERY = 25  # steps, on a GPU


def exact(term: Tensor) -> Tensor:
    """The value of a term of the loss, float64 without dimensions, on its device (float32 on mps)."""
    return term.detach().reshape(()).to(torch.float32 if term.device.type == "mps" else torch.float64)


class Losses:
    """The losses of all steps so far.

    seen: those that have been read, by step and name.
    halt: on a GPU, int32 without dimensions there: not 0 from the first step on whose losses are not finite. All that
        changes weights must leave them alone then. None elsewhere: losses are read before their step is taken.
    """

    def __init__(self, device: torch.device, seen: list[dict[str, float]]):
        self.seen = seen
        self.halt = torch.zeros((), dtype=torch.int32, device=device) if device.type == "cuda" else None
        self._waiting: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, values: Mapping[str, Tensor]) -> None:
        """The losses of one more step, as `exact` gives them."""
        together = torch.stack([*values.values()]) if values else torch.zeros(0)
        self._waiting.append((tuple(values), together))
        if self.halt is not None:
            self.halt.add_(together.isfinite().all().logical_not())

    @property
    def are_due(self) -> bool:
        """Whether they should be read before the step is taken."""
        return self.halt is None or len(self._waiting) >= READ_EVERY

    def read(self) -> int | None:
        """Move what is waiting to `seen`, up to the first step with a loss that is not finite.

        Returns the number of that step, counted from 0; None if there is none.
        """
        if not self._waiting:
            return None
        values = iter(torch.cat([values for _, values in self._waiting]).tolist())
        for names, _ in self._waiting:
            of_step = {name: next(values) for name in names}
            if not all(map(math.isfinite, of_step.values())):
                return len(self.seen)
            self.seen.append(of_step)
        self._waiting.clear()
        return None
