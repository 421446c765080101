"""SalUn's loss for diffusion models (Fan et al., ICLR 2024): answer the forget prompt as if it said something else."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Predictor(Protocol):
    """The noise that a model sees in `x` at step `t` under the text: all methods call models in this way.

    x: noisy latents, [n, c, h, w]. t: int64, [n]. text: text encoder states, [n, tokens, d].
    """

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """What one step sees, forget and retain alike: latents noised at `t` with `eps`, and text states.

    x_target: the forget latents again, as the target branch sees them; the reference draws a second sample of the
        VAE's posterior, so that it is not quite `x_forget`.
    c_target: what to say instead: the anchor's text (prompt remapping) or another class's (random label).
    """

    x_forget: Tensor
    x_target: Tensor
    x_retain: Tensor
    t_forget: Tensor
    t_retain: Tensor
    eps_retain: Tensor
    c_forget: Tensor
    c_target: Tensor
    c_retain: Tensor


@dataclass(frozen=True)
class Relabel:
    """L = ||eps(x_t | c_f) - sg eps_target(x_t | c')||^2 + alpha ||eps(x_t' | c_r) - target_r||^2, means over elements.

    alpha: weight of the retain term; more keeps more and forgets less.
    frozen_target: eps_target is the untouched base; otherwise the model itself as it moves.
    distill_retain: target_r is the base's prediction; otherwise the noise that was added (the diffusion loss).
    """

    alpha: float = 1.0
    frozen_target: bool = True
    distill_retain: bool = True

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """The two terms, "forget" and "retain", already weighted; their sum is what training descends.

        Each may be backpropagated before the next is asked for, so that only one graph is in memory.
        """
        teacher = frozen if self.frozen_target else model
        with torch.no_grad():
            target = teacher(batch.x_target, batch.t_forget, batch.c_target)
        yield "forget", F.mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), target)
        if self.alpha == 0:
            return
        keep = batch.eps_retain
        if self.distill_retain:
            with torch.no_grad():
                keep = frozen(batch.x_retain, batch.t_retain, batch.c_retain)
        yield "retain", self.alpha * F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), keep)
