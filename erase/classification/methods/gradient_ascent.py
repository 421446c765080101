"""Gradient ascent on the forget set (Thudi et al., 2022)."""

from dataclasses import dataclass

import torch.nn.functional as F

from erase.classification.methods.protocol import Descends, Plan, Task


@dataclass(frozen=True)
class GradientAscent(Descends):
    """min -CE(f(x), y) over D_f. The loss has no lower bound, so the training can diverge."""

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [task.forget], loss=lambda x, y, at: -F.cross_entropy(task.model(x), y))
