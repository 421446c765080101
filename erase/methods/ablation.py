"""Concept Ablation, model-based (Kumari et al., ICCV 2023): images of the anchor, named as the concept."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod
from erase.methods.terms import denoised, relabelled


@dataclass(frozen=True)
class Ablation(TrainedMethod):
    """L = ||eps(x_t | c_f) - sg eps_target(x_t | c_a)||^2 + alpha ||eps(x_t' | c_r) - eps'||^2, means over elements.

    x_t is a noised image of the anchor; the model gets the forget prompt for it. No gradient passes through key and
    value of the start token, which is the same in every prompt.

    alpha: weight of the prior's diffusion loss; the authors use 1 for nudity and 0 for objects and styles.
    frozen_target: eps_target is the base model (ours); otherwise the model in training, as in their code.

    Costs per step: two forward passes and one backward pass, one more of each with alpha above 0; images of the anchor
    instead of the concept. Known weakness: the model never sees images of the concept, so the concept remains in images
    that start from one, and for prompts far from the forget prompts.
    """

    formula = 2  # 1: version 0.1.0
    images = "anchor"
    detaches_start = True

    alpha: float = 0.0
    frozen_target: bool = False

    @property
    def needs_base(self) -> bool:
        return self.frozen_target

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield "forget", relabelled(model, frozen if self.frozen_target else model, batch)
        if self.retains:
            yield "retain", self.alpha * denoised(model, batch)
