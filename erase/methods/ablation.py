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

    x_t is noised from images of the anchor, which are named by the forget prompt. No gradient passes the key and the
    value of the start token, which is the same in every prompt.

    alpha: weight of the prior's diffusion loss; the authors have 1 for nudity and none for objects and styles.
    frozen_target: eps_target is the untouched base (ours); otherwise the model itself as it moves, as in their code.

    Costs two passes forward and one back a step, with a prior one more of each, and images of the anchor instead of
    the concept. Known to break: the model is never shown the concept, so that images begun from it, and prompts far
    from the forget prompts, keep it.
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
