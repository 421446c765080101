"""The contract of a method: what it receives (`Task`) and what it returns (`Plan`, or new values of the weights)."""
# pyright: strict

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from erase.classification.data import Images, loader
from erase.errors import EraseError


@dataclass(frozen=True, eq=False)
class Task:
    """What every method receives.

    model: in eval mode; returns logits for images in [0, 1].
    generator: the only source of randomness of a method.
    batch_size, padding, flip: of the training; see `Task.loader`.
    """

    model: nn.Module
    forget: Images
    retain: Images
    num_classes: int
    generator: torch.Generator
    batch_size: int = 256
    padding: int = 0
    flip: bool = False

    def parameters(self) -> dict[str, Parameter]:
        return dict(self.model.named_parameters())

    def loader(self, images: Images, size: int | None = None, *, shuffle: bool = True) -> Iterator[Images]:
        """Batches as the training sees them: augmented, and shuffled unless `shuffle` is False.

        size: images per batch; None: `batch_size`.
        """
        size = size or self.batch_size
        return loader(images, size, self.generator, padding=self.padding, flip=self.flip, shuffle=shuffle)


@dataclass(frozen=True)
class Progress:
    """Position in the training, counted from 0: the epoch, the step, and which of the epoch's image sets is trained on.

    epochs, steps: their numbers in the whole training.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    part: int = 0


Values = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Progress], Tensor]


@dataclass(frozen=True)
class ForgetOptimizer:
    """An Adam of its own for the steps on D_f. weight_decay: decoupled, in units of the learning rate."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, eq=False)
class Plan:
    """The training of a method that descends. Only `passes` is required.

    passes: returns the image sets of one epoch, trained on in this order, each shuffled separately; called when the
        epoch begins.
    loss: loss of a batch of images and labels. None: the cross-entropy of the model's logits.
    start: returns new values of weights, written before the first step; the model is in train mode then.
    extra: parameters outside the model; trained without a mask and discarded at the end.
    bend: changes the gradients between the backward pass and the step.
    settle: returns new values of weights, written after each step.
    rate: returns a factor for the learning rate of a step.
    forgets: whether a step trains on D_f. forget_optimizer: takes these steps instead of the run's optimizer.
    """

    passes: Callable[[], list[Images]]
    loss: Loss | None = None
    start: Callable[[], Values] | None = None
    extra: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    bend: Callable[[Progress], None] | None = None
    settle: Callable[[Progress], Values] | None = None
    rate: Callable[[Progress], float] | None = None
    forgets: Callable[[Progress], bool] | None = None
    forget_optimizer: ForgetOptimizer | None = None


class Method(ABC):  # noqa: B024  Descends and Solves have the abstract methods
    """Defaults of a method of another package. Those of our methods stand in presets.toml.

    epochs, learning_rate: of unlearning; 0 for a method that computes its weights in one step.
    mask: the weights that may change, as `--mask` names them.
    optimizer: "sgd" or "adam".
    """

    epochs: ClassVar[int] = 0
    learning_rate: ClassVar[float] = 0.0
    mask: ClassVar[str] = "none"
    optimizer: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:  # noqa: B027  a subclass checks its options here
        pass


class Descends(Method):
    """A method that trains by gradient descent. The loop in descent.py carries out its plan, inside the mask only."""

    epochs: ClassVar[int] = 10
    learning_rate: ClassVar[float] = 0.01

    @abstractmethod
    def plan(self, task: Task) -> Plan: ...


class Solves(Method):
    """A method that computes new weights without training. Only values inside the mask are written."""

    @abstractmethod
    def solve(self, task: Task) -> Values: ...


def require_bounds(method: Method, **bounds: tuple[float, float]) -> None:
    """Raise an EraseError for an option of a method outside its bounds, which are included."""
    for name, (low, high) in bounds.items():
        value = getattr(method, name)
        if not low <= value <= high:
            raise EraseError(f"{name} is {value}; it must lie in [{low:g}, {high:g}]")
