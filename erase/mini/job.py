"""One training of the embedded model: its stages, its budget, and what every stage receives."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from erase.mini import judge, world

STAGES = ("judge", "vae", "unet", "decoder")


@dataclass(frozen=True)
class Budget:
    """Steps and batch sizes of each stage. The defaults made the weights that ship.

    unet_cycles: steps, learning rate and gamma of each cycle of the UNet's training. A cycle starts from the averaged
        weights of the previous one. Gamma limits the loss weight of low noise levels (min-SNR-gamma): with 5 the UNet
        learns shapes; with 1 it trains more on high noise levels, where only the prompt determines the colour. The
        first cycle alone reached 84 % of colours. (Whitening the latents over their channels made it worse: the colour
        is then visible through the noise even at the last timestep, and the UNet ignores the prompt.)
    """

    judge_steps: int = 1500
    judge_batch: int = 64
    vae_steps: int = 5000
    vae_batch: int = 8
    decoder_steps: int = 5000
    decoder_batch: int = 8
    num_latents: int = 24_000
    unet_batch: int = 32
    unet_cycles: tuple[tuple[int, float, float], ...] = ((7000, 1e-3, 5.0), (3000, 6e-4, 1.0), (1500, 4e-4, 1.0))


@dataclass(frozen=True)
class Job:
    """What every stage receives.

    work: folder for checkpoints and finished stages.
    without: object, colour, style or "nude" that the UNet's data never shows.
    """

    work: Path
    seed: int
    budget: Budget
    device: torch.device
    without: str | None
    quiet: bool

    def rng(self, stage: str, step: int) -> np.random.Generator:
        """The random numbers of one step of a stage."""
        return np.random.default_rng([self.seed, STAGES.index(stage), step])


def drawings(rng: np.random.Generator, num: int, without: str | None = None) -> tuple[list[world.Scene], Tensor]:
    """Random scenes and their images, [num, 3, 64, 64] in [-1, 1]."""
    scenes = [world.sample_scene(rng, without) for _ in range(num)]
    return scenes, judge.to_tensor(world.draw(scene, rng) for scene in scenes)
