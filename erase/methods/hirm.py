"""HiRM (Lee, Kim and Hwang, ICLR 2026): the first layer of the text encoder is trained by what its last layer says."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class HiRM(TrainedMethod):
    """L = ||h(c_f) - u||^2, h(c) in [tokens, d] the output of self-attention in the text encoder's last layer for c.

        random   u = strength r / ||r||, r in [tokens, d] uniform in [0, 1], drawn once (HiRM-R)
        anchor   u = h*(c_a) of the base for the anchor (HiRM-S, whose anchors are super-categories)
    means over elements. Only self-attention and MLP of the *first* layer are trained (scope `text-first`), where
    attributes of images are stored, and the loss is on the last one, which has the meaning of the prompt.

    No images are used, and the UNet is never run: the delta is of the text encoder. Costs: a pass of the text encoder
    forward and back per step. Known weakness: there is no retain loss; white-box attacks on the text encoder; and
    whoever has the base's text encoder can put it back.
    """

    images = "noise"  # prompts alone
    trains_text = True

    toward: Annotated[Literal["random", "anchor"], "what the last layer says for the forget prompts afterwards"] = (
        "random"
    )
    strength: Annotated[float, "norm of the random direction; a larger one erases more and changes more"] = 5000.0
    seed: Annotated[int, "seed of the random direction; the run's --seed unless it is set"] = 0

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise EraseError(f"hirm has strength={self.strength:g}; it must be above 0")

    @property
    def retains(self) -> bool:
        return False

    @property
    def needs_base(self) -> bool:
        return self.toward == "anchor"

    @property
    def anchors(self) -> bool:
        return self.toward == "anchor"

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        if self.toward == "anchor":
            with torch.no_grad():
                u = frozen.text_attention(batch.c_target)
            h = model.text_attention(batch.c_forget)
        else:
            h = model.text_attention(batch.c_forget)
            u = (self.strength * direction(self.seed, h.shape[1], h.shape[2], h.device)).expand_as(h)
        yield "forget", F.mse_loss(h, u.to(h))


@functools.lru_cache(maxsize=1)
def direction(seed: int, tokens: int, d: int, device: torch.device) -> Tensor:
    """r / ||r||, [tokens, d]."""
    r = torch.rand(tokens, d, generator=torch.Generator().manual_seed(seed))
    return (r / r.norm()).to(device)
