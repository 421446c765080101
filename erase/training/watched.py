"""Watches images during a training: the retain loss weighs less as long as they show the concept."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.conditioning import Conditioning
from erase.data.latents import Data
from erase.families.protocol import Family
from erase.training.batches import Recipe, generator

NUM = 8  # images that are watched
LEAST = 1 / 64  # smallest factor of alpha


class Watched:
    """The factor of the retain loss, which generated images decide.

    Before the training the base generates `NUM` images z_f of forget prompts, and z_a of their anchors from the same
    noise. After every `every` steps the edited model generates z for the forget prompts, from this noise again. An
    image shows the concept if ||z - z_f|| < ||z - z_a||. If any does, the factor is halved, down to `LEAST`; if none
    does, it rises by sqrt(2), up to 1. No judge takes part, so that none is in the loop when it measures the result.

    model: with the base's weights. Nothing is drawn but from the recipe's seed, so that `values` is all that a
    checkpoint has to hold.
    values: "checks", float64, [num_checks, 2]: the share of images that show the concept, and the factor from then on;
        -1 for those to come.
    """

    def __init__(self, model: Family, data: Data, recipe: Recipe, accelerator: Accelerator, every: int):
        self._model, self._recipe, self._accelerator, self.every = model, recipe, accelerator, every
        self._empty = data.unconditional
        rows = torch.arange(NUM) * len(data.forget) // NUM
        self._asked = data.text[data.forget.prompt[rows]]
        shape = data.forget.mean.shape[1:]
        self._noise = torch.stack(
            [torch.randn(shape, generator=generator(recipe.seed, "watched", i)) for i in range(NUM)]
        )
        self._concept, self._anchor = self._images(self._asked), self._images(data.text[data.anchor[rows]])
        checks = max(0, recipe.num_steps - 1) // every
        self.values = {"checks": torch.full((checks, 2), -1.0, dtype=torch.float64)}

    def factor(self, step: int) -> float:
        """Of the retain loss in this step, counted from 0."""
        done = step // self.every
        return float(self.values["checks"][done - 1, 1]) if done else 1.0

    def is_due(self, step: int) -> bool:
        """Whether the images are looked at after this step; not after the last one, when nothing follows."""
        return (step + 1) % self.every == 0 and step + 1 < self._recipe.num_steps

    def look(self, step: int) -> dict[str, float]:
        """Generate the images after this step and set the factor; both figures by name."""
        z = self._images(self._asked)
        to_concept, to_anchor = ((z - own).square().flatten(1).sum(1) for own in (self._concept, self._anchor))
        share: Any = (to_concept < to_anchor).double().mean()
        if self._accelerator.num_processes > 1:  # GPUs may differ in the last bit, and must not in the factor
            share = self._accelerator.reduce(share, reduction="mean")
        factor = self.factor(step)
        factor = max(LEAST, factor / 2) if share > 0 else min(1.0, factor * 2**0.5)
        self.values["checks"][(step + 1) // self.every - 1] = torch.tensor([float(share), factor], dtype=torch.float64)
        return {"watched/shown": float(share), "watched/alpha_factor": factor}

    @property
    def told(self) -> dict[str, str]:
        """The last check, for the line of progress."""
        done = int((self.values["checks"][:, 0] >= 0).sum())
        if not done:
            return {}
        share, factor = self.values["checks"][done - 1].tolist()
        return {"shown": f"{share * NUM:.0f}/{NUM}", "alpha": f"x {factor:.3g}"}

    @property
    def notes(self) -> dict[str, list[float]]:
        """Of all checks, for the record of the run."""
        shares, factors = self.values["checks"].T.tolist() if len(self.values["checks"]) else ([], [])
        return {"watched_shares": shares, "watched_alpha_factors": factors}

    def _images(self, c: Conditioning) -> Tensor:
        """Latents, [NUM, c, h, w], before the last of the sampling steps."""
        steps, guidance = self._recipe.trajectory_steps, self._recipe.trajectory_guidance
        index = torch.full((NUM,), steps - 1)
        return self._model.trajectory(self._noise, index, c, self._empty, steps=steps, guidance=guidance)[0]
