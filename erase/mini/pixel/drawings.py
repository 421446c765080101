"""The data of the embedded pixel model: 16x16 drawings of ten shapes of the world, with their class labels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from erase.mini import world

SIZE = 16
CLASSES = world.SHAPES[:10]
_FACTOR = world.SIZE // SIZE


def draw(name: str, rng: np.random.Generator) -> np.ndarray:
    """A drawing of this class in a random colour, style and background, uint8, [16, 16, 3]."""
    colour, style = str(rng.choice(list(world.COLOURS))), str(rng.choice(world.STYLES))
    image = world.draw(world.Scene(name, colour, style, str(rng.choice(list(world.BACKGROUNDS)))), rng)
    return image.reshape(SIZE, _FACTOR, SIZE, _FACTOR, 3).mean((1, 3)).round().astype(np.uint8)


def sample(num: int, rng: np.random.Generator, classes: Sequence[str] = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """Drawings of random classes, uint8, [num, 16, 16, 3], and their labels, int64, [num], places in CLASSES."""
    names = [str(rng.choice(classes)) for _ in range(num)]
    labels = np.array([CLASSES.index(name) for name in names], dtype=np.int64)
    return np.stack([draw(name, rng) for name in names]), labels


def to_tensor(images: np.ndarray) -> Tensor:
    """A tensor [n, 3, 16, 16] in [-1, 1] of uint8 images [n, 16, 16, 3]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
