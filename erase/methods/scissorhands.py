"""Scissorhands (Wu & Harandi, ECCV 2024): reset the weights that the concept depends on most, then train."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase.errors import EraseError
from erase.masks import kth_largest
from erase.methods.balance import nash, projected
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import Balance, TrainedMethod
from erase.methods.terms import denoised, relabelled

# self-attention of CompVis' output_blocks.4 and output_blocks.7, in the names of diffusers
RESET = ("up_blocks.1.attentions.1.", "up_blocks.2.attentions.1.")


@dataclass(frozen=True)
class Scissorhands(TrainedMethod):
    """Resets the weights with the largest s = |w| sum_b |grad L_s|, then minimises L = L_r - lambda L_f (classes).

    L_s = ||eps - [(1 + g) eps(x_t | c_f) - g eps(x_t | "")]||^2 over `prepare_batches` batches; s is SNIP's score (Lee
    et al., ICLR 2019). L_f = ||eps(x_t | c_f) - eps||^2, L_r = ||eps(x_t' | c_r) - eps'||^2, means over elements.
    A weight is sensitive if its s is above the `sparsity` quantile of all weights that may change. Of these, only those
    in the self-attention of two blocks (`RESET`) are reset; a scope without these blocks resets nothing. Matrices get
    random values, biases 0.
    For nudity the authors train L_r + lambda ||eps(x_t | c_f) - sg eps(x_t | c_a)||^2, with g = 0.

    sparsity: share of the weights that are not sensitive; a larger one resets fewer weights. 0.995 for nudity.
    forget_weight: lambda; a larger one forgets more and retains less.
    forgetting: "ascent" maximises the concept's diffusion loss; "relabel" trains towards the anchor's prediction.
    guidance: g of L_s; 0 for nudity.
    renewal: "normal" samples new matrices from N(0, 0.02^2), "kaiming" (for nudity) uniformly within sqrt(6 / inputs).
    balancing: "gem" removes from the forget gradient the part that would raise L_r; "nash" weighs the two gradients as
        MUNBa does; both need memory for two gradients.

    Costs per step: two forward ("relabel": three) and two backward passes, no base model. Known weakness: the ascent
    has no bound, so too many or too large steps damage all images.
    """

    formula = 2  # 1: version 0.1.0

    sparsity: float = 0.999
    forget_weight: float = 0.1
    forgetting: Literal["ascent", "relabel"] = "ascent"
    guidance: float = 7.5
    renewal: Literal["normal", "kaiming"] = "normal"
    balancing: Literal["sum", "gem", "nash"] = "sum"
    prepare_batches: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1 or self.prepare_batches < 0:
            raise EraseError(
                f"scissorhands has sparsity={self.sparsity} and prepare_batches={self.prepare_batches}; sparsity must "
                "lie in [0, 1], and prepare_batches must be 0 or more"
            )

    @property
    def anchors(self) -> bool:
        return self.forgetting == "relabel"

    @property
    def balance(self) -> Balance | None:
        return {"sum": None, "gem": projected, "nash": nash}[self.balancing]

    def prepare_loss(self, model: Predictor, batch: Batch) -> Tensor:
        x, t = batch.x_forget, batch.t_forget
        predicted = model(x, t, batch.c_forget)
        if self.guidance:
            predicted = (1 + self.guidance) * predicted - self.guidance * model(x, t, batch.c_empty)
        return F.mse_loss(predicted, batch.eps_forget)

    def prepare(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        draw: torch.Generator,
    ) -> None:
        """New values for the sensitive weights of the two blocks, in place."""
        scores = {name: gradients[name] * weights[name].abs() for name in gradients}
        total = sum(score.numel() for score in scores.values())
        num_kept = int(self.sparsity * total)
        if num_kept == total:
            return
        threshold = kth_largest(scores, total - num_kept + 1) if num_kept else -math.inf
        for name, score in scores.items():
            if ".attn1." not in name or not any(block in name for block in RESET):
                continue
            chosen, shape = score > threshold, shapes[name]
            values = torch.zeros(int(chosen.count_nonzero()))
            if len(shape) > 1 and self.renewal == "normal":
                values = 0.02 * torch.randn(len(values), generator=draw)
            elif len(shape) > 1:
                values = (2 * torch.rand(len(values), generator=draw) - 1) * math.sqrt(6 / math.prod(shape[1:]))
            weights[name][chosen] = values.to(weights[name])

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        if self.forgetting == "ascent":
            seen = model(batch.x_forget, batch.t_forget, batch.c_forget)
            yield "forget", -self.forget_weight * F.mse_loss(seen, batch.eps_forget)
        else:
            yield "forget", self.forget_weight * relabelled(model, model, batch)
        yield "retain", denoised(model, batch)
