"""Boundary shrinking and boundary expanding (Chen et al., CVPR 2023)."""

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from erase.classification.methods.protocol import Descends, Plan, Progress, Task, require_bounds
from erase.errors import EraseError


@dataclass(frozen=True)
class BoundaryShrink(Descends):
    """min CE(f(x), y') over D_f, where y' is the nearest other class of theta_o; see `adversarial_labels`.

    y' is computed for each batch from the augmented images, as in SalUn's code.
    """

    bound: Annotated[float, "how far an image is moved to find y', in units of pixels in [0, 1]"] = 0.1
    may_be_true: Annotated[bool, "whether y' may equal y, as in the authors' code"] = False

    def __post_init__(self) -> None:
        require_bounds(self, bound=(0, 1))

    def plan(self, task: Task) -> Plan:
        frozen = copy.deepcopy(task.model).eval().requires_grad_(False)

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            nearest = adversarial_labels(frozen, x, y, self.bound, may_be_true=self.may_be_true)
            return F.cross_entropy(task.model(x), nearest)

        return Plan(passes=lambda: [task.forget], loss=loss)


@dataclass(frozen=True)
class BoundaryExpand(Descends):
    """min CE([f(x), g(x)], C) over D_f, where g is the logit of a new class C besides the C old ones.

    g is a linear layer on the input of the model's last linear layer, initialised as a new one of PyTorch. It is
    discarded at the end, as in the paper, so the unlearned model has its original classes; SalUn's code keeps it.
    """

    def plan(self, task: Task) -> Plan:
        layers = [module for module in task.model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise EraseError("boundary expanding extends the model's last linear layer, but this model has none")
        head = layers[-1]
        width = head.in_features
        reach = width**-0.5
        new = torch.empty(1, width + 1).uniform_(-reach, reach, generator=task.generator).to(head.weight)
        weight = Parameter(new[:, :-1].clone())
        bias = None if head.bias is None else Parameter(new[:, -1].clone())
        extra = {"weight": weight} | ({} if bias is None else {"bias": bias})

        def loss(x: Tensor, y: Tensor, at: Progress) -> Tensor:
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                logits = task.model(x)
            finally:
                hook.remove()
            logits = torch.cat([logits, F.linear(seen[0].to(weight), weight, bias)], dim=1)
            return F.cross_entropy(logits, torch.full_like(y, task.num_classes))

        return Plan(passes=lambda: [task.forget], loss=loss, extra=extra)


def adversarial_labels(model: nn.Module, x: Tensor, y: Tensor, bound: float, *, may_be_true: bool = False) -> Tensor:
    """The class across the nearest decision boundary: argmax f(x + bound sign grad_x CE(f(x), y)), [n].

    The moved image is clipped to [0, 1] and rounded to multiples of 1/255.
    x: images in [0, 1]. y: their labels.
    may_be_true: the argmax includes the image's own class.
    """
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    moved = ((x.detach() + bound * slope.sign()).clamp(0, 1) * 255).round() / 255
    with torch.no_grad():
        logits = model(moved)
    if not may_be_true:
        logits = logits.scatter(1, y[:, None], -torch.inf)
    return logits.argmax(1)
