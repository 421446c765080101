"""Data sets that need no network: scikit-learn's digits, and drawings from the embedded model's world."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erase import tensor_files
from erase.classification.data.labelled import Dataset, Images
from erase.errors import EraseError, missing

NUM_DRAWINGS = (300, 100)  # per class, for training and for testing
_PARTS = ("train", "test")


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, in a fixed split: 1,000 for training and 797 for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing("scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels.astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    train, test = order[:1000], order[1000:]
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", Images(x[train], y[train]), Images(x[test], y[test]), names, (0.305,), (0.376,))


def drawings(cache_dir: str | Path, num: tuple[int, int] = NUM_DRAWINGS) -> Dataset:
    """Ten shapes of the embedded model's world at 32 x 32, in all colours, styles and places.

    They are drawn once and then read from the cache.
    num: drawings per class for training and for testing.

    Raises:
        EraseError: the file in the cache is damaged.
    """
    from erase.mini import world

    path = Path(cache_dir) / f"drawings-{num[0]}-{num[1]}.safetensors"
    if not path.is_file():
        tensor_files.write_tensors(path, {key: value for part in _draw(num) for key, value in part.items()})
    tensors = tensor_files.read_tensors(path)
    for part, each in zip(_PARTS, num, strict=True):
        x, y = (tensors.get(f"{part}.{kind}", torch.zeros(0)) for kind in "xy")
        known = x.dtype == torch.uint8 and x.shape == (10 * each, 3, 32, 32)
        if not known or not torch.equal(y, torch.arange(10).repeat(each)):
            raise EraseError(f"{path} is damaged: it does not hold the drawings; delete it, and they are drawn again")
    train, test = (Images(tensors[f"{part}.x"], tensors[f"{part}.y"]) for part in _PARTS)
    classes = world.SHAPES[:10]
    half = (0.5, 0.5, 0.5)
    return Dataset("drawings", train, test, classes, half, half, padding=2, flip=False)


def _draw(num: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
    from erase.mini import world

    for seed, (part, each) in enumerate(zip(_PARTS, num, strict=True)):
        rng = np.random.default_rng(seed)
        images = np.empty((each, 10, 32, 32, 3), np.uint8)
        for i in range(each):
            for label, shape in enumerate(world.SHAPES[:10]):
                words = (str(rng.choice(list(choices))) for choices in (world.COLOURS, world.STYLES, world.BACKGROUNDS))
                image = world.draw(world.Scene(shape, *words), rng)
                images[i, label] = np.round(image.reshape(32, 2, 32, 2, 3).mean((1, 3)))
        x = torch.from_numpy(images).view(-1, 32, 32, 3).permute(0, 3, 1, 2).contiguous()
        yield {f"{part}.x": x, f"{part}.y": torch.arange(10).repeat(each)}
