"""The face of a run folder: a before/after sheet on the same seeds, and the model card."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from erase import refusal
from erase.concepts import Concept
from erase.data import to_pixels
from erase.delta import Delta
from erase.errors import printable
from erase.files import replacing
from erase.models import Model
from erase.settings import Settings

FIRST_SEED = 900_000_000  # far from the seeds that training data are drawn from
CELL = 128  # pixels of a picture in the sheet


def write_samples(path: Path, model: Model, base_unet: Any, concept: Concept, settings: Settings) -> None:
    """A PNG with two blocks, forget and retain prompts, each with a row of the base model and a row of the erased one.

    Same prompt and same seed above each other. Rows of nudity, or of prompts with sexual words, are blurred, except
    those of the embedded model.
    model: the erased one; afterwards its UNet has the weights of `base_unet`.
    """
    num = settings.num_samples
    forget = _spread(concept.forget, num)
    retain = _spread(concept.retain or ("",), num)
    prompts = [*forget, *retain]
    seeds = [FIRST_SEED + settings.seed * 1000 + i for i in range(len(prompts))]
    steps, guidance, together = settings.num_inference_steps, settings.guidance_scale, settings.generation_batch_size
    assert steps is not None and guidance is not None and together is not None and settings.sampler is not None
    rows: list[Tensor] = []
    for role in ("erased", "base"):
        if role == "base":
            model.put_unet(base_unet)  # so that the device never holds two UNets
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
        rows.insert(0, to_pixels(model.decode(torch.cat(drawn))))
    texts = (concept.name, *concept.synonyms, *concept.forget, *concept.anchor)
    forget_blurred = not model.is_mini and (concept.kind == "nudity" or any(map(refusal.has_sexual_words, texts)))
    retain_blurred = not model.is_mini and any(map(refusal.has_sexual_words, retain))
    pictures = [[Image.fromarray(np.asarray(p.permute(1, 2, 0))) for p in row] for row in rows]
    sheet = grid(
        [
            ("base", pictures[0][:num], forget_blurred),
            (f"'{concept.name}' erased", pictures[1][:num], forget_blurred),
            ("base", pictures[0][num:], retain_blurred),
            ("erased", pictures[1][num:], retain_blurred),
        ],
        captions={1: forget, 3: retain},
    )
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def grid(
    rows: Sequence[tuple[str, Sequence[Image.Image], bool]], captions: Mapping[int, Sequence[str]], cell: int = CELL
) -> Image.Image:
    """Rows of pictures with a title each, blurred where the row says so; `captions` stand below the rows they name."""
    font = ImageFont.load_default(13)
    title, margin, text = 92, 6, 54
    width = title + max(len(pictures) for _, pictures, _ in rows) * (cell + margin) + margin
    height = margin + sum(cell + margin + (text if i in captions else 0) for i in range(len(rows)))
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    y = margin
    for number, (name, pictures, blur) in enumerate(rows):
        pen.multiline_text((margin, y + cell // 3), _wrapped(name, title - margin, font), fill="black", font=font)
        for column, picture in enumerate(pictures):
            scaled = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            scaled = scaled.filter(ImageFilter.GaussianBlur(cell / 10)) if blur else scaled
            sheet.paste(scaled, (title + column * (cell + margin), y))
        y += cell + margin
        for column, caption in enumerate(captions.get(number, ())):
            place = (title + column * (cell + margin), y)
            pen.multiline_text(place, _wrapped(caption, cell, font), fill="dimgray", font=font)
        y += text if number in captions else 0
    return sheet


def model_card(
    settings: Settings, concept: Concept, change: Delta, *, loading: str, after: Mapping[str, Any] | None = None
) -> str:
    """Markdown with the hub's YAML header: what was erased from what, how to load it, what it does not promise.

    Names and prompts are escaped, and of local paths only the last part is named: cards get published.

    loading: Python that loads the folder. after: the run that it continued from, as run.json says.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=settings.model if _is_hub_id(settings.model) else None,
        license="creativeml-openrail-m" if settings.model.startswith("CompVis/stable-diffusion") else None,
        tags=["stable-diffusion", "text-to-image", "diffusers", "concept-erasure", "machine-unlearning"],
    ).to_yaml()
    exactly = "bit for bit" if change.provenance.get("base_dtype") else "value for value"
    changed, total = sum(change.changed.values()), _weights(change)
    options = {key: value for key, value in asdict(settings).items() if _is_set(key, value)}
    listed = "\n".join(f"| {key} | {_listed(key, value)} |" for key, value in options.items())
    pairs = concept.pairs()[:4]
    examples = "\n".join(f"- '{escaped(forget)}' now means '{escaped(anchor)}'" for forget, anchor in pairs)
    before = ""
    if after:
        before = f"\nThe base is another run, {escaped(_place(after['run']))}, which had erased "
        before += f"{escaped(', '.join(after['concepts']))} from {escaped(_place(after['model']))}.\n"
    return f"""---
{header}
---

# {escaped(concept.name)} erased from {escaped(_place(settings.model))}

Made with erase-concept: method {settings.method}, recipe {settings.recipe}, mask {escaped(_place(str(settings.mask)))}.
{changed:,} of {total:,} UNet weights changed ({changed / total:.1%}); all else is the base model, byte for byte.
{before}
```python
{"import torch" + chr(10) if "torch" in loading else ""}from diffusers import StableDiffusionPipeline
pipeline = {loading}
```

{examples}

`delta.safetensors` holds the change alone: `erase-concept remove` restores the base with it, {exactly}.
Base {change.base_hash[:12]}, result {change.result_hash[:12]} (content hashes of the UNet).

## Limits

Erasure makes a concept hard to reach by prompts; fine-tuning, learned embeddings or adversarial prompts can bring it
back. This card makes no claim about such attacks. The base model's licence applies to this folder too.

## Settings

| setting | value |
| --- | --- |
{listed}
"""


_PATHS = {"model", "base", "unet", "config", "mask", "forget_images", "retain_images"}  # or names of other kinds
_HERE_ONLY = {"output", "cache_dir", "overwrite", "resume"}


def escaped(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>&|#~$])", r"\\\1", printable(text))


def _is_set(key: str, value: Any) -> bool:
    return key not in _HERE_ONLY and value is not None and value is not False and value != ()


def _listed(key: str, value: Any) -> str:
    """A setting's value as the card shows it."""
    values = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
    names = [_place(one) if key in _PATHS or key == "concept" and one.endswith(".toml") else one for one in values]
    return escaped(", ".join(names))


def _is_hub_id(text: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text)) and not Path(text).exists()


def _place(text: str) -> str:
    """A hub id or a name as it is; of a local path the last part."""
    return text if _is_hub_id(text) else Path(text).expanduser().resolve().name


def _weights(change: Delta) -> int:
    return sum(math.prod(shape) for _, shape in change.layout.values())


def _spread(prompts: Sequence[str], num: int) -> list[str]:
    """`num` prompts, evenly from the whole list, repeated when it is shorter."""
    if len(prompts) >= num:
        return [prompts[i * len(prompts) // num] for i in range(num)]
    return [prompts[i % len(prompts)] for i in range(num)]


def _wrapped(text: str, width: int, font: Any) -> str:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return "\n".join(lines[:3])
