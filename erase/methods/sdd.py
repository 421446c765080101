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

    The teacher is the average of the weights, theta* <- decay theta* + (1 - decay) theta, and is the result. The forget
    prompt of each row is random, among all that the concept has.

    teacher_decay: of the average; nearer 1 the result follows later and more smoothly.

    Costs two forward passes and one backward pass a step, and before each step a trajectory of up to 50 double passes;
    needs no images.
    Known to break: as ESD with eta = 1; it has no retain term, and too few steps leave the average near the base.
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
