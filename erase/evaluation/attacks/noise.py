"""Noise on images of the concept (SDEdit): a model that knows the concept restores it, another one cannot.

An image x of the base is noised to x_t = sqrt(a_t) x + sqrt(1 - a_t) eps; the model continues with the empty prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given
from erase.evaluation.tasks.protocol import Sample
from erase.training.batches import generator


@dataclass(frozen=True)
class Noise(Attack):
    """How far images are noised.

    percents: of the timesteps that the model has to undo, rising. With less noise more of the image is left, so that
        any model shows the concept; compare with a retrained model.
    """

    about = "the initial latents: images of the concept with added noise, and the empty prompt"
    needs = "images of the concept"
    unit = "% noise"
    control = "images of other things, with the same share of noise"
    limits = (
        "With little noise any model gives back the image. Only the distance to a retrained model says anything.",
    )

    percents: tuple[int, ...] = (30, 40, 50, 60, 70)
    num_shown: int = 40
    num_others: int = 40

    def __post_init__(self) -> None:
        percents = list(self.percents)
        if not percents or sorted(set(percents)) != percents or percents[0] < 1 or percents[-1] > 100:
            raise EraseError(f"percents is {'|'.join(map(str, percents))}; the numbers must rise from 1 up to 100")
        if not self.num_shown or not self.num_others:
            raise EraseError("num_shown and num_others must be 1 or more")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, self.percents))

    def start(self, steps: int, percent: int) -> int:
        """How many of the sampler's steps are left out."""
        return steps - max(1, round(steps * percent / 100))

    def fewest_steps(self, steps: int) -> int:
        return steps - self.start(steps, self.percents[0])

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        texts = {sample.prompt: "" for sample in given.samples}
        facts = [{"percent": percent, "seed": seed, "images": "shown"} for percent in self.percents]
        found = {str(fact["percent"]): Finding(texts=texts, facts=fact) for fact in facts}
        return found | {CONTROL: Finding(texts=texts, facts={**facts[-1], "images": "others"})}

    def draw(self, given: Given, finding: Finding, batch: Sequence[Sample], guidance: float) -> Tensor:
        model, facts = given.model, finding.facts
        images = (given.shown if facts["images"] == "shown" else given.others).latents
        rows = {sample.seed: i % len(images) for i, sample in enumerate(given.samples)}
        x = torch.stack([images[rows[sample.seed]] for sample in batch])
        noise = [generator(facts["seed"], "noise", sample.seed) for sample in batch]
        eps = torch.stack([torch.randn(x.shape[1:], generator=one) for one in noise])
        start = self.start(given.steps, facts["percent"])
        t = model.times(given.steps)[start].expand(len(x))
        how = {"start": start, "steps": given.steps, "guidance": guidance}
        return model.draw_from(model.add_noise(x, eps, t), [finding.texts[s.prompt] for s in batch], **how)
