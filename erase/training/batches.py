"""What one training step sees, drawn from the seed alone."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erase.conditioning import Conditioning
from erase.data.latents import Data, ImageLatents
from erase.families.protocol import Family
from erase.methods.inputs import Batch
from erase.training.exchanged import Exchanged


@dataclass(frozen=True)
class Recipe:
    """How the loop runs, whatever the method.

    batch_size: forget and retain images a step, each, over all processes.
    num_steps: optimizer steps; 0 leaves the model as it is.
    target: where a forget image's new words come from: "anchor" its own anchor, "random" another class's prompt drawn
        anew for every image, "fixed" the first of the other classes.
    in_order: go through the forget images in order, epoch by epoch, instead of drawing them at random.
    independent_latents: the target branch sees a second sample of the VAE's posterior, as SalUn's code does.
    accumulation: parts that a batch is cut into, to save memory; the result is the same up to rounding.
    eight_bit: Adam's moments take a byte each instead of four.
    trajectory_steps, trajectory_guidance: DDIM steps and guidance of the trajectories on which some methods train.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    accumulation: int = 1
    target: str = "anchor"
    in_order: bool = False
    independent_latents: bool = False
    seed: int = 0
    checkpoint_every: int = 50
    eight_bit: bool = False
    trajectory_steps: int = 50
    trajectory_guidance: float = 3.0


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
    teacher: Exchanged | None = None,
) -> Iterator[Batch]:
    """This process's parts of a step's batch. All is drawn for the whole batch, so n processes see what one would.

    teacher: generates a trajectory from noise to the concept; the forget latents are points on it.
    """
    draw, num = generator(recipe.seed, "train", step), recipe.batch_size
    if recipe.in_order:
        per_epoch = math.ceil(len(data.forget) / num)
        first = step % per_epoch * num
        f = torch.arange(first, first + num) % len(data.forget)
    else:
        f = torch.randint(len(data.forget), (num,), generator=draw)
    r = torch.randint(len(data.retain), (num,), generator=draw)
    t_f, t_r = (torch.randint(0, model.num_timesteps, (num,), generator=draw) for _ in range(2))
    if data.forget.t is not None:
        t_f = data.forget.t[f]
    x_f, x_r = sample(data.forget, f, draw), sample(data.retain, r, draw)
    x_p = sample(data.forget, f, draw) if recipe.independent_latents else x_f
    eps_f, eps_r = (torch.randn(x_f.shape, generator=draw) for _ in range(2))
    if recipe.target == "anchor":
        words = data.anchor[f]
    elif recipe.target == "random":
        words = data.others[torch.randint(len(data.others), (num,), generator=draw)]
    else:
        words = data.others[:1].expand(num)
    index = torch.randint(recipe.trajectory_steps, (num,), generator=draw) if teacher is not None else t_f
    for part in range(recipe.accumulation):
        start = (accelerator.process_index * recipe.accumulation + part) * share
        rows = slice(start, start + share)

        def here(tensor: Tensor, rows: slice = rows) -> Tensor:
            return tensor[rows].to(model.device)

        def told(c: Conditioning, rows: slice = rows) -> Conditioning:
            return c[rows].to(model.device)

        c_f, c_0 = told(data.text[data.forget.prompt[f]]), told(data.text[:1].expand(num))
        t, noisy, noisy_p = here(t_f), here(x_f), here(x_p)
        if teacher is not None:
            with teacher.inside():
                noisy, t = model.trajectory(
                    here(eps_f),
                    index[rows],
                    c_f,
                    data.text[:1],
                    steps=recipe.trajectory_steps,
                    guidance=recipe.trajectory_guidance,
                )
            noisy_p = noisy
        elif data.forget.t is None:
            noisy, noisy_p = (model.add_noise(x, here(eps_f), t) for x in (noisy, noisy_p))
        yield Batch(
            x_forget=noisy,
            x_target=noisy_p,
            x_retain=model.add_noise(here(x_r), here(eps_r), here(t_r)),
            t_forget=t,
            t_retain=here(t_r),
            eps_forget=here(eps_f),
            eps_retain=here(eps_r),
            c_forget=c_f,
            c_target=told(data.text[words]),
            c_retain=told(data.text[data.retain.prompt[r]]),
            c_empty=c_0,
            words=here(data.words[f]),
            end=here(data.end[f]),
        )


def sample(images: ImageLatents, rows: Tensor, draw: torch.Generator) -> Tensor:
    """Latents of these rows from the VAE's posterior."""
    mean = images.mean[rows]
    return mean + images.std[rows] * torch.randn(mean.shape, generator=draw)
