"""Embeddings before the forget prompts, learned on the latents of the step that trains against them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from erase.conditioning import Conditioning
from erase.data.latents import Data
from erase.device import staged
from erase.families.protocol import Family
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import PrefixAttack
from erase.training.batches import generator
from erase.training.words import adam_step

Attacked = Callable[[Batch, Tensor, slice], tuple[Conditioning, ...]]


@dataclass(frozen=True)
class Prefixes:
    """An embedding a before each forget prompt c with ||eps(x_t | a c) - eps*(x_t | c)||^2 small: AdvUnlearn's attack.

    Each row has its own a, and nothing of it is kept for the next step, so a batch in parts gives what the whole gives.

    base: predicts eps*, as it is called by methods.
    """

    model: Family
    attack: PrefixAttack
    data: Data
    seed: int
    base: Predictor
    accelerator: Accelerator

    def of_step(self, step: int) -> Attacked | None:
        """What `batches` asks for `Batch.c_words`; None during the warm-up."""
        return None if step < self.attack.warm_up else lambda batch, rows, part: self._attacked(batch, rows, part, step)

    def _attacked(self, batch: Batch, rows: Tensor, part: slice, step: int) -> tuple[Conditioning, ...]:
        """The forget prompts behind their learned embeddings. rows: forget images of the whole batch, on the CPU."""
        model, attack, table = self.model, self.attack, self.model.token_embeddings.detach()
        starts = torch.randint(len(table), (len(rows),), generator=generator(self.seed, "prefix", step))[part]
        texts = [model.tokens(self.data.prompts[row]) for row in self.data.forget.prompt[rows[part]].tolist()]
        tokens = [[0, *text[: model.max_tokens - 3]] for text in texts]  # 0 gives way to the embedding
        a = table[staged(starts, table.device)][:, None].float()
        m = v = torch.zeros_like(a)
        with torch.no_grad(), self.accelerator.autocast():
            y = self.base(batch.x_forget, batch.t_forget, batch.c_forget)
        for number in range(1, attack.num_steps + 1):
            a.requires_grad_(True)
            with torch.enable_grad():
                c = model.encode_tokens(tokens, a)
                with self.accelerator.autocast():
                    loss = F.mse_loss(model(batch.x_forget, batch.t_forget, c), y) * len(y)
                (gradient,) = torch.autograd.grad(loss, [a])
            gradient = gradient.sign() if attack.signed else gradient
            a, m, v = adam_step(a.detach(), m, v, gradient, number, attack.learning_rate)
        with torch.no_grad():
            return (model.encode_tokens(tokens, a),)
