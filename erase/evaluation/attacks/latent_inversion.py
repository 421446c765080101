"""Text-free inversion (TINA, CVPR 2026): noise from which the model regenerates an image of the concept without a text.

A DDIM step from the level t to the level below it is inverted by solving for z_t
    z_t = C1 z_s + C2 eps_theta(z_t, t, ""),   C1 = A_t / A_s,   C2 = B_t - A_t B_s / A_s,   z = A x_0 + B eps,
from the image z_0 up to the noise z_T. Any smooth network can be inverted so, even none (eps = 0), so a success rate
tests the solver. Where z_T lies depends on the model: its likelihood under N(0, I), beside that of other images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.attacks.protocol import (
    CONTROL,
    Attack,
    Finding,
    Given,
    Measured,
    budget_of,
    checked_points,
)
from erase.evaluation.tasks.protocol import Sample
from erase.families.protocol import Family
from erase.progress import progress

TYPICAL = (1 + math.log(2 * math.pi)) / 2  # mean of `surprise` over samples of N(0, I): 1.419
Noise = Callable[[Tensor, Tensor], Tensor]  # (z, t) -> the noise that a model sees in z


@dataclass(frozen=True)
class LatentInversion(Attack):
    """How the steps are inverted.

    num_steps: of the solver, for each sampling step. at: points of the curve, the last one `num_steps`; empty for 0,
        25, 50 and 100 %. Each point is an inversion of its own; at 0 it is plain DDIM inversion.
    solver: "adamw" lowers the squared error of the equation, a forward and a backward pass for each solver step;
        "fixed-point" puts z_t into its right side again, a forward pass. The latter takes no learning rate.
    learning_rate: of AdamW, on z_t.
    num_shown, num_others: images of the concept, and of other things, that are inverted: at most one for each prompt.
    """

    about = "the initial latents: noise that the model turns into an image of the concept with the empty prompt"
    needs = "the model's gradients or its predictions, and images of the concept"
    control = "the same without any network"
    limits = (
        "The rate tests the solver, not the erasure: untrained networks, and none at all, give back the image as well.",
        f"Noise has a mean surprise of {TYPICAL:.3f}. Compare that of the concept with that of other images, and the "
        "erased model with the base and a retrained model.",
    )
    measured = (
        Measured(
            "surprise",
            "Surprise of the noise",
            "-log N(z_T; 0, I) for each dimension, in nats, of the noise found for an image of the concept",
            True,
        ),
        Measured("surprise-others", "Surprise, other images", "the same for an image of other things", False),
    )
    is_random = False

    num_steps: int = 25
    at: tuple[int, ...] = ()
    solver: Literal["adamw", "fixed-point"] = "adamw"
    learning_rate: float = 0.001
    num_shown: int = 40
    num_others: int = 40

    def __post_init__(self) -> None:
        checked_points(self.at, self.num_steps)
        if not self.num_shown or not self.num_others:
            raise EraseError("num_shown and num_others must be 1 or more")

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(map(str, checked_points(self.at, self.num_steps)))

    def with_budget(self, budget: Sequence[int]) -> "LatentInversion":
        return replace(self, **budget_of(budget))

    def require_possible(self, model: Family, steps: int) -> None:
        if not model.path(steps)[0, 0]:  # c1 is 0, and every z_t solves the equation
            raise EraseError(
                f"latent-inversion: the latents of {model.name} begin as noise alone, without any part of an image, so "
                "their first step cannot be inverted; choose another attack, such as noise"
            )

    def search(self, given: Given, seed: int) -> dict[str, Finding]:
        model, points = given.model, checked_points(self.at, self.num_steps)
        if not len(given.others.latents):
            raise EraseError(f"{given.concept.name} has no retain or anchor prompts to compare with")
        images = [shown.latents[: len(given.samples)] for shown in (given.shown, given.others)]
        texts, found = {sample.prompt: "" for sample in given.samples}, {}
        named = {str(point): replace(self, num_steps=point, at=()) for point in points} | {CONTROL: self}
        total = 2 * given.steps * len(points)
        with progress(total, "latent-inversion", "sampling steps", quiet=given.quiet) as bar:
            for point, attack in named.items():
                if point == CONTROL:
                    noises = [unchanged(x, model.path(given.steps)) for x in images]
                else:
                    noises = [invert(model, x, attack, given.steps, given.guidance, bar.update) for x in images]
                surprises = [surprise(z) for z in noises]
                facts = dict(zip(("surprise", "surprise-others"), surprises, strict=True))
                found[point] = Finding({"latents": noises[0]}, texts, {**facts, "network": point != CONTROL})
        return found

    def draw(self, given: Given, finding: Finding, batch: Sequence[Sample], guidance: float) -> Tensor:
        model, latents = given.model, finding.tensors["latents"]
        z = latents[[self._row(given, sample, len(latents)) for sample in batch]]
        if not finding.facts["network"]:
            first, *_, last = model.path(given.steps)[:, 0]
            return z * (last / first)
        guidance = guidance if model.guard else 1.0
        return model.draw_from(z, [""] * len(batch), start=0, steps=given.steps, guidance=guidance)

    def recorded(self, given: Given, finding: Finding, sample: Sample) -> dict[str, float | None]:
        facts = [(one.name, finding.facts[one.name]) for one in self.measured]
        return {name: values[self._row(given, sample, len(values))] for name, values in facts}

    def _row(self, given: Given, sample: Sample, number: int) -> int:
        """The number of the image that belongs to the sample, of `number` ones."""
        return [one.seed for one in given.samples].index(sample.seed) % number


def surprise(z: Tensor) -> list[float | None]:
    """-log N(z; 0, I) divided by the number of dimensions, in nats; None where it is not finite. z: [n, c, h, w]."""
    values = (z.double().square().flatten(1).mean(1) + math.log(2 * math.pi)) / 2
    return [value if math.isfinite(value) else None for value in values.tolist()]


def unchanged(x: Tensor, path: Tensor) -> Tensor:
    """z_T of images x, [n, c, h, w], where no noise is seen anywhere (eps = 0). path: see `Family.path`."""
    return x * (path[0, 0] / path[-1, 0])


def seen_by(model: Family, num: int, guidance: float) -> Noise:
    """The noise that the model sees with the empty prompt as its images are generated, behind its guard if it has one.

    num: rows of the latents. guidance: of images behind a guard; without a guard none is used.
    """
    c = model.encode_text([""]).to(model.device).expand(num)
    if model.guard is None:
        return lambda z, t: model(z, t, c)
    empty = model.unconditional().to(model.device).expand(num)

    def guarded(z: Tensor, t: Tensor) -> Tensor:
        without = model(z, t, empty)
        return without + guidance * (predict(model, z, t, c) - without)

    return guarded


def invert(
    model: Family,
    x: Tensor,
    attack: LatentInversion,
    steps: int,
    guidance: float,
    stepped: Callable[[], object] = lambda: None,
) -> Tensor:
    """The noise z_T, [n, c, h, w] on the CPU, from which `steps` DDIM steps lead to the images x with the empty prompt.

    x: latents, scaled for the network. stepped: called after each sampling step.
    """
    path, times = model.path(steps).to(model.device), model.times(steps)
    eps = seen_by(model, len(x), guidance)
    z = x.to(model.device)
    for i in reversed(range(steps)):
        (a, b), (a_s, b_s) = path[i], path[i + 1]
        z = solved(z, a / a_s, b - a * b_s / a_s, times[i].expand(len(x)).to(model.device), eps, attack)
        stepped()
    return z.cpu()


def solved(z_s: Tensor, c1: Tensor, c2: Tensor, t: Tensor, eps: Noise, attack: LatentInversion) -> Tensor:
    """z_t with z_t = c1 z_s + c2 eps(z_t, t), as near as the attack's solver comes, begun at eps(z_s, t)."""

    def right(z: Tensor) -> Tensor:
        with torch.no_grad():
            return c1 * z_s + c2 * eps(z, t)

    z = right(z_s)
    if attack.solver == "fixed-point":
        for _ in range(attack.num_steps):
            z = right(z)
        return z
    z.requires_grad_(True)
    optimizer = torch.optim.AdamW([z], lr=attack.learning_rate)
    for _ in range(attack.num_steps):
        error = (c1 * z_s + c2 * eps(z, t) - z).square().sum()
        (z.grad,) = torch.autograd.grad(error, [z])
        optimizer.step()
    return z.detach()
