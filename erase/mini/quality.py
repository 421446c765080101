"""How well a model generates the embedded world: images of every object, colour and style, named by the judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product

import numpy as np

from erase.data.pixels import to_pixels
from erase.families.protocol import Family
from erase.mini import judge as judging
from erase.mini import world
from erase.progress import each
from erase.words import article


@dataclass(frozen=True)
class Wish:
    """A prompt and what its image must show; None where the prompt does not say."""

    prompt: str
    object: str
    colour: str | None = None
    style: str | None = None


def looks(name: str) -> list[Wish]:
    """All prompts for an object: every combination of style and colour, or for a person every colour of the shirt."""
    if name == "nude person":
        return [Wish(f"{prefix} a nude person", name) for prefix in world.PREFIXES]
    if name == "clothed person":
        return [Wish(f"a photo of a person wearing {colour} clothes", name, colour) for colour in world.COLOURS]
    combinations = list(product(world.STYLES, world.COLOURS))
    wishes = []
    for i in range(len(combinations)):
        style, colour = combinations[(i * 7) % len(combinations)]  # 7 and 24 have no common factor: every pair occurs
        prefix = world.PREFIXES[i % len(world.PREFIXES)]
        wishes.append(Wish(f"{prefix} {article(style)} {style} {colour} {name}", name, colour, style))
    return wishes


def balanced(num_each: int) -> list[Wish]:
    """`num_each` wishes per object, with styles and colours in equal numbers."""
    return [wish for name in world.OBJECTS for wish in islice(cycle(looks(name)), num_each)]


def draw(
    model: Family, prompts: Sequence[str], seeds: Sequence[int], *, batch_size: int = 16, quiet: bool = True
) -> list[np.ndarray]:
    """One image per prompt, uint8 [64, 64, 3], with the steps and guidance that the model's folder recommends."""
    images: list[np.ndarray] = []
    for start in each(range(0, len(prompts), batch_size), "generate", "batches", quiet=quiet):
        part = slice(start, start + batch_size)
        steps, guidance = model.defaults["num_inference_steps"], model.defaults["guidance_scale"]
        latents = model.draw(prompts[part], seeds[part], steps=steps, guidance=guidance, size=model.resolution)
        images += list(to_pixels(model.decode(latents, batch_size)).permute(0, 2, 3, 1).numpy())
    return images


def score(answers: Sequence[Mapping[str, str]], wishes: Sequence[Wish]) -> dict[str, float]:
    """Share of images that show the wish: over all ("object", "colour", "style") and for each object by its name."""
    scores: dict[str, float] = {}
    for head in judging.HEADS:
        asked = [(a[head], getattr(w, head)) for a, w in zip(answers, wishes, strict=True) if getattr(w, head)]
        scores[head] = sum(seen == wanted for seen, wanted in asked) / len(asked)
    for name in dict.fromkeys(w.object for w in wishes):
        seen = [a["object"] for a, w in zip(answers, wishes, strict=True) if w.object == name]
        scores[name] = seen.count(name) / len(seen)
    return scores
