"""Robust SalUn: relabelling against words that are learned on the edited model while it is trained."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod, WordAttack
from erase.methods.terms import several


@dataclass(frozen=True)
class Robust(TrainedMethod):
    """L = ||eps(x_t | c_f) - y||^2 + beta ||eps(x_t | c_v) - y||^2 + alpha ||eps(x_t' | c_r) - eps*(x_t' | c_r)||^2.

    y = sg eps*(x_t | c_a), eps* is the base, all terms are means over elements. c_v is the forget prompt with a learned
    word v in place of the concept's own words ("a photo of a circle" becomes "a photo of a v"). After a step v descends
    the diffusion loss of the edited model on the base's images of the concept, E ||eps - eps(x_t | c_v)||^2, by Adam:
    concept inversion (Pham et al., ICLR 2024), which the next steps of the model then have to defeat.

    The loss and the mask are SalUn's (Fan et al., ICLR 2024). Training against learned prompts is AdvUnlearn's (Zhang
    et al., NeurIPS 2024), who attack the text encoder anew in each step; rounds of learned words are STEREO's
    (Srivatsan et al., CVPR 2025). Here a few words persist, one of them is attacked at a time, and only the masked
    weights of the network are trained. The combination and its defaults are this project's; no results of it are
    published yet.

    alpha: weight of the retain loss; a larger one retains more and forgets less.
    beta: weight of the learned words' term; 0 learns no words.
    words: number of learned words, which are trained in turn. Half of them start from the mean of all tokens, the
        others from one of the forget prompts' own tokens.
    attack_every: training steps between two attacks; more is cheaper, and the words lag behind the model.
    attack_steps: Adam steps of the word in each attack.
    attack_batch: images of each of these steps.
    attack_lr: their learning rate, in units of the token embeddings.
    restart_after: Adam steps after which a word starts again; many make a word stronger, few find more different words.

    Costs five passes forward and three back a step, and for each Adam step of a word one more of each over
    `attack_batch` images; the text encoder stays in memory. Known weakness: other attacks than learned words, such as
    fine-tuning, work; and images of unrelated prompts change more than without words.
    """

    alpha: float = 5.0
    beta: float = 1.0
    words: int = 4
    attack_every: int = 1
    attack_steps: int = 1
    attack_batch: int = 8
    attack_lr: float = 0.01
    restart_after: int = 60

    def __post_init__(self) -> None:
        for name in ("words", "attack_every", "attack_steps", "attack_batch", "restart_after"):
            if getattr(self, name) < 1:
                raise EraseError(f"salun-robust has {name}={getattr(self, name)}; it must be at least 1")

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    @property
    def attack(self) -> WordAttack | None:
        if self.beta == 0:
            return None
        return WordAttack(
            num_words=self.words,
            every=self.attack_every,
            num_steps=self.attack_steps,
            batch_size=self.attack_batch,
            learning_rate=self.attack_lr,
            restart_after=self.restart_after,
        )

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        x, t = batch.x_forget, batch.t_forget
        with torch.no_grad():
            y = frozen(batch.x_target, t, batch.c_target)
        yield "forget", F.mse_loss(model(x, t, batch.c_forget), y)
        for c in batch.c_words:
            yield "words", self.beta * F.mse_loss(model(x, t, c), y)
        if self.retains:
            with torch.no_grad():
                keep = frozen(batch.x_retain, batch.t_retain, batch.c_retain)
            yield "retain", self.alpha * F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), keep)

    def together(self, model: Predictor, frozen: Predictor, batch: Batch) -> dict[str, Tensor]:
        """All terms with one pass of the model and one of the base."""
        x, t = batch.x_forget, batch.t_forget
        retain = batch.x_retain, batch.t_retain, batch.c_retain
        with torch.no_grad():
            y, keep = several(frozen, (batch.x_target, t, batch.c_target), retain)
        seen = [(x, t, batch.c_forget), retain, *((x, t, c) for c in batch.c_words)]
        answer, kept, *of_words = several(model, *seen)
        terms = {"forget": F.mse_loss(answer, y), "retain": self.alpha * F.mse_loss(kept, keep)}
        if of_words:
            terms["words"] = self.beta * F.mse_loss(of_words[0], y)
        return terms
