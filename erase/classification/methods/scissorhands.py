"""Scissorhands: reset the weights most connected to the forget set, then repair (Wu & Harandi, ECCV 2024)."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from erase.classification.data import Images
from erase.classification.methods.gradients import cross_entropy
from erase.classification.methods.protocol import Descends, Plan, Progress, Task, Values, require_bounds
from erase.classification.methods.stages import last_stages, normalisation

MARGIN, DAMPING = 0.5, 1e-3  # of the projection, as in the authors' code (from gradient episodic memory)


@dataclass(frozen=True)
class Scissorhands(Descends):
    """New random values for the weights with the largest |g w|, then min CE(f(x_r), y_r) - lam CE(f(x_f), y_f).

    g is the gradient of CE on one batch of D_f. Only the last stages of the network are reset (see `last_stages`), and
    no normalisation layer is. Each batch of D_r is trained with one of D_f until D_f is used up; the rest of the epoch
    trains on D_r alone. m is the gradient of -CE on one batch of D_f when the epoch begins. If a step's gradient d has
    <d, m> < 0 in the last stages, it becomes d + v m there, with v = max(1/2, -<d, m> / (|m|^2 + 0.001)).
    The defaults are the authors' for a tenth of CIFAR-10.
    """

    share: Annotated[float, "share of the weights whose |g w| counts as large, in [0, 1]; 0 resets none"] = 0.03
    lam: Annotated[float, "weight of the loss on D_f; a larger one forgets more and damages more"] = 0.05
    project: Annotated[bool, "whether gradients that oppose forgetting are changed"] = True

    def __post_init__(self) -> None:
        require_bounds(self, share=(0, 1), lam=(0, 1e30))

    def plan(self, task: Task) -> Plan:
        epoch, last = _Epoch(), last_stages(task.model)

        def passes() -> list[Images]:
            epoch.memory = memory(task, last) if self.project else {}
            epoch.forget = task.loader(task.forget)
            return [task.retain]

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            fit, batch = F.cross_entropy(task.model(x), y), next(epoch.forget, None)
            epoch.is_paired = batch is not None
            return fit if batch is None else fit - self.lam * cross_entropy(task.model, batch)

        def bend(at: Progress) -> None:
            if epoch.is_paired:
                project(task.parameters(), epoch.memory)

        start = (lambda: self._reset(task, last)) if self.share else None
        return Plan(passes=passes, loss=loss, start=start, bend=bend)

    def _reset(self, task: Task, last: set[str]) -> Values:
        named = {name: w for name, w in task.parameters().items() if w.requires_grad}
        loss = cross_entropy(task.model, next(task.loader(task.forget)))
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        scores = {
            name: torch.zeros_like(w) if g is None else (g * w).abs().detach()
            for (name, w), g in zip(named.items(), found, strict=True)
        }
        least = threshold(torch.cat([score.reshape(-1) for score in scores.values()]), self.share)
        return {
            name: torch.where(score > least, fresh(named[name].detach(), task.generator), named[name].detach())
            for name, score in scores.items()
            if name in last - normalisation(task.model)
        }


@dataclass
class _Epoch:
    """State of an epoch: the batches of D_f that are left, and m by parameter name."""

    forget: Iterator[Images] = field(default_factory=lambda: iter(()))
    memory: Values = field(default_factory=dict)
    is_paired: bool = False


def threshold(scores: Tensor, share: float) -> Tensor:
    """The score above which weights are reset: the k-th smallest, k = (1 - share) n.

    Half the range of the scores if that is the smallest or the largest score, as in the authors' code.
    """
    k = int((1 - share) * len(scores))
    if k == 0:
        return scores.new_tensor(-1.0)  # all
    found = scores.kthvalue(k).values
    if found >= scores.max() - 1e-12 or found <= scores.min() + 1e-12:
        return (scores.max() - scores.min()) / 2
    return found


def memory(task: Task, last: set[str]) -> Values:
    """m: the gradient of -CE on one batch of D_f in eval mode, for the weights of the last stages."""
    model = copy.deepcopy(task.model).eval().requires_grad_()
    named = {name: w for name, w in model.named_parameters() if name in last}
    loss = -cross_entropy(model, next(task.loader(task.forget)))
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def project(named: Mapping[str, Parameter], m: Values) -> None:
    """Change the gradients d of the weights in m, see `Scissorhands`. The solution of gradient episodic memory's
    quadratic program (Lopez-Paz & Ranzato, NeurIPS 2017) for one memory."""
    pairs = [(named[name].grad, against) for name, against in m.items()]
    pairs = [(d, against) for d, against in pairs if d is not None]
    if not pairs:
        return
    product = torch.stack([(d * against).sum() for d, against in pairs]).sum()
    if product.device.type == "cpu" and product >= 0:  # a GPU would have to be waited for
        return
    square = torch.stack([against.square().sum() for _, against in pairs]).sum()
    v = torch.where(product < 0, (-product / (square + DAMPING)).clamp(min=MARGIN), 0)
    for d, against in pairs:
        d.add_(v * against)


def fresh(old: Tensor, generator: torch.Generator) -> Tensor:
    """New values: uniform within 1 / sqrt(inputs) for matrices and kernels, 0 for biases."""
    if old.dim() < 2:
        return torch.zeros_like(old)
    bound = old[0].numel() ** -0.5
    return torch.empty(old.shape).uniform_(-bound, bound, generator=generator).to(old)
