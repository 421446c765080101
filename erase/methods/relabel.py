"""SalUn's loss for diffusion models (Fan et al., ICLR 2024): the forget prompt gets another prompt's prediction."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.errors import EraseError
from erase.methods.balance import conflicting, hamu, nash
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import Balance, TrainedMethod
from erase.methods.terms import relabelled, several


@dataclass(frozen=True)
class Relabel(TrainedMethod):
    """L = ||eps(x_t | c_f) - sg eps_target(x_t | c')||^2 + alpha ||eps(x_t' | c_r) - target_r||^2, means over elements.

    c' is the prompt that replaces the forget prompt c_f: its anchor, or a prompt of another class.

    alpha: weight of the retain loss; a larger one retains more and forgets less.
    frozen_target: eps_target is the base model; otherwise the model in training.
    distill_retain: target_r is the base's prediction; otherwise the added noise (the diffusion loss).
    balancing: how the two gradients are put together; all but "sum" ignore alpha and need memory for both gradients.
        "nash" weighs them as MUNBa does. "conflict" has the retain gradient only where it opposes the forget gradient,
        as far as it does (AEGIS). "hamu" takes the step that lowers the retain loss most and still forgets enough.
    forget_share: of "hamu": the share of a plain step's forgetting that is enough, in (0, 1]; a larger one forgets more
        and retains less.

    Costs per step: four forward and two backward passes. Known weakness: with one retain prompt, as in the paper,
    little else is retained; learned embeddings and adversarial prompts bring the concept back.
    """

    alpha: float = 1.0
    frozen_target: bool = True
    distill_retain: bool = True
    balancing: Literal["sum", "nash", "conflict", "hamu"] = "sum"
    forget_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.forget_share <= 1:
            raise EraseError(f"forget_share is {self.forget_share:g}; it must be above 0 and at most 1")
        if self.forget_share != 0.5 and self.balancing != "hamu":
            raise EraseError("forget_share is for balancing=hamu; add it, or leave forget_share out")

    @property
    def needs_base(self) -> bool:
        return self.frozen_target or self.distill_retain

    @property
    def retains(self) -> bool:
        return self.alpha > 0

    @property
    def balance(self) -> Balance | None:
        if not self.retains:
            return None
        rules = {"sum": None, "nash": nash, "conflict": conflicting, "hamu": partial(hamu, share=self.forget_share)}
        return rules[self.balancing]

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """The two terms "forget" and "retain", already weighted; training minimises their sum.

        Each may be backpropagated before the next is computed, so that only one graph is in memory.
        """
        yield "forget", relabelled(model, frozen if self.frozen_target else model, batch)
        if not self.retains:
            return
        keep = batch.eps_retain
        if self.distill_retain:
            with torch.no_grad():
                keep = frozen(batch.x_retain, batch.t_retain, batch.c_retain)
        yield "retain", self.alpha * F.mse_loss(model(batch.x_retain, batch.t_retain, batch.c_retain), keep)

    def together(self, model: Predictor, frozen: Predictor, batch: Batch) -> dict[str, Tensor]:
        """Both terms with one pass of the model, and one of the base if both targets are its own."""
        retain = batch.x_retain, batch.t_retain, batch.c_retain
        target = batch.x_target, batch.t_forget, batch.c_target
        keep = batch.eps_retain
        with torch.no_grad():
            if self.frozen_target and self.distill_retain:
                wanted, keep = several(frozen, target, retain)
            else:
                wanted = (frozen if self.frozen_target else model)(*target)
                keep = frozen(*retain) if self.distill_retain else keep
        answer, kept = several(model, (batch.x_forget, batch.t_forget, batch.c_forget), retain)
        return {"forget": F.mse_loss(answer, wanted), "retain": self.alpha * F.mse_loss(kept, keep)}
