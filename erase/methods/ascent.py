"""Gradient ascent on the concept's own diffusion loss, as SalUn's authors run it for comparison."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod
from erase.methods.terms import denoised


@dataclass(frozen=True)
class GradientAscent(TrainedMethod):
    """L = -||eps(x_t | c_f) - eps||^2 + alpha ||eps(x_t' | c_r) - eps'||^2, means over elements.

    Thudi et al. (EuroS&P 2022) for classifiers; SalUn's `gradient_ascent.py` for Stable Diffusion.

    alpha: weight of the retain loss; 0 is ascent alone.

    Costs per step: two forward and two backward passes, no base model. Known weakness: the loss has no lower bound, so
    too many or too large steps destroy all images, and images of the concept become noise rather than something else.
    """

    anchors = False

    alpha: float = 0.1

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield "forget", -F.mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), batch.eps_forget)
        if self.retains:
            yield "retain", self.alpha * denoised(model, batch)
