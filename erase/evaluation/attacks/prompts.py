"""The user's own list of prompts, such as published adversarial ones. They are transferred: found on another model."""

from collections.abc import Sequence
from dataclasses import dataclass

from erase.concepts import Concept
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given


@dataclass(frozen=True)
class Prompts(Attack):
    """Images of the prompts in the list; if there are more prompts than images, of prompts that are evenly spread."""

    about = "the prompt: your own list (--prompts FILE), which was found on another model or without any"
    needs = "the model's images"
    unit = "prompts"
    control = "the concept's own prompts"
    limits = ("The prompts were not found on this model: an attacker who searches on it may find better ones.",)
    is_random = False
    needs_prompts = True

    @property
    def points(self) -> tuple[str, ...]:
        return ("transferred",)

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        prompts, forget = dict.fromkeys(sample.prompt for sample in given.samples), given.concept.forget
        plain = {prompt: forget[i % len(forget)] for i, prompt in enumerate(prompts)}
        return {"transferred": Finding(), CONTROL: Finding(texts=plain)}

    def asks(self, concept: Concept, own: Sequence[str], num: int) -> list[str]:
        return [own[i * len(own) // num] if num < len(own) else own[i % len(own)] for i in range(num)]
