"""The model and its base whose passes of one shape are replayed from CUDA graphs."""

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from erase.conditioning import Conditioning
from erase.families.protocol import Family
from erase.graphs import Replayed


class Pass(nn.Module):
    """A model's prediction as a module of its network: (x, t, the inputs in `Conditioning` that there are)."""

    def __init__(self, model: Family):
        super().__init__()
        self.network: Any = model.network
        self._predict = model.predict
        self.parts: tuple[str, ...] = ()

    def forward(self, x: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        return self._predict(self.network, x, t, Conditioning(**dict(zip(self.parts, inputs, strict=True))))


class ReplayedModel:
    """A `Predictor` that answers as the model does, for a network whose tensors stay where they are in memory.

    gradients: replay passes with gradients, once a step; otherwise those without.
    """

    def __init__(self, model: Family, *, gradients: bool):
        self._model, self._pass = model, Pass(model).train(model.network.training)
        self._replayed = Replayed(self._pass, gradients=gradients)

    def new_step(self) -> None:
        """See `Replayed.new_step`."""
        self._replayed.new_step()

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        inputs = {item.name: part for item in fields(c) if (part := getattr(c, item.name)) is not None}
        if not self._pass.parts:
            self._pass.parts = tuple(inputs)
        assert tuple(inputs) == self._pass.parts
        return self._replayed(x, t, *inputs.values())

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        return self._model.attention(x, t, c)

    def text_attention(self, c: Conditioning) -> Tensor:
        return self._model.text_attention(c)
