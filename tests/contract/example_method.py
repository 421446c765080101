"""A method of another package: all that it takes to add one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from erase.methods import TrainedMethod
from erase.methods.inputs import Batch, Predictor


@dataclass(frozen=True)
class Unconditional(TrainedMethod):
    """L = weight ||eps(x_t | c_f) - sg eps(x_t | "")||^2: answer the forget prompt as if nothing were said."""

    weight: float = 1.0

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            target = model(batch.x_forget, batch.t_forget, batch.c_empty)
        yield "forget", self.weight * mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), target)
