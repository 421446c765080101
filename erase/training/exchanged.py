"""The model with other values in its masked weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

    def moved(self) -> dict[str, Tensor]:
        """How far the masked weights are from these values, by parameter, [masked weights]."""
        return {name: now.sub_(self.values[name]) for name, now in self._optimizer.masked_weights().items()}

    def move(self, moved: Mapping[str, Tensor]) -> None:
        """Set the masked weights so far from these values."""
        self._optimizer.exchange({name: value + moved[name] for name, value in self.values.items()})

    def take(self) -> None:
        """Make these values the model's present ones."""
        self.values = self._optimizer.masked_weights()

    def put(self) -> None:
        """Give the model these values, which stay what they are."""
        self._optimizer.exchange({name: value.clone() for name, value in self.values.items()})

    def follow(self, decay: float) -> None:
        """Let these values go after the model's: decay * value + (1 - decay) * now."""
        for name, now in self._optimizer.masked_weights().items():
            self.values[name].lerp_(now, 1 - decay)
