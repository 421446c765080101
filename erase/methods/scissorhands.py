"""Scissorhands (Wu & Harandi, ECCV 2024): cut what the concept hangs on, then mend all else."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from erase.masks import select
from erase.methods.balance import nash, projected
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod
from erase.methods.terms import denoised, relabelled


@dataclass(frozen=True)
class Scissorhands(TrainedMethod):
    """First the most sensitive weights, s = |w| sum_b |grad L_f|, get new random values; then L = L_r + lambda L_f.

    L_f = ||eps(x_t | c_f) - sg eps(x_t | c_a)||^2, L_r = ||eps(x_t' | c_r) - eps'||^2, means over elements. s is SNIP's
    score (Lee et al., ICLR 2019); the new values are Kaiming's uniform ones, |w| <= sqrt(6 / inputs).

    sparsity: share of the weights that keep their values; 0.995 in the authors' recipe for nudity.
    forget_weight: lambda.
    balancing: "gem" takes from grad L_f what would raise L_r, "nash" weighs the two as MUNBa does; both take memory for
        two gradients.
    prepare_batches: over which s is summed.

    Differs from the authors: norms and biases stay as they are, because a new scale of 0 would silence a channel.
    Costs three passes forward and two back a step, no base. Known to break: a small model, or a small share of
    steps to mend it, keeps the damage in every image.
    """

    sparsity: float = 0.999
    forget_weight: float = 0.1
    balancing: Literal["sum", "gem", "nash"] = "sum"
    prepare_batches: int = 10

    @property
    def balance(self) -> Callable[[float, float, float], tuple[float, float]] | None:
        return {"sum": None, "gem": projected, "nash": nash}[self.balancing]

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        draw: torch.Generator,
    ) -> None:
        """New values for the most sensitive entries of matrices and kernels, in place."""
        names = [name for name, shape in shapes.items() if len(shape) > 1 and weights[name].numel()]
        scores = {name: gradients[name] * weights[name].abs() for name in names}
        for name, chosen in select(scores, 1 - self.sparsity).items():
            bound = math.sqrt(6 / math.prod(shapes[name][1:]))
            values = (2 * torch.rand(int(chosen.count_nonzero()), generator=draw) - 1) * bound
            weights[name][chosen] = values.to(weights[name])

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield "forget", self.forget_weight * relabelled(model, model, batch)
        yield "retain", denoised(model, batch)
