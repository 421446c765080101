"""Forget-Me-Not (Zhang et al., CVPR workshops 2024): minimises the attention to the concept's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class ForgetMeNot(TrainedMethod):
    """L = ||concat_l A_l[:, :, P]||_F, A_l the probabilities of cross-attention layer l and P the concept's tokens.

    One norm over all layers, heads and queries of an image, then the mean over images, which equals the authors' loss
    for their batch size of 1. The model's prediction is not part of the loss.

    end: P includes the end-of-text tokens, which encode the whole sentence ("pooler", used in their code).

    Costs per step: one forward and one backward pass, without fused attention kernels or checkpointing. Known weakness:
    the concept comes back for synonyms and under attack (the published nudity rate under an attack is 98 %); other
    prompts with the same words or end tokens lose attention too. The authors first learn the words of identities by
    textual inversion, which is not implemented here.
    """

    anchors = False
    attends = True

    end: bool = True

    @property
    def retains(self) -> bool:
        return False

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        where = (batch.words | batch.end) if self.end else batch.words
        squares = torch.zeros(len(where), device=where.device)
        for attention in model.attention(batch.x_forget, batch.t_forget, batch.c_forget):
            of_image = attention.float().unflatten(0, (len(where), -1))  # [n, heads, queries, tokens]
            squares = squares + (of_image.square() * where[:, None, None, :]).sum((1, 2, 3))
        yield "forget", squares.sqrt().mean()
