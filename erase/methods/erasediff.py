"""EraseDiff (Wu et al., 2024): a bilevel problem, solved by an inner loop that only forgets and an outer loop."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Batch, Predictor
from erase.methods.protocol import TrainedMethod, Turn
from erase.methods.terms import denoised, relabelled


@dataclass(frozen=True)
class EraseDiff(TrainedMethod):
    """In each epoch, from theta_i, `rounds` times: N steps down L_f; theta <- theta_i; N steps down L_r + lambda q.

    L_f = ||eps(x_t | c_f) - sg eps(x_t | c_a)||^2, L_r = ||eps(x_t' | c_r) - eps'||^2, means over elements, and
    q = L_f - sg L_f(theta^K), theta^K the end of the inner loop: grad q = grad L_f.
    One Adam takes all steps. When the weights are put back its moments stay, so these are all that the inner loop
    changes. With the default of `--num-train-steps`, N is a pass over the forget images, as in the authors' code.

    forget_weight: lambda; a larger one forgets more and retains less. The authors' scripts use 1.
    epochs: after each inner loop the weights are put back to those at the start of the epoch. N is the number of
        optimizer steps / (2 epochs rounds), so more epochs mean shorter loops; with too few steps some loops are empty.
    rounds: K. Only the last round's outer loop changes the weights; earlier rounds change only Adam's moments.

    Costs: two forward passes and one backward pass per inner step, three and two per outer step, and a copy of the
    weights that may change. Known weakness: at least half of the steps are discarded, the target changes with the
    model, and the diffusion loss on the model's own images retains less than the base's predictions do.
    """

    formula = 2  # 1: version 0.1.0

    forget_weight: float = 1.0
    epochs: int = 2
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.rounds < 1:
            raise EraseError(f"erasediff has epochs={self.epochs} and rounds={self.rounds}; both must be at least 1")

    @property
    def least_steps(self) -> int:
        return 2 * self.epochs * self.rounds

    def turn(self, step: int, num_steps: int) -> Turn:
        loops = self.least_steps
        now, before = (((s + 1) * loops - 1) // num_steps if s >= 0 else -1 for s in (step, step - 1))
        begins, is_outer = now != before, now % 2 == 1
        return Turn(
            terms={"forget": self.forget_weight, "retain": 1.0} if is_outer else {"forget": 1.0},
            remember=begins and (before < 0 or now // (2 * self.rounds) != before // (2 * self.rounds)),
            rewind=begins and is_outer,
        )

    def loss(self, model: Predictor, frozen: Predictor, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        yield "forget", relabelled(model, model, batch)
        yield "retain", denoised(model, batch)
