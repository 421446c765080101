"""Influence unlearning (Izzo et al., 2021) with WoodFisher's inverse Hessian (Singh & Alistarh, 2020); IU in SalUn."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from torch import Tensor

from erase.classification.methods.gradients import by_name, gradient_sum, gradients
from erase.classification.methods.protocol import Solves, Task, Values, require_bounds


@dataclass(frozen=True)
class Influence(Solves):
    """theta <- theta + alpha H^-1 v, with H^-1 v by WoodFisher.

    v = sum_f g / (f + r) - f / (f + r) sum_r g / r over the f images of D_f and the r images of D_r. As in SalUn's
    code, H is estimated from the first N + 2 images of D_r, where N is num_samples.
    """

    alpha: Annotated[float, "step length; a larger one forgets more and damages more; papers search 1 to 20"] = 1.0
    num_samples: Annotated[int, "N of H = 1 + sum g g^T / N"] = 1000
    shuffle: Annotated[bool, "estimate H from random images of D_r instead of the first ones"] = False

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), num_samples=(1, 1_000_000_000))

    def solve(self, task: Task) -> Values:
        named = task.parameters()
        parts = (task.forget, task.retain)
        forget, retain = (gradient_sum(task.model, task.loader(part, shuffle=False)) for part in parts)
        v = influence_vector(forget, retain, len(task.forget), len(task.retain))
        samples = islice(task.loader(task.retain, 1, shuffle=self.shuffle), self.num_samples + 2)
        k = woodfisher(gradients(task.model, samples), v, self.num_samples)
        return {name: named[name].detach() + self.alpha * step for name, step in by_name(k, named).items()}


def influence_vector(forget_sum: Tensor, retain_sum: Tensor, num_forget: int, num_retain: int) -> Tensor:
    """v = f_sum / (f + r) - r_sum f / ((f + r) r)."""
    total = num_forget + num_retain
    return forget_sum / total - retain_sum * (num_forget / (total * num_retain))


def woodfisher(gradients: Iterator[Tensor], v: Tensor, num: int) -> Tensor:
    """H^-1 v for H = 1 + sum g g^T / num, as in SalUn's code: one running vector o replaces H^-1 g.

    k, o = v, g_1; then for each further g: tau = o g; k -= (k g) / (num + tau) o; o -= tau / (num + tau) o.
    """
    k, o = v.clone(), None
    for g in gradients:
        if o is None:
            o = g.clone()
            continue
        tau = o @ g
        k -= (k @ g) / (num + tau) * o
        o -= tau / (num + tau) * o
    return k
