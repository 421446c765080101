"""Terms that several papers share, means over elements."""

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.methods.inputs import Batch, Predictor

Seen = tuple[Tensor, Tensor, Conditioning]  # what a predictor is called with


def relabelled(model: Predictor, teacher: Predictor, batch: Batch) -> Tensor:
    """||eps(x_t | c_f) - sg eps_teacher(x_t | c')||^2: predict for the forget prompt what another prompt gives."""
    with torch.no_grad():
        target = teacher(batch.x_target, batch.t_forget, batch.c_target)
    return F.mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), target)


def denoised(model: Predictor, batch: Batch) -> Tensor:
    """||eps(x_t' | c_r) - eps'||^2: the diffusion loss of the retain images."""
    return F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), batch.eps_retain)


def several(predict: Predictor, *seen: Seen) -> tuple[Tensor, ...]:
    """The predictions for several batches, from one pass."""
    x, t, c = zip(*seen, strict=True)
    return predict(torch.cat(x), torch.cat(t), Conditioning.cat(c)).split([len(one) for one in x])
