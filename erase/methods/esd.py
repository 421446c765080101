"""Erased Stable Diffusion (Gandikota et al., ICCV 2023): steer the forget prompt away from itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class ESD(TrainedMethod):
    """L = ||eps(x_t | c_f) - target||^2, x_t a point on a new trajectory from noise to the concept in each step, where
        current   target = eps*(x_t | c_f) - eta (eps*(x_t | c_f) - eps*(x_t | ""))
        paper     target = eps*(x_t | "")  - eta (eps*(x_t | c_f) - eps*(x_t | ""))
    The authors' present code uses "current" with eta = 2, which equals "paper" with eta = 1.

    guidance: eta, how far to push away from the concept; with "current", 1 gives the unconditional prediction.
    follows: the model that generates the trajectories: the frozen "base" (the authors' present code), or the "edited"
        model as it is at that step (their first code, and LECO).
    fresh: generate new trajectories in each step. Otherwise (ours) the base generates `--num-forget` trajectories
        before the first step, which are used repeatedly; this is cheaper if they are fewer than steps x batch size.

    `esd-x` is meant to change the effect of words only: on the embedded model images of the empty prompt change by 0.07
    to 0.11 of the latents' norm, with `esd-u` by 0.23 to 0.29 (three concepts, eval/mini_methods.py).
    `leco` trains a change of rank 4 with the paper's target; `--save lora` is then exact.
    There is no retain loss. Costs per step: three forward passes and one backward pass, and for each latent a
    trajectory of up to 50 double passes. Known weakness: prompts that share words with the concept change too; `esd-u`
    and `esd-full` change images of other prompts; `esd-x` leaves knowledge outside cross-attention, which attacks find.
    """

    formula = 2  # 1: version 0.1.0
    anchors = False

    guidance: float = 2.0
    target: Literal["current", "paper"] = "current"
    follows: Literal["base", "edited"] = "base"
    fresh: bool = True

    def __post_init__(self) -> None:
        if self.follows == "edited" and not self.fresh:
            raise EraseError("trajectories of the edited model change in each step; leave out fresh=false")

    @property
    def images(self) -> Literal["noise", "trajectory"]:
        return "noise" if self.fresh else "trajectory"

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
