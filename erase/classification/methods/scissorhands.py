"""Scissorhands: reset the weights most connected to the forget set, then repair (Wu & Harandi, ECCV 2024)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import Parameter

from erase import masks
from erase.classification.methods.gradients import by_name, cross_entropy, gradient_sum
from erase.classification.methods.protocol import Descends, Plan, Task, Values, require_bounds


@dataclass(frozen=True)
class Scissorhands(Descends):
    """New random values for the weights with the largest |sum g w| over D_f, then min CE(f(x), y) over D_r.

    g is the gradient of CE over D_f. Where a step on D_r would lower the loss over D_f, that direction is removed:
    g_r <- g_r - g_f <g_r, g_f> / |g_f|^2 where <g_r, g_f> > 0.
    """

    share: Annotated[float, "share of the weights that are reset, in [0, 1]"] = 0.01
    batch_size: Annotated[int, "number of images of D_f that g_f of each step is computed from"] = 64

    def __post_init__(self) -> None:
        require_bounds(self, share=(0, 1), batch_size=(1, 1_000_000))

    def plan(self, task: Task) -> Plan:
        named = task.parameters()
        return Plan(
            passes=lambda: [task.retain], start=self._reset(task, named), bend=lambda: self._project(task, named)
        )

    def _reset(self, task: Task, named: Mapping[str, Parameter]) -> Values:
        gradients = by_name(gradient_sum(task.model, task.forget), named)
        scores = {name: (gradients[name] * w.detach()).abs() for name, w in named.items()}
        chosen = masks.select(scores, self.share) if self.share else {}
        start: Values = {}
        for name, places in chosen.items():
            old = named[name].detach()
            start[name] = torch.where(places, fresh(old, task.generator), old)
        return start

    def _project(self, task: Task, named: Mapping[str, Parameter]) -> None:
        drawn = torch.randint(0, len(task.forget), (self.batch_size,), generator=task.generator)
        batch = task.forget[drawn.to(task.forget.y.device)]
        weights = [w for w in named.values() if w.grad is not None]
        against = torch.autograd.grad(cross_entropy(task.model, batch), weights, allow_unused=True)
        pairs = [(w.grad, g) for w, g in zip(weights, against, strict=True) if g is not None and w.grad is not None]
        product = torch.stack([(r * f).sum() for r, f in pairs]).sum()
        square = torch.stack([f.square().sum() for _, f in pairs]).sum()
        factor = (product / square.clamp(min=1e-12)).clamp(min=0)
        for r, f in pairs:
            r.sub_(factor * f)


def fresh(old: Tensor, generator: torch.Generator) -> Tensor:
    """Values as at initialisation: Kaiming's uniform distribution for matrices and kernels, zero for vectors."""
    if old.dim() < 2:
        return torch.zeros_like(old)
    bound = (6 / old[0].numel()) ** 0.5
    return torch.empty(old.shape).uniform_(-bound, bound, generator=generator).to(old)
