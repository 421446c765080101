"""Labelled images in memory, and a data set made of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from erase import device
from erase.errors import EraseError


@dataclass(frozen=True, eq=False)
class Images:
    """x: uint8, [n, c, h, w]. y: labels, int64, [n], from 0."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, positions: Tensor | slice) -> "Images":
        return Images(self.x[positions], self.y[positions])

    def to(self, device: str | torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device))

    def batches(self, size: int) -> Iterator["Images"]:
        """Batches in order; the last one may be smaller."""
        return (Images(x, y) for x, y in zip(self.x.split(size), self.y.split(size), strict=True))

    @property
    def pixels(self) -> Tensor:
        """The images as a model receives them: float32 in [0, 1], in channels-last order where that is faster."""
        pixels, where = self.x.float() / 255, self.x.device
        is_faster = where.type == "cpu" or where.type == "cuda" and device.has_bf16(where)
        return pixels.contiguous(memory_format=torch.channels_last) if is_faster else pixels

    def with_labels(self, y: Tensor) -> "Images":
        return Images(self.x, y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images, and how a network is trained on them.

    mean, std: of each channel, on pixels in [0, 1]; the network applies this normalisation itself.
    padding: pixels of zeros added on every side before a random crop to the original size; 0 for none.
    flip: whether half of the training images, chosen at random, are mirrored.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise EraseError(f"{self.name} has {len(self.classes)} class ({', '.join(self.classes)}); it needs two")
        for part, images in (("training", self.train), ("test", self.test)):
            require_labels(images, len(self.classes), f"the {part} images of {self.name}")
        for index, name in enumerate(self.classes):
            if not (self.train.y == index).any():
                raise EraseError(f"class {index} ({name}) of {self.name} has no training image")

    def first(self, num: int) -> "Dataset":
        """The same data set with the first `num` training images, the same number of each class.

        Raises:
            EraseError: `num` is no multiple of the number of classes, or a class has too few images.
        """
        each, rest = divmod(num, len(self.classes))
        counts = torch.bincount(self.train.y, minlength=len(self.classes))
        if rest or not each or each > counts.min():
            most = int(counts.min()) * len(self.classes)
            raise EraseError(
                f"--num-train is {num}; it must be a multiple of the {len(self.classes)} classes and at most {most}"
            )
        chosen = [(self.train.y == y).nonzero().view(-1)[:each] for y in range(len(self.classes))]
        return replace(self, train=self.train[torch.cat(chosen).sort().values])

    @property
    def channels(self) -> int:
        return self.train.x.shape[1]

    @property
    def size(self) -> int:
        return self.train.x.shape[2]


def require_labels(images: Images, num_classes: int, what: str) -> None:
    """Raise an EraseError unless there are images and every label is one of the classes.

    what: the images in words, for the message, such as "the images to forget".
    """
    if not len(images):
        raise EraseError(f"{what} are missing: there are 0 images")
    low, high = int(images.y.min()), int(images.y.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise EraseError(f"{what} have a label {wrong}; with {num_classes} classes it must be 0 to {num_classes - 1}")
