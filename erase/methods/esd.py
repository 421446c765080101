"""Erased Stable Diffusion (Gandikota et al., ICCV 2023): steer the forget prompt away from itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class ESD(TrainedMethod):
    """L = ||eps(x_t | c_f) - target||^2, x_t a point on the frozen model's trajectory from noise to the concept, where
        current   target = eps*(x_t | c_f) - eta (eps*(x_t | c_f) - eps*(x_t | ""))
        paper     target = eps*(x_t | "")  - eta (eps*(x_t | c_f) - eps*(x_t | ""))
    The authors' code has the first today, with eta = 2, which is the second with eta = 1, the paper's.

    guidance: eta, how far to push away from the concept; 1 under "current" is the unconditional prediction.

    "x" is meant to touch only what the words say: on the embedded model images of the empty prompt move by 0.07 to
    0.11 of the latents' size under `esd-x`, by 0.23 to 0.29 under `esd-u` (three concepts, eval/mini_methods.py).
    `leco` trains a change of rank 4 with the paper's target; `--save lora` then holds all of it.
    There is no retain term. A step costs three forward passes and one backward pass; each latent costs a trajectory
    of up to 50 double passes beforehand. Known to break: prompts that share words with the concept; `esd-u` and
    `esd-full` change images of other prompts, and `esd-x` leaves knowledge outside the text layers, which attacks find.
    """

    images = "trajectory"
    anchors = False

    guidance: float = 2.0
    target: Literal["current", "paper"] = "current"

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def retains(self) -> bool:
        return False

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        x, t = batch.x_forget, batch.t_forget
        with torch.no_grad():
            both = frozen(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([batch.c_forget, batch.c_empty]))
            conditional, unconditional = both.chunk(2)
        start = conditional if self.target == "current" else unconditional
        target = start - self.guidance * (conditional - unconditional)
        yield "forget", F.mse_loss(model(x, t, batch.c_forget), target)
