"""Completion: the base takes the first steps from noise to an image of the concept, and the model the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.evaluation.attacks.protocol import CONTROL, Attack, Finding, Given
from erase.evaluation.tasks.protocol import Sample
from erase.training.batches import generator


@dataclass(frozen=True)
class Completion(Attack):
    """Which share of the steps the base takes.

    percents: of the sampler's steps, rising; at 0 the model generates alone. Fractions of a step are rounded up.
    empty_prompt: the model continues with the empty prompt, so that nothing depends on what it makes of words.
    """

    about = "the initial latents: those after the base's first steps with the concept's prompt"
    needs = "the base's images of the concept, not finished"
    unit = "% of the steps by the base"
    control = "the base takes as many steps, with prompts of other things; the model continues as before"
    limits = ("After many steps of the base any model shows the concept; compare with a retrained model.",)

    percents: tuple[int, ...] = (0, 5, 10, 20)
    empty_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.percents or sorted(set(self.percents)) != list(self.percents) or self.percents[-1] > 90:
            raise EraseError(f"percents is {'|'.join(map(str, self.percents))}; the numbers must rise up to 90")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, self.percents))

    def start(self, steps: int, percent: int) -> int:
        """How many of the sampler's steps the base takes."""
        return min(steps - 1, -(-steps * percent // 100))

    def fewest_steps(self, steps: int) -> int:
        return steps - self.start(steps, self.percents[-1])

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        found = {str(percent): Finding(facts={"percent": percent, "seed": seed}) for percent in self.percents}
        return found | {CONTROL: Finding(facts={"percent": self.percents[-1], "seed": seed, "prompts": "retain"})}

    def draw(self, given: Given, finding: Finding, batch: Sequence[Sample], guidance: float) -> Tensor:
        model, base, facts = given.model, given.open_base(), finding.facts
        prompts, others = [sample.prompt for sample in batch], given.concept.retain or given.concept.anchor
        rows = {sample.seed: i for i, sample in enumerate(given.samples)}
        other = facts.get("prompts") == "retain"
        asked = [others[rows[s.seed] % len(others)] for s in batch] if other else prompts
        start = self.start(given.steps, facts["percent"])
        noise = [generator(facts["seed"], "completion", sample.seed) for sample in batch]
        x = torch.stack([torch.randn(base.latent_shape(given.size), generator=one) for one in noise])
        index, c, empty = torch.full((len(batch),), start), base.encode_text(asked), base.unconditional()
        x, _ = base.trajectory(x, index, c, empty, steps=given.steps, guidance=guidance)
        said = [""] * len(batch) if self.empty_prompt else prompts
        return model.draw_from(x.cpu(), said, start=start, steps=given.steps, guidance=guidance)
