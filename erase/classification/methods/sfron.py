"""SFRon: weighted ascent on the weights that matter for the forget set only (Huang et al., NeurIPS 2024)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.classification.data import Images
from erase.classification.methods.gradients import by_name, gradients
from erase.classification.methods.protocol import Descends, Plan, Progress, Task, Values, require_bounds

MOST_NORM = 7.0  # of a gradient on D_f, as in the authors' code
SMALLEST = 1e-15


@dataclass(frozen=True)
class SFRon(Descends):
    """Steps on D_r that descend on CE, with a step on D_f before every `period`-th of them, all of one optimizer.

    A step on D_f ascends on alpha_t sum_i c_i CE_i / sum_i c_i with c_i = CE_i^-lam, constant in the gradient. Its
    gradient is multiplied by M and scaled to a norm of at most 7. M = 1 where F_f >= threshold F_r; F is the mean over
    batches of the squared gradient of the batch's mean CE, at theta_o in eval mode. Learning rate and alpha_t fall
    from step to step on D_r as a cosine to 0. The authors' code for CIFAR-10 gives the slow weights of the paper's
    slow-fast update no weight, so there are none here. The defaults are those of that code. It takes 1,500 steps, which
    are about ten epochs with batches of 256.
    """

    alpha: Annotated[float, "weight of the ascent in the first step; a larger one forgets more and damages more"] = 25.0
    lam: Annotated[float, "how much more an image counts that is known well; 0: all count the same"] = 0.5
    period: Annotated[int, "number of steps on D_r for each step on D_f"] = 5
    threshold: Annotated[float, "least ratio of F on D_f and D_r; a larger one ascends on fewer weights"] = 1.0

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), lam=(0, 10), period=(1, 1_000_000), threshold=(0, 1e30))

    def plan(self, task: Task) -> Plan:
        mask = salient(task, self.threshold)
        state, num = _Epoch(_batches(task, task.forget)), math.ceil(len(task.retain) / task.batch_size)

        def passes() -> list[Images]:
            """Every batch is an image set of its own, so that the two kinds can alternate."""
            parts: list[Images] = []
            state.steps = []
            order = torch.randperm(len(task.retain), generator=task.generator).to(task.retain.y.device)
            for positions in order.split(task.batch_size):
                if state.retained % self.period == 0:
                    parts.append(next(state.forget))
                    state.steps.append((True, state.retained))
                parts.append(task.retain[positions])
                state.steps.append((False, state.retained))
                state.retained += 1
            return parts

        def rate(at: Progress) -> float:
            return (1 + math.cos(math.pi * state.steps[at.part][1] / (at.epochs * num))) / 2

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            if not forgets(at):
                return F.cross_entropy(task.model(x), y)
            return -self.alpha * rate(at) * weighted(F.cross_entropy(task.model(x), y, reduction="none"), self.lam)

        def bend(at: Progress) -> None:
            if forgets(at):
                found = [(p, mask[name]) for name, p in task.parameters().items() if p.grad is not None]
                for p, inside in found:
                    assert p.grad is not None
                    p.grad.mul_(inside)
                torch.nn.utils.clip_grad_norm_([p for p, _ in found], MOST_NORM)

        def forgets(at: Progress) -> bool:
            return state.steps[at.part][0]

        return Plan(passes=passes, loss=loss, bend=bend, rate=rate, forgets=forgets)


@dataclass
class _Epoch:
    """retained: number of steps on D_r that are planned. steps: of the epoch, whether one is on D_f, and its time."""

    forget: Iterator[Images]
    retained: int = 0
    steps: list[tuple[bool, int]] = field(default_factory=list[tuple[bool, int]])


def _batches(task: Task, images: Images) -> Iterator[Images]:
    """Batches without end, in a new order after all images were used."""
    while True:
        order = torch.randperm(len(images), generator=task.generator).to(images.y.device)
        for positions in order.split(task.batch_size):
            yield images[positions]


def weighted(losses: Tensor, lam: float) -> Tensor:
    """sum_i c_i l_i / sum_i c_i with c_i = l_i^-lam, which has no gradient; losses: [n]."""
    c = 1 / (losses.detach() ** lam + SMALLEST)
    return (c * losses).sum() / c.sum()


def salient(task: Task, threshold: float) -> Values:
    """M of each parameter, bool."""
    forget, retain = (fisher(task, images) for images in (task.forget, task.retain))
    return by_name((forget + SMALLEST) / (retain + SMALLEST) >= threshold, task.parameters())


def fisher(task: Task, images: Images) -> Tensor:
    """Mean over batches of the squared gradient, flat, [weights]."""
    total, num = torch.zeros(()), 0
    for g in gradients(task.model, task.loader(images)):
        total, num = total.to(g) + g.square(), num + 1
    return total / num
