"""The mask of a run: computed from saliency, random, or read from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase import delta, masks
from erase.classification.data import Images
from erase.classification.descent import saliency_mask
from erase.classification.settings import Settings
from erase.errors import EraseError


def make_mask(
    settings: Settings, model: nn.Module, forget: Images, *, padding: int = 0, flip: bool = False
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """The mask that the settings ask for, and the header of its file. The mask is None if all weights may change.

    settings: resolved. padding, flip: of the augmentation.

    Raises:
        EraseError: there is no such kind of mask and no such file, or the file is for another model.
    """
    assert settings.density is not None
    base_hash = delta.content_hash(model.state_dict())
    header = {"base": f"{settings.network} on {settings.data}", "base_hash": base_hash, "density": settings.density}
    kind = settings.mask
    if kind in (None, "none"):
        return None, header
    if kind in ("saliency", "inverse"):
        how: dict[str, Any] = {
            "per_tensor": settings.per_tensor,
            "largest": kind == "saliency",
            "batch_size": settings.batch_size,
            "precision": settings.precision,
            "generator": torch.Generator().manual_seed(settings.seed),
            "padding": padding,
            "flip": flip,
        }
        mask = saliency_mask(model, forget, settings.density, settings.score, **how)
        return mask, {**header, "mask": kind, "score": settings.score, "per_tensor": settings.per_tensor}
    named = dict(model.named_parameters())
    if kind == "random":
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        mask = masks.random_mask(shapes, settings.density, settings.seed, per_tensor=settings.per_tensor)
        return mask, {**header, "mask": kind, "seed": settings.seed}
    if not Path(kind).is_file():
        raise EraseError(f"--mask is {kind!r}; choose saliency, random, inverse, none, or a mask file")
    stored, found = masks.load(kind)
    masks.check(stored, found.made, named, base_hash=base_hash)
    return {name: stored[name] for name in stored}, dict(found.made)
