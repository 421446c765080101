"""Saliency scores, summed while backward passes run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.nn import Parameter

from erase.errors import EraseError
from erase.masks.selection import bit_patterns

Score = Literal["abs_sum", "sum_abs", "sum_sq"]


class Saliency:
    """A running score of every weight, from the gradients of a forget loss.

    SalUn (Fan et al., ICLR 2024) keeps the weights where |grad l_f(theta_o)| >= gamma. Over batches b that is
        abs_sum   |sum_b g_b|, the gradient of the whole loss, as in the authors' code
        sum_abs   sum_b |g_b|
        sum_sq    sum_b g_b^2, the diagonal of the empirical Fisher information
    all summed in float32, on the device where each parameter is.
    """

    def __init__(self, parameters: Mapping[str, Parameter], score: Score = "abs_sum"):
        if score not in get_args(Score):
            raise EraseError(f"unknown score '{score}'; one of {', '.join(get_args(Score))}")
        self.parameters, self.score, self._is_over = parameters, score, False
        self._sums = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients as they are now, a missing one as zero, and leave None in their place."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._add(name, parameter)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, every backward pass is added by itself, each gradient as soon as it is there.

        So the dense gradients of two tensors are never in memory together.
        """
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._add, name))
            for name, parameter in self.parameters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None and not self._is_over
        g, total = parameter.grad.float(), self._sums[name]
        if self.score == "abs_sum":
            total.add_(g)
        elif self.score == "sum_abs":
            total.add_(g.abs())
        else:
            total.addcmul_(g, g)
        parameter.grad = None

    def scores(self) -> dict[str, torch.Tensor]:
        """float32 and not negative, in the parameters' shapes; the sums themselves, so this ends the accumulation.

        Raises:
            EraseError: a score is NaN or infinite; the message names the tensor.
        """
        self._is_over = True
        for name, total in self._sums.items():
            bit_patterns(name, total.abs_())
        return self._sums

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted accumulation needs to continue bit for bit; the tensors are live, not copies."""
        return {"score": self.score, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`.

        Raises:
            EraseError: it was accumulated with another score or over other tensors.
        """
        if state["score"] != self.score:
            raise EraseError(f"the stored sums are '{state['score']}', but '{self.score}' is asked for; start again")
        sums = state["sums"]
        if {name: s.shape for name, s in sums.items()} != {name: s.shape for name, s in self._sums.items()}:
            raise EraseError("the stored sums are of other tensors; was the scope or the model changed? start again")
        for name, total in self._sums.items():
            total.copy_(sums[name])
