"""EraseDiff (Wu et al., 2024): keep as the aim, forgetting as its constraint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from erase.methods.balance import barrier, nash
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod
from erase.methods.terms import denoised, relabelled


@dataclass(frozen=True)
class EraseDiff(TrainedMethod):
    """Steps along grad L_r + lambda grad q, q = L_f(theta) - sg L_f(theta^K), where
        L_f = ||eps(x_t | c_f) - sg eps(x_t | c_a)||^2, L_r = ||eps(x_t' | c_r) - eps'||^2, means over elements.

    theta^K, theta after K inner steps down L_f, enters q as a constant only: grad q = grad L_f, whatever the inner loop
    finds. It changes no weight and is not run here; the published code spends K epochs on it.

    forget_weight: lambda under "sum".
    balancing: "bome" takes lambda = max(0, eta - <g_r, g_f> / ||g_f||^2) (Liu et al., NeurIPS 2022), "nash" the weights
        of MUNBa; both take memory for two gradients.
    eta: of "bome", the rate at which L_f must fall, in units of ||g_f||^2; ours.

    Costs three passes forward and two back a step, no base. Known to break: the target moves with the model, and the
    diffusion loss on the model's own images keeps them less well than the base's predictions do.
    """

    forget_weight: float = 0.1
    balancing: Literal["sum", "bome", "nash"] = "sum"
    eta: float = 0.5

    @property
    def balance(self) -> Callable[[float, float, float], tuple[float, float]] | None:
        return {"sum": None, "bome": partial(barrier, self.eta), "nash": nash}[self.balancing]

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        weight = self.forget_weight if self.balancing == "sum" else 1.0
        yield "forget", weight * relabelled(model, model, batch)
        yield "retain", denoised(model, batch)
