"""What the fidelity tests of classifiers share: a small network in float64, images, and what a method was given."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from erase.classification.data import Images
from erase.classification.methods import Task
from erase.classification.methods.stages import normalisation


class Toy(nn.Module):
    """A small network in float64 whose stages have the names of the authors' ResNet; it notes what it is given."""

    seen: ClassVar[list[tuple[bool, Tensor]]] = []  # (train mode, images), of copies too

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(1, 2, 3, padding=1)
        self.layer2 = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3))
        self.layer3 = nn.Sequential(nn.Linear(48, 6), nn.BatchNorm1d(6))
        self.layer4 = nn.Linear(6, 5)
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, x.detach().clone()))
        h = self.layer2(self.layer1(x.to(self.fc.weight.dtype)).tanh()).tanh().flatten(1)
        return self.fc(self.layer4(self.layer3(h).tanh()).tanh())


def toy(num_classes: int) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Toy(num_classes).double().eval()
        for name, p in model.named_parameters():  # no weight is 0 or 1, so that nothing is right by accident
            nn.init.uniform_(p, 0.5, 1.5) if name in normalisation(model) else nn.init.normal_(p, std=0.5)
    return model


def images(n: int, num_classes: int, seed: int) -> Images:
    x = torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Images(x, torch.arange(n) % num_classes)


def task_of(num_classes: int, *, num_forget: int = 6, num_retain: int = 14, size: int = 4) -> Task:
    """Last batches are short. Two classes leave one wrong label, so random labels are known."""
    parts = images(num_forget, num_classes, 0), images(num_retain, num_classes, 1)
    return Task(toy(num_classes), *parts, num_classes, torch.Generator().manual_seed(5), size)


def key(x: Tensor) -> bytes:
    return (x * 255).round().byte().contiguous().numpy().tobytes()


def known(task: Task) -> dict[bytes, tuple[int, bool]]:
    """Label of each image, and whether it is to be forgotten."""
    parts = ((task.forget, True), (task.retain, False))
    return {key(x): (int(y), gone) for part, gone in parts for x, y in zip(part.x / 255, part.y, strict=True)}


def looked_up(task: Task, x: Tensor) -> tuple[Tensor, Tensor]:
    labels, gone = zip(*(known(task)[key(one)] for one in x), strict=True)
    return torch.tensor(labels), torch.tensor(gone)


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().view(-1) for p in model.parameters()]).numpy().copy()
