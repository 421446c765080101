"""Masks that a run finds in files: the one that --mask names, and its own from before an interruption."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from erase import delta, masks, tensor_files
from erase.errors import EraseError, no_file
from erase.families.protocol import Family
from erase.options.settings import Settings


def load_mask(
    settings: Settings, model: Family, parameters: Mapping[str, Tensor], base_hash: str
) -> masks.Packed | None:
    """The mask of a file, ours or the reference's, checked against this model; None when --mask names no file."""
    if settings.mask in {"saliency", "random", "inverse", "none"}:
        return None
    path = Path(str(settings.mask)).expanduser()
    if not path.is_file():
        raise EraseError(f"--mask: {no_file(path)}; or choose saliency, random, inverse or none")
    if path.suffix == ".safetensors":
        mask, header = masks.load(path)
        made = header.made
    else:
        names = model.reference_names()
        mask, made = masks.load_reference(path, lambda name: names.get(name, name)), {"base": path.name}
    masks.check(mask, made, parameters, base_hash=base_hash)
    missing = [name for name in parameters if name not in mask]
    if missing:
        raise EraseError(f"{path} has no entry for {missing[0]!r}; it was made for another --scope")
    return masks.pack({name: mask[name] for name in parameters})


def kept_mask(path: Path, settings: Settings, parameters: Mapping[str, Tensor], base_hash: str) -> masks.Packed:
    """The mask that this run made before it was interrupted."""
    try:
        tensor_files.read_own(path, kind="mask", base_hash=base_hash, source=settings.mask, density=settings.density)
        mask, header = masks.load(path)
        masks.check(mask, header.made, parameters, base_hash=base_hash)
    except EraseError as error:
        told = str(error).replace("; copy or download it again", "")
        raise EraseError(f"{told}; delete {path}, and the same command makes the mask again") from error
    return mask


def saliency_hash(mask: Mapping[str, Tensor]) -> str:
    return delta.content_hash({name: bits.to(torch.uint8) for name, bits in mask.items()})
