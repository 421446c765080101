"""SalUn-soft: random labels with a soft threshold on the change instead of a mask (Fan et al., ICLR 2024, appendix)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from erase.classification.methods.protocol import Descends, Plan, Progress, Task, Values, require_bounds
from erase.classification.methods.random_label import joined, relabelled


@dataclass(frozen=True)
class SoftThreshold(Descends):
    """RandomLabelJoint whose change of the weights is shrunk after each step.

    theta <- theta_o + sign(D) max(|D| - tau, 0) with D = theta - theta_o, where tau is the z-th smallest |D| and
    z = ratio (1 - step / steps) n: this share of the weights returns to its original value.
    """

    ratio: Annotated[float, "share of the weights that the first steps return to their original values, in [0, 1]"] = (
        0.5
    )

    def __post_init__(self) -> None:
        require_bounds(self, ratio=(0, 1))

    def plan(self, task: Task) -> Plan:
        original = {name: parameter.detach().clone() for name, parameter in task.parameters().items()}
        total = sum(tensor.numel() for tensor in original.values())

        def settle(at: Progress) -> Values:
            z = int(self.ratio * (1 - (at.step + 1) / at.steps) * total)
            change = {name: parameter.detach() - original[name] for name, parameter in task.parameters().items()}
            return {name: original[name] + shrunk for name, shrunk in soft_threshold(change, z).items()}

        return Plan(passes=lambda: [joined(relabelled(task, False), task.retain)], settle=settle)


def soft_threshold(change: Mapping[str, Tensor], z: int) -> Values:
    """sign(D) max(|D| - tau, 0), where tau is the z-th smallest |D| over all tensors; D itself for z = 0."""
    if z == 0:
        return dict(change)
    tau = torch.cat([tensor.abs().reshape(-1) for tensor in change.values()]).kthvalue(z).values
    return {name: tensor.sign() * (tensor.abs() - tau).clamp(min=0) for name, tensor in change.items()}
