"""The embedded pixel model's judge: a small CNN that recognises the class of a drawing, and whose features FID uses."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erase.mini.pixel import drawings
from erase.tensor_files import read_metadata, read_tensors

NONE = "none"  # an image that does not show exactly one shape
LABELS = (*drawings.CLASSES, NONE)
NUM_FEATURES = 64
SCALE = 6.0  # root mean square of the features of drawings, which FID and KID see divided by it


class Judge(nn.Module):
    """Features [n, 64] and logits [n, 11] of images [n, 3, 16, 16] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

        self.trunk = nn.Sequential(*stage(3, 32), *stage(32, 64), *stage(64, 96), nn.Flatten())
        self.features = nn.Sequential(nn.Linear(96 * 4, NUM_FEATURES), nn.ReLU())
        self.head = nn.Linear(NUM_FEATURES, len(LABELS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.trunk(images))
        return features, self.head(features)


def load(path: str | Path) -> Judge:
    """The trained judge. Its accuracy on held-out drawings is in the file's header (`accuracy`)."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in read_tensors(path).items()})
    return judge.eval()


def accuracy(path: str | Path) -> dict[str, float]:
    """Share of held-out drawings that it recognises ("class"), and under "num_drawings" their number."""
    return read_metadata(path)["accuracy"]


@torch.no_grad()
def look(judge: Judge, images: Tensor, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Features [n, 64] and probabilities [n, 11] of images [n, 3, 16, 16] in [-1, 1]."""
    seen = [judge(part) for part in images.split(batch_size)]
    return torch.cat([features for features, _ in seen]) / SCALE, torch.cat([logits.softmax(1) for _, logits in seen])


def names(probabilities: Tensor) -> list[str]:
    """The most probable class of each image."""
    best: Iterable[int] = probabilities.argmax(1).tolist()
    return [LABELS[index] for index in best]


def examples(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Drawings with their labels as training data. One in ten shows no single shape; 30 % are blurred or noisy.

    images: uint8, [n, 16, 16, 3]. labels: int64, [n], places in CLASSES.
    """
    images, labels, num = images.copy(), labels.copy(), len(images)
    for index in np.flatnonzero(rng.random(num) < 0.1):
        images[index] = _nothing(images[index], images[rng.integers(num)], rng)
        labels[index] = LABELS.index(NONE)
    batch, kind = drawings.to_tensor(images), torch.from_numpy(rng.random(num))[:, None, None, None]
    blurred = torch.nn.functional.avg_pool2d(batch, 3, 1, 1, count_include_pad=False)
    noise = torch.from_numpy(rng.normal(0, 0.12, batch.shape).astype(np.float32))
    batch = torch.where(kind < 0.15, (batch + blurred) / 2, torch.where(kind < 0.3, batch + noise, batch))
    return batch.clamp(-1, 1), torch.from_numpy(labels)


def _nothing(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image without a single shape: plain background, noise, a mix of two drawings, or shuffled tiles of one."""
    kind = rng.integers(4)
    if kind == 0:
        return np.broadcast_to(image[:1, :1], image.shape).copy()
    if kind == 1:
        return rng.integers(0, 256, image.shape, dtype=np.uint8)
    if kind == 2:
        return (image // 2 + other // 2).astype(np.uint8)
    tiles = image.reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 4, 4, 3)
    return tiles[rng.permutation(16)].reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 3)
