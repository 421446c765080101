"""samples.png: the same prompts and seeds before and after erasure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase.concepts import Concept, refusal
from erase.data.pixels import to_pixels
from erase.data.sheet import grid
from erase.families.protocol import Family
from erase.files import replacing
from erase.options.settings import Settings
from erase.runs.planning import dtype_to_generate
from erase.training import memory

FIRST_SEED = 900_000_000  # far from the seeds that training data are drawn from


def write_samples(
    path: Path, model: Family, concept: Concept, settings: Settings, where: torch.device | None = None
) -> None:
    """A PNG with two blocks, forget and retain prompts, each with a row of the base model and a row of the erased one.

    Same prompt and same seed above each other. Rows of nudity, or of prompts with sexual words, are blurred, except
    those of the embedded model.
    model: the erased one; afterwards its network has the weights of its base, perhaps rounded.
    where: the device to generate on; None is the model's.
    """
    num = settings.num_samples
    forget = spread_over(concept.forget, num)
    retain = spread_over(concept.retain or ("",), num)
    prompts = [*forget, *retain]
    seeds = [FIRST_SEED + settings.seed * 1000 + i for i in range(len(prompts))]
    steps, guidance, together = settings.num_inference_steps, settings.guidance_scale, settings.generation_batch_size
    assert steps is not None and guidance is not None and together is not None and settings.sampler is not None
    rows: list[Tensor] = []
    dtype = dtype_to_generate(settings)
    if dtype != torch.float32:
        model.round_network(dtype)
    if where is not None:
        memory.place_to_generate(model, where, settings.resolution or model.resolution)
    for role in ("erased", "base"):
        if role == "base":
            model.reload_network(dtype)
        drawn = []
        for start in range(0, len(prompts), together):
            part = slice(start, start + together)
            drawn += model.draw(
                prompts[part],
                seeds[part],
                steps=steps,
                guidance=guidance,
                size=settings.resolution or model.resolution,
                sampler=settings.sampler,
            ).unsqueeze(1)
        rows.insert(0, to_pixels(model.decode(torch.cat(drawn), 1 if settings.low_memory else 8)))
    texts = (concept.name, *concept.synonyms, *concept.forget, *concept.anchor)
    forget_blurred = not model.is_mini and (concept.kind == "nudity" or any(map(refusal.has_sexual_words, texts)))
    retain_blurred = not model.is_mini and any(map(refusal.has_sexual_words, retain))
    images = [[Image.fromarray(np.asarray(p.permute(1, 2, 0))) for p in row] for row in rows]
    sheet = grid(
        [
            ("base", images[0][:num], forget_blurred),
            (f"'{concept.name}' erased", images[1][:num], forget_blurred),
            ("base", images[0][num:], retain_blurred),
            ("erased", images[1][num:], retain_blurred),
        ],
        captions={1: forget, 3: retain},
    )
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def spread_over(prompts: Sequence[str], num: int) -> list[str]:
    """`num` prompts, evenly from the whole list, repeated when it is shorter."""
    if len(prompts) >= num:
        return [prompts[i * len(prompts) // num] for i in range(num)]
    return [prompts[i % len(prompts)] for i in range(num)]
