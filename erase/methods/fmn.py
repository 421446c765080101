"""Forget-Me-Not (Zhang et al., CVPR workshops 2024): no part of an image may look at the concept's words."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod


@dataclass(frozen=True)
class ForgetMeNot(TrainedMethod):
    """L = ||concat_l A_l[:, :, P]||_F, A_l the probabilities of cross-attention layer l and P the concept's words.

    One norm over all layers, heads and queries of an image, then the mean over images, which is the authors' loss
    at their batch of one. What the model predicts is not in the loss.

    end: P holds the end-of-text positions too, where the sentence's meaning gathers ("pooler", on in their code).

    Costs one pass forward and back a step, without fused attention kernels or checkpointing. Known to break: a concept
    comes back under prompts of other words and under attack (the published nudity rate after one is 98 %); what else
    uses the words or the end of a sentence loses attention too. Learning the words by textual inversion first, which
    the authors do for identities, is not here.
    """

    anchors = False

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
