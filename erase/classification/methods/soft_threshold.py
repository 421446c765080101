"""SalUn-soft: random labels with a soft threshold on the change instead of a mask (Fan et al., ICLR 2024, appendix)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from erase.classification.data import Images
from erase.classification.methods.protocol import Descends, Plan, Progress, Task, Values, require_bounds
from erase.classification.methods.random_label import joined, relabelled


@dataclass(frozen=True)
class SoftThreshold(Descends):
    """RandomLabelJoint whose change of the weights is shrunk after each step.

    theta <- theta_e + sign(D) max(|D| - tau, 0) with D = theta - theta_e, where theta_e are the weights at the start of
    the epoch and tau is the z-th smallest |D|, so that z weights end the step as they began the epoch. As in SalUn's
    code, z = ratio (T - (e S + 1)) / T n is constant within epoch e. S is the number of batches of D_f and of D_r,
    T = S times the number of epochs.
    """

    ratio: Annotated[float, "share of the weights that do not change in the first epoch, in [0, 1]"] = 0.5
    may_be_true: Annotated[bool, "whether y' may equal y, as in SalUn's code"] = False

    def __post_init__(self) -> None:
        require_bounds(self, ratio=(0, 1))

    def plan(self, task: Task) -> Plan:
        total = sum(parameter.numel() for parameter in task.parameters().values())
        per_epoch = sum(math.ceil(len(images) / task.batch_size) for images in (task.forget, task.retain))
        began: Values = {}

        def passes() -> list[Images]:
            began.update({name: parameter.detach().clone() for name, parameter in task.parameters().items()})
            return [joined(relabelled(task, self.may_be_true), task.retain)]

        def settle(at: Progress) -> Values:
            steps = at.epochs * per_epoch
            z = int(self.ratio * ((steps - (at.epoch * per_epoch + 1)) / steps * total))
            change = {name: parameter.detach() - began[name] for name, parameter in task.parameters().items()}
            return {name: began[name] + shrunk for name, shrunk in soft_threshold(change, z).items()}

        return Plan(passes=passes, settle=settle)


def soft_threshold(change: Mapping[str, Tensor], z: int) -> Values:
    """sign(D) max(|D| - tau, 0), where tau is the z-th smallest |D| over all tensors; D itself for z = 0."""
    if z == 0:
        return dict(change)
    tau = torch.cat([tensor.abs().reshape(-1) for tensor in change.values()]).kthvalue(z).values
    return {name: tensor.sign() * (tensor.abs() - tau).clamp(min=0) for name, tensor in change.items()}
