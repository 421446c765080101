"""What one training step sees, drawn from the seed alone."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.conditioning import Conditioning
from erase.data.latents import Data, ImageLatents
from erase.device import staged
from erase.families.protocol import Family
from erase.methods.inputs import Batch

Walker = Callable[[], AbstractContextManager[Family]]


@dataclass(frozen=True)
class Recipe:
    """How the loop runs, whatever the method.

    batch_size: forget and retain images a step, each, over all processes.
    num_steps: optimizer steps; 0 leaves the model as it is.
    schedule: of the learning rate: "constant", or "cosine", which falls to zero over the steps.
    target: where a forget image's new words come from: "anchor" its own anchor, "random" another class's prompt drawn
        anew for every image, "fixed" the first of the other classes.
    in_order: go through the forget images in order, epoch by epoch, instead of drawing them at random; the last batch
        of an epoch is short if the images do not fill it.
    retain_order: the order of the retain images: each batch drawn at "random", "shuffled" in each epoch of the forget
        images, or "in_order"; in the last two the last batch wraps.
    independent_latents: the target branch sees a second sample of the VAE's posterior, as SalUn's code does.
    proportion_empty: share of the retain rows, each drawn at random, whose inputs are those that guidance starts from
        (in Stable Diffusion the empty prompt's), in [0, 1].
    anchor_every: in every such step, as many images of the anchor prompts are retain rows too; 0 for none.
    accumulation: parts that a batch is cut into, to save memory; the result is the same up to rounding.
    eight_bit: Adam's moments take a byte each instead of four.
    dual: the forget and the retain gradient have moments of their own (`optim.DualAdam`).
    trajectory_steps, trajectory_guidance: DDIM steps and guidance of the trajectories on which some methods train.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    accumulation: int = 1
    target: str = "anchor"
    in_order: bool = False
    retain_order: Literal["random", "shuffled", "in_order"] = "random"
    independent_latents: bool = False
    proportion_empty: float = 0.0
    anchor_every: int = 0
    seed: int = 0
    checkpoint_every: int = 50
    eight_bit: bool = False
    dual: bool = False
    trajectory_steps: int = 50
    trajectory_guidance: float = 3.0

    def learning_rate_at(self, step: int) -> float:
        """Of this step, counted from 0. Cosine: lr (1 + cos(pi step / num_steps)) / 2, as in diffusers."""
        falls = self.schedule == "cosine"
        return self.learning_rate * (0.5 * (1 + math.cos(math.pi * step / self.num_steps)) if falls else 1)


def generator(seed: int, *what: Any) -> torch.Generator:
    """A CPU generator that is a pure function of the seed and of what is drawn, so that no state needs saving."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def batches(
    model: Family,
    data: Data,
    recipe: Recipe,
    step: Any,
    share: int,
    accelerator: Accelerator,
    walker: Walker | None = None,
    said: Callable[[Tensor], Sequence[Conditioning]] | None = None,
    prefixed: Callable[[Batch, Tensor, slice], tuple[Conditioning, ...]] | None = None,
) -> Iterator[Batch]:
    """This process's parts of a step's batch. All is drawn for the whole batch, so n processes see what one would.

    walker: gives, inside a context, the model that generates a trajectory from noise to the concept, on which the
        forget latents are; None if there is none.
    said: gives `Batch.c_words` of these forget images; None if there are none. prefixed: gives them of a part of the
        batch, with the forget images of all of it and the part's place there.
    """
    draw, num = generator(recipe.seed, "train", step), recipe.batch_size
    f, r = _rows(data, recipe, step, draw)
    t_f, t_r = (torch.randint(0, model.num_timesteps, (num,), generator=draw) for _ in range(2))
    t_f = t_f[: len(f)]
    if data.forget.t is not None:
        t_f = data.forget.t[f]
    x_f, x_r = sample(data.forget, f, draw), sample(data.retain, r, draw)
    x_p = sample(data.forget, f, draw) if recipe.independent_latents else x_f
    eps_f, eps_r = (torch.randn(x.shape, generator=draw) for x in (x_f, x_r))
    if recipe.target == "anchor":
        words = data.anchor[f]
    elif recipe.target == "random":
        words = data.others[torch.randint(len(data.others), (len(f),), generator=draw)]
    else:
        words = data.others[:1].expand(len(f))
    index = torch.randint(recipe.trajectory_steps, (len(f),), generator=draw) if walker is not None else t_f
    c_r = _retain_text(data, recipe, step, r)
    if recipe.anchor_every and not isinstance(step, tuple) and (step + 1) % recipe.anchor_every == 0:
        x_a, eps_a, t_a, c_a = _anchor_rows(data, recipe, step, model.num_timesteps)
        x_r, eps_r, t_r = torch.cat([x_r, x_a]), torch.cat([eps_r, eps_a]), torch.cat([t_r, t_a])
        c_r = Conditioning.cat([c_r, c_a])
    num_parts = num // share

    def on_device(tensor: Tensor) -> Tensor:
        return staged(tensor, model.device)

    for part in range(accelerator.process_index * recipe.accumulation, num_parts)[: recipe.accumulation]:
        rows, kept = (slice(part * n // num_parts, (part + 1) * n // num_parts) for n in (len(f), len(x_r)))

        def here(tensor: Tensor, rows: slice = rows) -> Tensor:
            return on_device(tensor[rows])

        def told(c: Conditioning, rows: slice = rows) -> Conditioning:
            return c[rows].each(on_device)

        c_f, c_0 = told(data.text[data.forget.prompt[f]]), told(data.unconditional.expand(len(f)))
        t, noisy, noisy_p = here(t_f), here(x_f), here(x_p)
        if walker is not None:
            with walker() as follows:
                noisy, t = follows.trajectory(
                    here(eps_f),
                    index[rows],
                    c_f,
                    data.unconditional,
                    steps=recipe.trajectory_steps,
                    guidance=recipe.trajectory_guidance,
                )
            noisy_p = noisy
        elif data.forget.t is None:
            noisy, noisy_p = (model.add_noise(x, here(eps_f), t) for x in (noisy, noisy_p))
        batch = Batch(
            x_forget=noisy,
            x_target=noisy_p,
            x_retain=model.add_noise(here(x_r, kept), here(eps_r, kept), here(t_r, kept)),
            t_forget=t,
            t_retain=here(t_r, kept),
            eps_forget=here(eps_f),
            eps_retain=here(eps_r, kept),
            c_forget=c_f,
            c_target=told(data.text[words]),
            c_retain=told(c_r, kept),
            c_empty=c_0,
            words=here(data.words[f]),
            end=here(data.end[f]),
            c_words=() if said is None else tuple(said(f[rows])),
        )
        yield batch if prefixed is None else replace(batch, c_words=prefixed(batch, f, rows))


def _rows(data: Data, recipe: Recipe, step: Any, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The forget and the retain images of a step."""
    num, number = recipe.batch_size, step[1] if isinstance(step, tuple) else step
    epoch, place = divmod(number, math.ceil(len(data.forget) / num))
    if recipe.in_order:
        f = torch.arange(place * num, min((place + 1) * num, len(data.forget)))
    else:
        f = torch.randint(len(data.forget), (num,), generator=draw)
    if recipe.retain_order == "random":
        return f, torch.randint(len(data.retain), (num,), generator=draw)
    r = torch.arange(place * num, (place + 1) * num) % len(data.retain)
    if recipe.retain_order == "shuffled":
        r = torch.randperm(len(data.retain), generator=generator(recipe.seed, "retain order", epoch))[r]
    return f, r


def _retain_text(data: Data, recipe: Recipe, step: Any, r: Tensor) -> Conditioning:
    """Of the retain rows: their own prompts', or for a share of them what guidance starts from."""
    c = data.text[data.retain.prompt[r]]
    if not recipe.proportion_empty:
        return c
    is_empty = torch.rand(len(r), generator=generator(recipe.seed, "empty prompts", step)) < recipe.proportion_empty
    return Conditioning.cat([c, data.unconditional])[torch.arange(len(r)).masked_fill(is_empty, len(r))]


def _anchor_rows(
    data: Data, recipe: Recipe, step: int, num_timesteps: int
) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    """Latents, noise, timesteps and text of a batch of images of the anchor prompts."""
    images, num, draw = data.anchor_images, recipe.batch_size, generator(recipe.seed, "anchor rows", step)
    assert images is not None
    a, t = (torch.randint(end, (num,), generator=draw) for end in (len(images), num_timesteps))
    x = sample(images, a, draw)
    return x, torch.randn(x.shape, generator=draw), t, data.text[images.prompt[a]]


def sample(images: ImageLatents, rows: Tensor, draw: torch.Generator) -> Tensor:
    """Latents of these rows from the VAE's posterior."""
    mean = images.mean[rows]
    return mean + images.std[rows] * torch.randn(mean.shape, generator=draw)
