"""The model with other values in its masked weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from erase.conditioning import Conditioning
from erase.families.protocol import Family
from erase.optim import MaskedAdam


class Exchanged:
    """The model with other values in its masked weights, for the time of a call; at first those that it has now."""

    def __init__(self, model: Family, optimizer: MaskedAdam):
        self._model, self._optimizer, self.values = model, optimizer, optimizer.masked_weights()

    @contextmanager
    def inside(self) -> Iterator[Family]:
        self._optimizer.exchange(self.values)
        try:
            yield self._model
        finally:
            self._optimizer.exchange(self.values)

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        with self.inside() as model:
            return model(x, t, c)

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        with self.inside() as model:
            return model.attention(x, t, c)

    def text_attention(self, c: Conditioning) -> Tensor:
        with self.inside() as model:
            return model.text_attention(c)

    def moved(self) -> dict[str, Tensor]:
        """How far the masked weights are from these values, by parameter, [masked weights]."""
        now = self._optimizer.masked_weights()
        torch._foreach_sub_([*now.values()], [self.values[name] for name in now])
        return now

    def move(self, moved: dict[str, Tensor], halt: Tensor | None = None) -> None:
        """Set the masked weights so far from these values; if `halt` is given and not 0, leave them.

        `moved` is emptied, and its tensors are used.
        """
        wanted = {name: moved.pop(name) for name in self.values}
        torch._foreach_add_([*wanted.values()], [*self.values.values()])
        if halt is not None:
            now, goes = self._optimizer.masked_weights(), (halt == 0).to(next(iter(wanted.values())).dtype)
            torch._foreach_mul_([*wanted.values()], goes)
            torch._foreach_mul_([*now.values()], 1 - goes)
            torch._foreach_add_([*wanted.values()], [now[name] for name in wanted])
        self._optimizer.exchange(wanted)

    def take(self) -> None:
        """Make these values the model's present ones."""
        self.values = self._optimizer.masked_weights()

    def put(self) -> None:
        """Give the model these values, which stay what they are."""
        self._optimizer.exchange({name: value.clone() for name, value in self.values.items()})

    def follow(self, decay: float, halt: Tensor | None = None) -> None:
        """Let these values follow the model's: decay * value + (1 - decay) * now. A `halt` that is not 0 stops them."""
        now, values = self._optimizer.masked_weights(), [*self.values.values()]
        present = [now[name] for name in self.values]
        if halt is None:
            torch._foreach_lerp_(values, present, 1 - decay)
            return
        torch._foreach_sub_(present, values)
        torch._foreach_mul_(present, ((halt == 0) * (1 - decay)).to(values[0].dtype))
        torch._foreach_add_(values, present)
