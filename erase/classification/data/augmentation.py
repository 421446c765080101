"""Random crops and mirroring of training images."""

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop each image of a batch at random from its padded version, and mirror half of them at random.

    x: uint8, [n, c, h, w], on any device.
    generator: on the CPU, so that the random numbers are the same for every device.
    """
    n, size = len(x), x.shape[2:]
    if padding:
        down, right = torch.randint(0, 2 * padding + 1, (2, n), generator=generator).to(x.device)
        windows = F.pad(x, [padding] * 4).unfold(2, size[0], 1).unfold(3, size[1], 1)
        x = windows[torch.arange(n, device=x.device), :, down, right]
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x
