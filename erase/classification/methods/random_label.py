"""Random labels for the forget set (Golatkar et al., 2020), as SalUn trains with them (Fan et al., ICLR 2024)."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from erase.classification.data import Images
from erase.classification.methods.protocol import Descends, Plan, Task


@dataclass(frozen=True)
class RandomLabel(Descends):
    """min CE(f(x), y') over D_f, then CE(f(x), y) over D_r, in every epoch with new y' (SalUn's code for CIFAR-10)."""

    may_be_true: Annotated[bool, "whether y' may equal y, as in SalUn's code"] = False

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [relabelled(task, self.may_be_true), task.retain], forgets=lambda at: at.part == 0)


@dataclass(frozen=True)
class RandomLabelJoint(Descends):
    """min CE(f(x), y') + CE(f(x), y) over D_f and D_r shuffled together (SalUn's code for CIFAR-100)."""

    may_be_true: Annotated[bool, "whether y' may equal y, as in SalUn's code"] = False

    def plan(self, task: Task) -> Plan:
        return Plan(passes=lambda: [joined(relabelled(task, self.may_be_true), task.retain)])


def random_labels(y: Tensor, num_classes: int, generator: torch.Generator, *, may_be_true: bool = False) -> Tensor:
    """One label per image, uniform over the other classes.

    may_be_true: uniform over all classes, the image's own included, as in SalUn's code.
    """
    if may_be_true:
        return torch.randint(0, num_classes, y.shape, generator=generator).to(y.device)
    return (y + torch.randint(1, num_classes, y.shape, generator=generator).to(y.device)) % num_classes


def relabelled(task: Task, may_be_true: bool) -> Images:
    """The forget set with new random labels."""
    labels = random_labels(task.forget.y, task.num_classes, task.generator, may_be_true=may_be_true)
    return task.forget.with_labels(labels)


def joined(one: Images, other: Images) -> Images:
    return Images(torch.cat([one.x, other.x]), torch.cat([one.y, other.y]))
