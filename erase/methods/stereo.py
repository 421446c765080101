"""STEREO (Srivatsan et al., CVPR 2025): rounds of erasing and of learning words, then one anchored erasure."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod, Turn, WordAttack
from erase.methods.terms import Seen


@dataclass(frozen=True)
class Stereo(TrainedMethod):
    """Search: `words` times, some steps down L_s, then a word v_j is learned on the edited model by concept inversion.

        L_s = mean_c ||eps(x_t | c) - [eps* - eta (eps* - eps*(x_t | ""))]||^2, eps* = eps*(x_t | c)
    over the forget prompt c_f and the same prompt with each word v_1, ..., v_j found so far in place of the concept's
    own words (ESD's loss; eps* is the base). Erasure: theta <- theta*, and from there down L_e + alpha L_r,
        L_e = ||eps(x_t | c_f) - [e_0 + (s - 1)(e_a - e_0) - (s + 1) mean_j (e_j - e_0)]||^2,
        L_r = ||eps(x_t' | c_r) - eps*(x_t' | c_r)||^2,
    means over elements; e_0, e_a, e_j are the base's predictions for the empty prompt, the anchor and v_j. The words
    tell which directions lead to the concept; the weights that were edited to find them are discarded.

    The optimizer steps are divided into `words` + 1 equal parts, the last of which is the erasure (and has what is left
    over). Adam starts again with it.

    words: learned words and rounds of the search; more find more ways to the concept. The authors take 4.
    strength: s; a larger one pushes further from the words. The authors' code has 2.
    search_guidance: eta of the search. search_rate: its learning rate, as a share of the erasure's.
    alpha: weight of the retain loss; a larger one retains more and forgets less.
    word_steps, word_batch, word_lr: Adam's steps for each word, images and learning rate of each of them.

    Costs per step of the search: 2 j + 3 forward and j + 1 backward passes; of the erasure: j + 5 and 2; and for each
    word `word_steps` forward and backward passes. The text encoder stays in memory. Known weakness: attacks that use no
    words, such as fine-tuning; images of prompts close to the concept change.
    """

    _name = "stereo"

    words: int = 4
    strength: float = 2.0
    search_guidance: float = 2.0
    search_rate: float = 0.25
    alpha: float = 1.0
    word_steps: int = 3000
    word_batch: int = 1
    word_lr: float = 0.005

    def __post_init__(self) -> None:
        for name in ("words", "word_steps", "word_batch"):
            if getattr(self, name) < 1:
                raise EraseError(f"{self._name} has {name}={getattr(self, name)}; it must be at least 1")
        if not self.search_rate > 0:
            raise EraseError(f"{self._name} has search_rate={self.search_rate:g}; it must be above 0")

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    @property
    def least_steps(self) -> int:
        return self.words + 1

    @property
    def attack(self) -> WordAttack:
        return WordAttack(
            num_words=self.words,
            every=0,
            num_steps=self.word_steps,
            batch_size=self.word_batch,
            learning_rate=self.word_lr,
            restart_after=self.word_steps,
        )

    def turn(self, step: int, num_steps: int) -> Turn:
        erasure = self.words * self.attack.round_of(num_steps)
        if step < erasure:
            return Turn(remember=step == 0, rate=self.search_rate)
        return Turn(rewind=step == erasure, renew=step == erasure)

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """The search until all words are found, then the erasure."""
        x, t = batch.x_forget, batch.t_forget

        def base(c: Conditioning) -> Tensor:
            with torch.no_grad():
                return frozen(x, t, c)

        empty = base(batch.c_empty)
        if len(batch.c_words) < self.words:
            prompts = (batch.c_forget, *batch.c_words)
            concepts = [
                base(c) for c in prompts
            ]  # before the model's passes: the base may take the place of its weights
            targets = [concept - self.search_guidance * (concept - empty) for concept in concepts]
            losses = [F.mse_loss(model(x, t, c), target) for c, target in zip(prompts, targets, strict=True)]
            yield "forget", torch.stack(losses).mean()
            return
        away = torch.stack([base(c) - empty for c in batch.c_words]).mean(0)
        target = empty + (self.strength - 1) * (base(batch.c_target) - empty) - (self.strength + 1) * away
        yield "forget", torch.stack([F.mse_loss(model(x, t, c), target) for c in self._erased(batch)]).mean()
        if self.retains:
            kept = self._kept(batch)
            with torch.no_grad():
                keep = frozen(*kept)
            yield "retain", self.alpha * F.mse_loss(model(*kept), keep)

    def _erased(self, batch: Batch) -> tuple[Conditioning, ...]:
        """The prompts that the erasure trains."""
        return (batch.c_forget,)

    def _kept(self, batch: Batch) -> Seen:
        """Where the erasure's predictions stay those of the base."""
        return batch.x_retain, batch.t_retain, batch.c_retain
