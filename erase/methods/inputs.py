"""The inputs of methods: predictions of a model, batches of noised latents, and text states, as plain tensors."""
# pyright: strict

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from erase.conditioning import Conditioning

Tokens = Literal["last", "tail", "all", "end"]


class Predictor(Protocol):
    """The noise that a model predicts in `x` at timestep `t` for the text. All methods call models in this way.

    x: noisy latents, [n, c, h, w]. t: int64, [n]. c: text states and the model's other inputs, n rows.
    """

    def __call__(self, x: Tensor, t: Tensor, c: Conditioning) -> Tensor: ...

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        """Probabilities of every cross-attention layer, [n * heads, queries, tokens] each."""
        ...

    def text_attention(self, c: Conditioning) -> Tensor:
        """Output of self-attention in the text encoder's last layer, [n, tokens, d], where that is trained."""
        ...


@dataclass(frozen=True)
class Batch:
    """The inputs of one training step: noisy latents at `t`, and text states, for the forget and the retain branch.

    x_forget: latents of the concept (or of its anchor, depending on the method) noised at `t_forget`, or a point on the
        frozen model's own trajectory from noise to the concept.
    x_target: the forget latents for the target branch; the recipe `reference` takes a second sample of the VAE's
        posterior, so that it differs slightly from `x_forget`.
    c_target: text that replaces the forget prompt: the anchor (prompt remapping) or another class (random label).
    c_empty: the unconditional input of guidance (in Stable Diffusion the empty prompt), one for each forget row.
    words: bool, [n, tokens], true at the concept's own tokens in the forget prompt.
    end: bool, [n, tokens], true at the end token of the forget prompt and at the padding.
    c_words: the forget prompts with a learned word instead of the concept's own, for each of the words that the
        `attack` of the method gives, or behind a learned embedding, if it has a `prefix`; empty if it has none.
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
    c_words: tuple[Conditioning, ...] = ()


@dataclass(frozen=True)
class Text:
    """A concept in text encoder states, float32, [prompts, tokens, d]: all that closed forms see.

    forget, anchor: forget prompts and, row by row, their anchors. retain: retain prompts. empty: one row.
    runs: (begin, first, stop) of each part of the states that a text encoder of its own made: its places, and that of a
        prompt's first token, which is behind `begin` where the encoder has a start token.
    forget_at, anchor_at: int64, [prompts, runs], the last token of what distinguishes the two prompts, or the last
        word; where the run begins, for an empty prompt.
    retain_at: int64, [prompts, runs], the last word.
    forget_end, anchor_end, retain_end: int64, [prompts, runs], the first end token.
    """

    forget: Tensor
    anchor: Tensor
    retain: Tensor
    empty: Tensor
    forget_at: Tensor
    anchor_at: Tensor
    retain_at: Tensor
    runs: tuple[tuple[int, int, int], ...]
    forget_end: Tensor
    anchor_end: Tensor
    retain_end: Tensor

    def pairs(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Embeddings to redirect and where to, as columns: float64, [d, n] each.

        tokens: "last" the last own token of each prompt, "tail" that one and all behind it (a causal text encoder
        says the whole sentence again in each), "all" every token but the start, place by place, "end" the first end
        token alone, which sums up the sentence.
        """
        forget: list[Tensor] = []
        anchor: list[Tensor] = []
        at = (self.forget_end, self.anchor_end) if tokens == "end" else (self.forget_at, self.anchor_at)
        rows = zip(self.forget, self.anchor, *map(_ints, at), strict=True)
        for c_e, c_a, ends_e, ends_a in rows:
            for (_, first, stop), i, j in zip(self.runs, ends_e, ends_a, strict=True):
                if tokens == "all":
                    i = j = first
                length = 1 if tokens in {"last", "end"} else stop - max(i, j)
                forget.append(c_e[i : i + length])
                anchor.append(c_a[j : j + length])
        return torch.cat(forget).double().T, torch.cat(anchor).double().T

    def kept(self, tokens: Tokens) -> Tensor:
        """Embeddings to keep, as columns: float64, [d, n]; with "all" the start token too, as often as it occurs."""
        found = [self.empty[0, :0]]
        at = self.retain_end if tokens == "end" else self.retain_at
        for c, ends in zip(self.retain, _ints(at), strict=True):
            for (begin, _, stop), last in zip(self.runs, ends, strict=True):
                i, j = {"tail": (last, stop), "all": (begin, stop)}.get(tokens, (last, last + 1))
                found.append(c[i:j])
        return torch.cat(found).double().T


def _ints(values: Tensor) -> list[list[int]]:
    return cast(list[list[int]], values.tolist())  # pyright: ignore[reportUnknownMemberType] - torch's is untyped
