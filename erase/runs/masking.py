"""The mask of a run: computed, drawn at random, restored or read from a file."""

from collections.abc import Sequence
from typing import Any

from erase import masks
from erase.concepts import Concept
from erase.data import latents
from erase.options.settings import Settings
from erase.runs.decisions import Decisions
from erase.runs.mask_files import kept_mask
from erase.runs.planning import part_size, real, whole
from erase.training import null_space, saliency_pass
from erase.training.sharded import Shards


def choose_mask(decided: Decisions, shown: latents.Data | None, shards: Shards | None = None) -> masks.Packed | None:
    """Which weights may change; None if all in the scope may.

    shown: images of the concept, for a mask that is computed from them. shards: the weights, if they are divided.
    """
    mask, earlier = decided.given_mask, decided.earlier
    if mask is None and decided.settings.mask != "none":
        mask = make_mask(decided, shown, shards)
    if mask is not None and earlier is not None and earlier.mask is not None:
        mask = masks.pack(masks.union(mask, earlier.mask))
    return mask


def make_mask(decided: Decisions, shown: latents.Data | None, shards: Shards | None) -> masks.Packed:
    """The saliency mask or a control of it, kept in the work folder until the run is finished."""
    settings, accelerator = decided.settings, decided.accelerator
    path = decided.work / "mask.safetensors"
    if path.exists():
        return kept_mask(path, settings, decided.parameters, decided.base_hash)
    if settings.mask == "random":
        shapes = {name: parameter.shape for name, parameter in decided.parameters.items()}
        how: dict[str, Any] = {"per_tensor": settings.per_tensor}
        how |= {} if settings.null_space is None else {"by_rows": decided.model.is_text_map}
        mask = masks.random_mask(shapes, settings.density, settings.seed, **how)
    else:
        assert shown is not None
        mask = saliency_mask(decided, shown, shards)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        header = {
            "base": settings.model,
            "base_hash": decided.base_hash,
            "data_hash": shown and shown.fingerprint,
            "source": settings.mask,
            "density": settings.density,
            "score": settings.score,
            "per_tensor": settings.per_tensor,
            "mask_guidance": settings.mask_guidance,
            **({"mask_attack": settings.mask_attack} if settings.mask_attack else {}),
            "scope": settings.scope,
            "seed": settings.seed,
            "concepts": [part.name for part in decided.parts],
        }
        masks.save(path, mask, header)
    return masks.pack(mask)


def saliency_mask(decided: Decisions, shown: latents.Data, shards: Shards | None) -> masks.Packed:
    """The most salient weights, or the least salient ones for the control "inverse".

    Each of several concepts has its own mask, at the full density and from the images of its own prompts. The result
    is their union: with k concepts it holds between one and k times the density.
    """
    settings = decided.settings
    mask: masks.Packed | None = None
    for number, images in enumerate(by_concept(shown, decided.parts, settings)):
        scores = saliency_pass.accumulate(
            decided.model,
            images,
            decided.parameters if shards is None else shards.parameters,
            decided.accelerator,
            score=settings.score,
            guidance=real(settings.mask_guidance),
            radius=settings.mask_attack,
            batch_size=whole(settings.batch_size),
            seed=settings.seed,
            state_path=decided.work / f"saliency-{number}.safetensors",
            part=part_size(settings),
            checkpointing=settings.gradient_checkpointing,
            is_sharded=shards is not None,
            quiet=decided.quiet,
        )
        if settings.null_space is not None:
            null_space.by_rows(decided.model, scores)
        largest = settings.mask == "saliency"
        how: dict[str, Any] = {"per_tensor": settings.per_tensor, "largest": largest, "others": shards}
        own = masks.select_packed(scores, settings.density, **how)
        own = own if shards is None else shards.whole(own)
        mask = own if mask is None else masks.pack(masks.union(own, mask))
    assert mask is not None  # there is at least one concept
    return mask


def by_concept(shown: latents.Data, parts: Sequence[Concept], settings: Settings) -> list[latents.Data]:
    """The forget images of each concept that gets a mask; of a single one, and of unnamed images, all.

    The concepts of an earlier run get none here: their masks are there already.
    """
    if len(parts) == 1 and settings.base is None or settings.forget_images:
        return [shown]
    return [latents.of_prompts(shown, part.forget) for part in parts]
