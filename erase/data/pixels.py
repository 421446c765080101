"""From images in [-1, 1] to 8-bit pixels."""

import torch
from torch import Tensor


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, 0 to 255, rounded as diffusers rounds."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
