"""One image file as an RGB pixel tensor, and channel statistics of many."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from erase.classification.presets import MOST_SIZE
from erase.data.images import BadImage
from erase.data.images import read as read_image
from erase.errors import EraseError


def read_pixels(source: Path | bytes, name: str, size: int | None) -> Tensor:
    """RGB pixels, uint8, [3, h, w].

    name: of the image, for error messages.
    size: the middle square is scaled to size x size; None keeps the image as it is.

    Raises:
        EraseError: the image cannot be read, or is too large to be used without `size`.
    """
    try:
        pixels = read_image(source)
    except BadImage as error:
        raise EraseError(f"{name} cannot be read as an image ({error.reason}); repair or remove it") from error
    if size is None and max(pixels.shape[:2]) > MOST_SIZE:
        here = "x".join(map(str, pixels.shape[:2]))
        raise EraseError(f"{name} is {here} pixels; give --size, or images of at most {MOST_SIZE} a side")
    if size is not None and pixels.shape[:2] != (size, size):
        pixels = np.array(ImageOps.fit(Image.fromarray(pixels), (size, size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on pixels in [0, 1].

    x: uint8, [n, c, h, w]. The 256 levels are counted, because a float copy would need four times the memory.
    """
    counts = torch.stack([torch.bincount(x[:, c].reshape(-1).int(), minlength=256) for c in range(x.shape[1])]).double()
    share, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
