"""Fisher forgetting: noise on weights that matter little for the retain set (Golatkar et al., CVPR 2020)."""

from dataclasses import dataclass
from typing import Annotated

import torch

from erase.classification.methods.gradients import by_name, single_gradients
from erase.classification.methods.protocol import Solves, Task, Values, require_bounds


@dataclass(frozen=True)
class FisherForgetting(Solves):
    """theta <- theta + N(0, 1) sqrt(alpha min(1 / F, cap)).

    F = E_x E_{y ~ f(x)} g^2 over D_r, estimated with one sample of y per image.
    """

    alpha: Annotated[float, "variance of the noise where F is 1; a larger one forgets more and damages more"] = 1e-7
    cap: Annotated[float, "largest accepted 1 / F; limits the noise on weights with no effect on D_r"] = 1e3
    num_samples: Annotated[int, "number of images of D_r that F is estimated from"] = 1000

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), cap=(0, 1e30), num_samples=(1, 1_000_000_000))

    def solve(self, task: Task) -> Values:
        order = torch.randperm(len(task.retain), generator=task.generator)[: self.num_samples]
        chosen = task.retain[order.to(task.retain.y.device)]
        with torch.no_grad():
            shares = torch.cat([task.model(batch.pixels) for batch in chosen.batches(256)]).softmax(1).cpu()
        labels = torch.multinomial(shares, 1, generator=task.generator)[:, 0].to(chosen.y.device)
        named = task.parameters()
        squares = torch.zeros(sum(w.numel() for w in named.values()), device=chosen.y.device)
        for g in single_gradients(task.model, chosen.with_labels(labels)):
            squares += g.square()
        variance = self.alpha * (1 / (squares / len(chosen) + 1e-8)).clamp(max=self.cap)
        noise = torch.randn(len(variance), generator=task.generator).to(variance) * variance.sqrt()
        return {name: named[name].detach() + step for name, step in by_name(noise, named).items()}
