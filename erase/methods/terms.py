"""Terms that several papers share, means over elements."""

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.methods.inputs import Batch, Predictor

Seen = tuple[Tensor, Tensor, Conditioning]  # what a predictor is called with


def relabelled(model: Predictor, teacher: Predictor, batch: Batch) -> Tensor:
    """||eps(x_t | c_f) - sg eps_teacher(x_t | c')||^2: answer the forget prompt as if it said something else."""
    with torch.no_grad():
        target = teacher(batch.x_target, batch.t_forget, batch.c_target)
    return F.mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), target)


def denoised(model: Predictor, batch: Batch) -> Tensor:
    """||eps(x_t' | c_r) - eps'||^2: the diffusion loss of the images to keep."""
    return F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain)


def both(predict: Predictor, one: Seen, other: Seen) -> tuple[Tensor, Tensor]:
    """The predictions for two batches, from one pass."""
    (x, t, c), (x_2, t_2, c_2) = one, other
    found = predict(torch.cat([x, x_2]), torch.cat([t, t_2]), Conditioning.cat([c, c_2]))
    return found[: len(x)], found[len(x) :]
