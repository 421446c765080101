"""Batches of training images: their order, random crops and mirroring."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.classification.data.labelled import Images
from erase.device import staged


def loader(
    images: Images,
    size: int,
    generator: torch.Generator,
    *,
    padding: int = 0,
    flip: bool = False,
    shuffle: bool = True,
) -> Iterator[Images]:
    """Augmented batches; the last one may be smaller.

    generator: on the CPU; the source of the order and of the augmentation. padding, flip: see `augment`.
    shuffle: False keeps the order of the images.
    """
    n = len(images)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    for positions in staged(order, images.y.device).split(size):
        batch = images[positions]
        yield Images(augment(batch.x, padding, flip, generator), batch.y)


def augment(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image of a batch at random from its padded version, and mirror half of them at random.

    x: uint8, [n, c, h, w], on any device.
    generator: on the CPU, so that the random numbers are the same for every device.
    """
    n, size = len(x), x.shape[2:]
    if padding:
        down, right = torch.randint(0, 2 * padding + 1, (2, n), generator=generator)
        down, right = staged(down, x.device), staged(right, x.device)
        windows = F.pad(x, [padding] * 4).unfold(2, size[0], 1).unfold(3, size[1], 1)
        x = windows[torch.arange(n, device=x.device), :, down, right]
    if flip:
        mirrored = staged(torch.rand(n, generator=generator) < 0.5, x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x
