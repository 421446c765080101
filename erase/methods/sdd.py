"""Safe self-distillation diffusion (Kim et al., 2023): the concept's prediction becomes the unconditional one."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class SelfDistillation(TrainedMethod):
    """L = ||eps(x_t | c_f) - sg eps(x_t | "")||^2, x_t a point on the teacher's trajectory from noise to the concept.

    The teacher is the running average of the weights, theta* <- decay theta* + (1 - decay) theta; it is also the
    result. The forget prompt of each row is chosen at random from the concept's.

    teacher_decay: decay of the average; closer to 1 the result follows the training later and more smoothly.

    Costs per step: two forward passes and one backward pass, and a trajectory of up to 50 double passes; no images.
    Known weakness: as ESD with eta = 1; no retain loss, and after too few steps the average is close to the base.
    """

    formula = 2  # 1: version 0.1.0
    images = "noise"
    anchors = False

    teacher_decay: float = 0.999

    @property
    def retains(self) -> bool:
        return False

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        x, t = batch.x_forget, batch.t_forget
        with torch.no_grad():
            target = model(x, t, batch.c_empty)
        yield "forget", F.mse_loss(model(x, t, batch.c_forget), target)
