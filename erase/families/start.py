"""What images begin with, made before it is needed, and a denoising loop that does not wait for the GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor

from erase.conditioning import Conditioning
from erase.guards import Guard


@dataclass(frozen=True)
class Request:
    """Images that are generated together.

    seeds: one for each image; () where the noise is given. height, width: in pixels. is_guided: whether each step also
        needs the unconditional prediction. guard: that acts on them.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    height: int
    width: int
    is_guided: bool
    guard: Guard | None

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        seeds: Sequence[int],
        guidance: float,
        size: int | tuple[int, int],
        guard: Guard | None,
    ) -> Self:
        """From the arguments of `Family.draw`."""
        height, width = (size, size) if isinstance(size, int) else size
        return cls(tuple(prompts), tuple(seeds), height, width, guidance > 1, guard)


@dataclass(frozen=True, eq=False)
class Start:
    """What the images of a request begin with, on the model's device.

    noise: [n, c, h, w]. generators: one for each image, after its noise, for samplers that add noise in each step.
    c: of the prompts. empty: of the unconditional branch, with as many rows; None without guidance.
    c_s: of the guard's text, one row; None without a guard.
    """

    request: Request
    noise: Tensor
    generators: list[torch.Generator]
    c: Conditioning
    empty: Conditioning | None
    c_s: Conditioning | None

    def text(self) -> dict[str, Tensor]:
        """Text states as arguments of a pipeline."""
        named: dict[str, Tensor | None] = {"prompt_embeds": self.c.states, "pooled_prompt_embeds": self.c.pooled}
        if self.empty is not None:
            named |= {"negative_prompt_embeds": self.empty.states, "negative_pooled_prompt_embeds": self.empty.pooled}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@contextmanager
def stepping_on_host(scheduler: Any) -> Iterator[None]:
    """Inside, the scheduler's timesteps are on the CPU, whatever device a pipeline asks for.

    Schedulers look up numbers by the timestep, for which the host would wait if it were on a GPU.
    """
    plain = scheduler.set_timesteps

    @wraps(plain)
    def set_timesteps(*arguments: Any, device: Any = None, **more: Any) -> None:
        plain(*arguments, **more)

    own = vars(scheduler).get("set_timesteps")
    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
        if own is not None:
            scheduler.set_timesteps = own
