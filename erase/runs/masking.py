"""The mask of a run: computed, drawn, restored or read from a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erase import delta, masks, tensor_files
from erase.concepts import Concept
from erase.data import latents
from erase.errors import EraseError, no_file
from erase.families import compvis, sd
from erase.options.settings import Settings
from erase.runs.planning import part_size, real, whole
from erase.training import saliency_pass


def load_mask(
    settings: Settings, model: sd.Model, parameters: Mapping[str, Tensor], base_hash: str
) -> masks.Packed | None:
    """The mask of a file, ours or the reference's, checked against this model; None when --mask names no file."""
    if settings.mask in {"saliency", "random", "inverse", "none"}:
        return None
    path = Path(str(settings.mask)).expanduser()
    if not path.is_file():
        raise EraseError(f"--mask: {no_file(path)}; or choose saliency, random, inverse or none")
    if path.suffix == ".safetensors":
        mask, header = masks.load(path)
    else:
        unet: Any = model.unet
        names = {theirs: ours for ours, theirs in compvis.unet_names(unet.state_dict(), unet.config).items()}
        mask, header = masks.load_reference(path, lambda name: names.get(name, name)), {"base": path.name}
    masks.check(mask, header, parameters, base_hash=base_hash)
    missing = [name for name in parameters if name not in mask]
    if missing:
        raise EraseError(f"{path} has no entry for {missing[0]!r}; it was made for another --scope")
    return masks.pack({name: mask[name] for name in parameters})


def make_mask(
    settings: Settings,
    model: sd.Model,
    pictures: latents.Data | None,
    parts: Sequence[Concept],
    parameters: Mapping[str, torch.nn.Parameter],
    accelerator: Accelerator,
    work: Path,
    base_hash: str,
    quiet: bool,
) -> masks.Packed:
    """The saliency mask or a control of it, kept in `work` until the run is finished.

    Of several concepts each has its own, at the full density and from the pictures of its own prompts, and what any
    of them lets move may move: with k concepts between density and k times it.
    """
    path = work / "mask.safetensors"
    if path.exists():
        return kept_mask(path, settings, parameters, base_hash)
    if settings.mask == "random":
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        mask = masks.random_mask(shapes, settings.density, settings.seed, per_tensor=settings.per_tensor)
    else:
        assert pictures is not None
        mask = {}
        for number, shown in enumerate(by_concept(pictures, parts, settings)):
            scores = saliency_pass.accumulate(
                model,
                shown,
                parameters,
                accelerator,
                score=settings.score,
                guidance=real(settings.mask_guidance),
                batch_size=whole(settings.batch_size),
                seed=settings.seed,
                state_path=work / f"saliency-{number}.safetensors",
                part=part_size(settings),
                checkpointing=settings.gradient_checkpointing,
                quiet=quiet,
            )
            largest = settings.mask == "saliency"
            own = masks.select(scores, settings.density, per_tensor=settings.per_tensor, largest=largest)
            mask = masks.union(own, mask)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        header = {
            "base": settings.model,
            "base_hash": base_hash,
            "data_hash": pictures and pictures.fingerprint,
            "source": settings.mask,
            "density": settings.density,
            "score": settings.score,
            "per_tensor": settings.per_tensor,
            "mask_guidance": settings.mask_guidance,
            "scope": settings.scope,
            "seed": settings.seed,
            "concepts": [part.name for part in parts],
        }
        masks.save(path, mask, header)
    return masks.pack(mask)


def kept_mask(path: Path, settings: Settings, parameters: Mapping[str, Tensor], base_hash: str) -> masks.Packed:
    """The mask that this run made before it was interrupted."""
    try:
        tensor_files.read_own(path, kind="mask", base_hash=base_hash, source=settings.mask, density=settings.density)
        mask, header = masks.load(path)
        masks.check(mask, header, parameters, base_hash=base_hash)
    except EraseError as error:
        told = str(error).replace("; copy or download it again", "")
        raise EraseError(f"{told}; delete {path}, and the same command makes the mask again") from error
    return mask


def by_concept(pictures: latents.Data, parts: Sequence[Concept], settings: Settings) -> list[latents.Data]:
    """The forget pictures of each concept to be masked for; of a single one, and of unnamed images, all.

    An earlier run's concepts have no mask here, since theirs is there already.
    """
    if len(parts) == 1 and settings.base is None or settings.forget_images:
        return [pictures]
    return [latents.of_prompts(pictures, part.forget) for part in parts]


def saliency_hash(mask: Mapping[str, Tensor]) -> str:
    return delta.content_hash({name: bits.to(torch.uint8) for name, bits in mask.items()})
