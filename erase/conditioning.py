"""Inputs of a diffusion model other than noisy latents and a timestep."""
# pyright: strict

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Inputs of a model for n images, row by row; None for an input that the architecture does not have.

    states: text encoder states, float, [n, tokens, d]; of several encoders as the family joins them.
    pooled: pooled text states, float, [n, p] (SDXL, SD3, FLUX).
    sizes: original size, crop and target size, float, [n, 6] (SDXL).
    labels: class labels, int64, [n] (class-conditional models).
    """

    states: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    labels: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The inputs, each changed by `change`."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        return Conditioning(**{name: part if part is None else change(part) for name, part in parts.items()})

    def __len__(self) -> int:
        return next(len(part) for part in vars(self).values() if part is not None)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> "Conditioning":
        """These rows, as indexing a tensor gives them."""
        return self.each(lambda part: part[rows])

    def to(self, device: torch.device | str) -> "Conditioning":
        return self.each(lambda part: part.to(device))

    def expand(self, num: int) -> "Conditioning":
        """A single row as `num` rows, without a copy."""
        return self.each(lambda part: part.expand(num, *part.shape[1:]))

    @property
    def text_states(self) -> Tensor:
        """The text encoder states, [n, tokens, d], of a model that has them."""
        assert self.states is not None
        return self.states

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Rows of several, one after the other; all have the same inputs."""
        return Conditioning(
            **{
                item.name: None
                if (first := getattr(parts[0], item.name)) is None
                else torch.cat([first, *(getattr(part, item.name) for part in parts[1:])])
                for item in fields(Conditioning)
            }
        )
