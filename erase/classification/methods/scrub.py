"""SCRUB: far from the original model on the forget set, close on the retain set (Kurmanji et al., NeurIPS 2023)."""

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.classification.data import Images
from erase.classification.methods.protocol import Descends, Plan, Progress, Task, require_bounds


@dataclass(frozen=True)
class Scrub(Descends):
    """max d(x) over D_f, then min alpha d(x) + gamma CE(f(x), y) over D_r, in every epoch.

    d(x) = T^2 KL(softmax(f_o(x) / T) || softmax(f(x) / T)), where f_o is the original model in eval mode. The defaults
    are those of DualOptim's code for CIFAR-10. The paper's own are alpha 0.001, gamma 0.99, T 4 and ascent in the first
    two or three epochs.
    """

    alpha: Annotated[float, "weight of the distance to the original model on D_r; a larger one changes less"] = 0.5
    gamma: Annotated[float, "weight of the cross-entropy on D_r"] = 1.0
    temperature: Annotated[float, "T; a larger one gives small probabilities more weight"] = 1.0
    ascent_epochs: Annotated[int, "number of first epochs with a pass over D_f; 0: all"] = 0

    def __post_init__(self) -> None:
        require_bounds(self, alpha=(0, 1e30), gamma=(0, 1e30), temperature=(1e-3, 1e3), ascent_epochs=(0, 100_000))

    def plan(self, task: Task) -> Plan:
        original, begun = copy.deepcopy(task.model).eval().requires_grad_(False), 0

        def ascends(epoch: int) -> bool:
            return not self.ascent_epochs or epoch < self.ascent_epochs

        def passes() -> list[Images]:
            nonlocal begun
            begun += 1
            return [task.forget, task.retain] if ascends(begun - 1) else [task.retain]

        def forgets(at: Progress) -> bool:
            return at.part == 0 and ascends(at.epoch)

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            logits = task.model(x)
            with torch.no_grad():
                wanted = original(x)
            far = distance(logits, wanted, self.temperature)
            return -far if forgets(at) else self.alpha * far + self.gamma * F.cross_entropy(logits, y)

        return Plan(passes=passes, loss=loss, forgets=forgets)


def distance(logits: Tensor, original: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(original / T) || softmax(logits / T)), the mean over the batch."""
    found, wanted = (F.log_softmax(each / temperature, 1) for each in (logits, original))
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
