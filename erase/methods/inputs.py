"""What methods see of a model, of images and of words: plain tensors, whatever made them."""
# pyright: strict

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from erase.conditioning import Conditioning

Tokens = Literal["last", "tail", "all"]


class Predictor(Protocol):
    """The noise that a model sees in `x` at step `t` under the text: all methods call models in this way.

    x: noisy latents, [n, c, h, w]. t: int64, [n]. c: text states and the model's other inputs, n rows.
    """

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor: ...

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        """Probabilities of every cross-attention layer, [n * heads, queries, tokens] each."""
        ...


@dataclass(frozen=True)
class Batch:
    """What one step sees, forget and retain alike: noisy latents at `t`, and text states.

    x_forget: latents of the concept (or of its anchor, as the method asks) noised at `t_forget`, or a point on the
        frozen model's own trajectory from noise to the concept.
    x_target: the forget latents again, as the target branch sees them; the reference draws a second sample of the
        VAE's posterior, so that it is not quite `x_forget`.
    c_target: what to say instead: the anchor's text (prompt remapping) or another class's (random label).
    c_empty: what guidance starts from (in Stable Diffusion the empty prompt), one for each forget row.
    words: bool, [n, tokens], where the concept's own words stand in the forget prompt.
    end: bool, [n, tokens], where the forget prompt is over: its end token and the padding.
    c_words: the forget prompts with a learned word in place of the concept's own, if the method has an `attack`.
    """

    x_forget: Tensor
    x_target: Tensor
    x_retain: Tensor
    t_forget: Tensor
    t_retain: Tensor
    eps_forget: Tensor
    eps_retain: Tensor
    c_forget: Conditioning
    c_target: Conditioning
    c_retain: Conditioning
    c_empty: Conditioning
    words: Tensor
    end: Tensor
    c_words: Conditioning | None = None


@dataclass(frozen=True)
class Text:
    """A concept in text encoder states, float32, [prompts, tokens, d]: all that closed forms see.

    forget, anchor: row by row what to forget and what to say instead. retain: prompts to keep. empty: one row.
    forget_at, anchor_at: int64, [prompts], the last token of what distinguishes the two prompts, or the last word;
        0, the start token, of an empty prompt.
    retain_at: int64, [prompts], the last word.
    """

    forget: Tensor
    anchor: Tensor
    retain: Tensor
    empty: Tensor
    forget_at: Tensor
    anchor_at: Tensor
    retain_at: Tensor

    def pairs(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Embeddings to redirect and where to, as columns: float64, [d, n] each.

        tokens: "last" the last own token of each prompt, "tail" that one and all behind it (a causal text encoder
        says the whole sentence again in each), "all" every token but the start, place by place.
        """
        forget: list[Tensor] = []
        anchor: list[Tensor] = []
        num = self.forget.shape[1]
        for c_e, c_a, i, j in zip(self.forget, self.anchor, _ints(self.forget_at), _ints(self.anchor_at), strict=True):
            if tokens == "all":
                i = j = 1
            length = 1 if tokens == "last" else num - max(i, j)
            forget.append(c_e[i : i + length])
            anchor.append(c_a[j : j + length])
        return torch.cat(forget).double().T, torch.cat(anchor).double().T

    def kept(self, tokens: Tokens) -> Tensor:
        """Embeddings to keep, as columns: float64, [d, n]; with "all" the start token too, as often as it occurs."""
        start = {"last": self.retain_at, "tail": self.retain_at, "all": torch.zeros_like(self.retain_at)}[tokens]
        stop = start + 1 if tokens == "last" else torch.full_like(start, self.retain.shape[1])
        found = [c[i:j] for c, i, j in zip(self.retain, _ints(start), _ints(stop), strict=True)]
        return torch.cat([self.empty[0, :0], *found]).double().T


def _ints(values: Tensor) -> list[int]:
    return cast(list[int], values.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's is untyped
