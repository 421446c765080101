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

        `moved` is emptied meanwhile, to save memory.
        """
        wanted = {name: value + moved.pop(name) for name, value in self.values.items()}
        if halt is not None:
            now = self._optimizer.masked_weights()
            wanted = {name: torch.where(halt == 0, wanted.pop(name), value) for name, value in now.items()}
        self._optimizer.exchange(wanted)

    def take(self) -> None:
        """Make these values the model's present ones."""
        self.values = self._optimizer.masked_weights()

    def put(self) -> None:
        """Give the model these values, which stay what they are."""
        self._optimizer.exchange({name: value.clone() for name, value in self.values.items()})

    def follow(self, decay: float, halt: Tensor | None = None) -> None:
        """Let these values follow the model's: decay * value + (1 - decay) * now. A `halt` that is not 0 stops them."""
        weights = self._optimizer.masked_weights()
        share = 1 - decay if halt is None else ((halt == 0) * (1 - decay)).to(next(iter(weights.values())).dtype)
        for name, now in weights.items():
            self.values[name].lerp_(now, share)
