"""Selective Amnesia (Heng & Soh, NeurIPS 2023): a surrogate for the concept, replay, and elastic weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod
from erase.methods.terms import denoised


@dataclass(frozen=True)
class SelectiveAmnesia(TrainedMethod):
    """L = ||eps(x_t | c_f) - eps||^2 + gamma ||eps(x_t' | c_r) - eps'||^2 + lambda sum_i F_i (theta_i - theta*_i)^2.

    x_0 of the first term is a surrogate instead of the concept, x_t' a noised retain image (generative replay), and F
    the empirical Fisher information at the base theta*: the mean over `curvature_batches` batches of the squared
    gradient of the replay's loss. Losses are means over elements.

    surrogate: "uniform" is noise, uniform in [-1, 1], as in the authors' pixel models; "anchor" is images of the
        anchor, as in their text-to-image models.
    gamma: weight of the replay; a larger one retains more.
    lamb: lambda. A larger one keeps weights that matter to any image closer to the base. Its scale depends on that of
        F: the authors' 10 is for losses that are sums over pixels and over 1,000 timesteps.

    Costs per step: two forward and two backward passes, and two copies of the weights that may change; before the first
    step `curvature_batches` gradients. Known weakness: the uniform surrogate needs many steps, and F protects
    weights that the concept shares with other images.
    """

    gamma: float = 1.0
    lamb: float = 1e6
    surrogate: Literal["uniform", "anchor"] = "uniform"
    curvature_batches: int = 50

    def __post_init__(self) -> None:
        if min(self.gamma, self.lamb) < 0 or self.curvature_batches < 1:
            raise EraseError(
                f"sa has gamma={self.gamma}, lamb={self.lamb} and curvature_batches={self.curvature_batches}; "
                "they must be 0 or more, and at least one batch"
            )

    @property
    def images(self) -> Literal["uniform", "anchor"]:
        return self.surrogate

    @property
    def anchors(self) -> bool:
        return self.surrogate == "anchor"

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield "forget", F.mse_loss(model(batch.x_forget, batch.t_forget, batch.c_forget), batch.eps_forget)
        yield "retain", self.gamma * denoised(model, batch)

    def curvature_loss(self, model: Predictor, batch: Batch) -> Tensor:
        return denoised(model, batch)

    def pull(self, moved: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """2 lambda F (theta - theta*)."""
        return {name: 2 * self.lamb * curvature[name] * way for name, way in moved.items()}
