"""AdvUnlearn (Zhang et al., NeurIPS 2024): the text encoder is trained against prompts that attack it in each step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import PrefixAttack, TrainedMethod


@dataclass(frozen=True)
class AdvUnlearn(TrainedMethod):
    """L = ||eps(x_t | a c_f) - [e_0 - eta (e_f - e_0)]||^2 + alpha ||eps(x_t' | c_r) - eps*(x_t' | c_r)||^2,

    means over elements; e_0 and e_f are the base's predictions for the empty and the forget prompt (ESD's target), and
    x_t is a point on a new trajectory of the edited model in each step. a is the embedding of one token before the
    prompt, learned anew in each step on this x_t, after a warm-up without it:
        a = argmin ||eps(x_t | a c_f) - eps*(x_t | c_f)||^2,
    by `attack_steps` steps of Adam from the embedding of a random token.

    guidance: eta, how far to push away from the concept. alpha: weight of the retain loss.
    warm_up: steps before the first attack. attack_steps, attack_lr: of Adam, in units of the token embeddings; more
    steps find stronger prompts and cost more. fast: Adam sees the sign of the gradient (the authors' `fast_at`).

    The authors train the text encoder (scope `text`); any other scope works too. In their code each step of the attack
    has a new trajectory, which makes up most of its 20 hours.

    Costs: a trajectory of up to 50 double passes, 4 forward and 2 backward passes per step, and 1 + 1 for each step of
    the attack. Known weakness: learned words and attacks on the UNet, which never changes with scope `text`.
    """

    anchors = False
    images = "noise"

    guidance: float = 1.0
    alpha: float = 0.3
    warm_up: int = 200
    attack_steps: int = 30
    attack_lr: float = 1e-3
    fast: bool = False

    def __post_init__(self) -> None:
        if self.warm_up < 0 or self.attack_steps < 0 or not self.attack_lr > 0:
            raise EraseError(
                f"advunlearn has warm_up={self.warm_up}, attack_steps={self.attack_steps} and attack_lr="
                f"{self.attack_lr:g}; the first two must be 0 or more, the last one above 0"
            )

    @property
    def needs_base(self) -> bool:
        return True

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    @property
    def follows(self) -> str:
        return "edited"

    @property
    def least_steps(self) -> int:
        return self.warm_up + 1

    @property
    def prefix(self) -> PrefixAttack | None:
        if self.attack_steps == 0:
            return None
        return PrefixAttack(self.warm_up, self.attack_steps, self.attack_lr, self.fast)

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        x, t = batch.x_forget, batch.t_forget
        with torch.no_grad():
            both = frozen(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([batch.c_forget, batch.c_empty]))
            e_f, e_0 = both.chunk(2)
        c = batch.c_words[0] if batch.c_words else batch.c_forget
        yield "forget", F.mse_loss(model(x, t, c), e_0 - self.guidance * (e_f - e_0))
        if self.retains:
            with torch.no_grad():
                keep = frozen(batch.x_retain, batch.t_retain, batch.c_retain)
            yield "retain", self.alpha * F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), keep)
