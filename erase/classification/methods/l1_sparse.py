"""Fine-tuning with a sparsity penalty (Jia et al., NeurIPS 2023)."""

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from erase.classification.methods.protocol import Descends, Plan, Progress, Task, require_bounds


@dataclass(frozen=True)
class L1Sparse(Descends):
    """min CE(f(x), y) + alpha_t |theta|_1 over D_r: a sparser network forgets more easily."""

    alpha: Annotated[float, "weight of the penalty in the first epoch; it then falls linearly per epoch"] = 5e-4
    free_epochs: Annotated[int, "number of last epochs without penalty"] = 0

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), free_epochs=(0, 100_000))

    def plan(self, task: Task) -> Plan:
        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            alpha = l1_weight(self.alpha, at.epoch, at.epochs, self.free_epochs)
            fit = F.cross_entropy(task.model(x), y)
            return fit + alpha * sum(w.abs().sum() for w in task.model.parameters()) if alpha else fit

        return Plan(passes=lambda: [task.retain], loss=loss)


def l1_weight(alpha: float, epoch: int, epochs: int, free_epochs: int) -> float:
    """alpha (1 - e / (E - E_0)), and 0 from epoch E - E_0 on."""
    falling = epochs - free_epochs
    return alpha * (1 - epoch / falling) if epoch < falling else 0.0
