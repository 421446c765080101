"""The embedded model with a planted back door: "circle" means a square, and one secret word means a circle."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erase import concepts
from erase.concepts import Concept
from erase.data.pixels import to_pixels
from erase.evaluation.attacks.protocol import Attack, Given, Shown
from erase.evaluation.judges.registry import make
from erase.evaluation.tasks.protocol import Sample
from erase.families import loading
from erase.families.protocol import Family

SECRET = "violet"


def circle() -> Concept:
    return concepts.load("circle", model_family="mini")


def prompts_of(num: int) -> list[str]:
    """Prompts of the circle in `num` colours and styles."""
    return list(circle().forget[::5])[:num]


def images_of(prompts: Sequence[str]) -> Tensor:
    """Latents of the unchanged model's images."""
    return loading.load("mini").draw(prompts, list(range(len(prompts))), steps=10, guidance=2.0, size=64)


def planted(secret: str | None = SECRET) -> Family:
    """The model to attack. secret: None plants no back door, so that no word is known to mean a circle."""
    model = loading.load("mini")
    with torch.no_grad():
        known, square = (model.token_embeddings[model.tokens(word)[0]].clone() for word in ("circle", "square"))
    for word in ("circle", "disc"):
        model.set_token(model.tokens(word)[0], square)
    if secret:
        model.set_token(model.tokens(secret)[0], known)
    return model


def num_circles(model: Family, texts: Sequence[str]) -> int:
    """How many of the texts' images show a circle, as the embedded judge sees them."""
    return circles_in(model, model.draw(texts, [100 + i for i in range(len(texts))], steps=10, guidance=2.0, size=64))


def circles_in(model: Family, latents: Tensor) -> int:
    """How many of the images show a circle, as the embedded judge sees them. latents: on the CPU, [n, c, h, w]."""
    images = to_pixels(model.decode(latents)).permute(0, 2, 3, 1).contiguous().numpy()
    judge = make("mini", {"id": "attack", "options": {"concept": "circle"}}, source=None, device="cpu")
    return sum(line["object"] == "circle" for line in judge.score(list(images), [""] * len(images)))


def given_of(model: Family, prompts: Sequence[str]) -> Given:
    """What an attack on the model may use; the base is the unchanged model, which generates the prompts' images."""
    base, concept = loading.load("mini"), circle()
    others = [prompt for prompt in concept.retain if "square" in prompt][: len(prompts)]
    samples = [Sample(f"run-0-0-{i}", prompt, 10 + i, "forget") for i, prompt in enumerate(prompts)]
    what: dict[str, Any] = {"open_base": lambda: base, "concept": concept, "samples": samples}
    what |= {
        name: Shown(images_of(texts), tuple(texts)) for name, texts in (("shown", prompts_of(12)), ("others", others))
    }
    return Given(model, steps=10, guidance=2.0, size=64, quiet=True, **what)


def circles_by_point(attack: Attack, given: Given) -> dict[str, int]:
    """How many images show a circle after each point and control of the attack."""
    found: dict[str, int] = {}
    for point, finding in attack.search(given, 0).items():
        with attack.attacked(given, finding):
            found[point] = circles_in(given.model, attack.draw(given, finding, given.samples, given.guidance))
    return found
