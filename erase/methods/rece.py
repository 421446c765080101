"""RECE (Gong et al., ECCV 2024): UCE, repeated against the embeddings that still lead to the erased concept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Text, Tokens
from erase.methods.protocol import ClosedForm
from erase.methods.ridge import ridge


@dataclass(frozen=True)
class RECE(ClosedForm):
    """C' = (xi I + sum_i W_i'^T W_i')^-1 (sum_i W_i'^T W_i) C, then W' by UCE's formula with C' -> C_a, `epochs` times.

    C: token embeddings of the forget prompts. C': embeddings for which the edited W' gives the keys and values that W
    gave for C. The first edit maps C to C_a; each later edit starts from the W' before it.
    arXiv:2407.12383. The authors forget single words ("nudity"), use the empty prompt for C_a and as the only retain
    prompt, and map all tokens position by position. Our forget prompts are sentences, whose other words would be erased
    too. So we use anchor and retain prompts, and only the tokens from the first one that differs from the anchor's.
    The authors' settings: xi 0.1 and 3 epochs for nudity, 2 for other unsafe content, 1 for easy objects; xi 0.001 and
    1 epoch for styles and hard objects; lamb_1 and lamb_2 0.1.

    Costs: one solve per round and one before, no images. Known weakness: each round changes retained prompts more; a
    word learned on the edited model brings the concept back nevertheless.
    """

    xi: Annotated[float, "penalty on the norm of C'; a smaller one finds more distant embeddings and erases more"] = 0.1
    epochs: Annotated[int, "rounds after the first edit; more are more robust and change more; 0 is UCE"] = 3
    lamb_1: Annotated[float, "weight of the retained embeddings"] = 0.1
    lamb_2: Annotated[float, "penalty on the change of each W"] = 0.1
    target: Annotated[Literal["anchor", "empty"], "what C and C' are mapped to; empty maps all tokens"] = "anchor"
    tokens: Annotated[Tokens, "which tokens of the forget prompts are mapped to their anchor's"] = "tail"
    keep: Annotated[Literal["retain", "empty"], "retained: retain prompts and empty prompt, or the latter"] = "retain"

    def __post_init__(self) -> None:
        if not self.xi > 0 or self.epochs < 0:
            raise EraseError(f"rece has xi={self.xi} and epochs={self.epochs}; xi must be above 0 and epochs 0 or more")

    def solve(self, weights: Mapping[str, Tensor], text: Text) -> tuple[dict[str, Tensor], dict[str, Any]]:
        old = [W.double() for W in weights.values()]
        if self.target == "anchor":
            C, C_a = text.pairs(self.tokens)
        else:
            C, C_a = (_columns(states) for states in (text.forget, text.empty.expand_as(text.forget)))
        kept = _columns(text.empty)
        if self.keep == "retain":
            kept = torch.cat([kept, text.kept("all")], dim=1)
        new, found = old, C
        conditions, distances = [], []
        for epoch in range(self.epochs + 1):
            if epoch:
                found = derive(old, new, C, xi=self.xi)
            D, condition = ridge(self.lamb_2, (1.0, found, C_a), (self.lamb_1, kept, kept))
            new = [W + W @ D for W in new]
            conditions.append(condition)
            distances.append(float((found - C).norm() / C.norm()))
        return dict(zip(weights, new, strict=True)), {"condition_number": conditions, "distance_of_derived": distances}


def derive(old: list[Tensor], new: list[Tensor], C: Tensor, *, xi: float) -> Tensor:
    """C', the embeddings with sum_i ||W_i' C' - W_i C||^2 + xi ||C'||^2 least."""
    new_all, old_all = torch.cat(new), torch.cat(old)  # rows below each other: their product is the sum over i
    A = xi * torch.eye(len(C), dtype=torch.float64) + new_all.T @ new_all
    return torch.linalg.solve(A, new_all.T @ old_all @ C)


def _columns(states: Tensor) -> Tensor:
    """Every token of every prompt, [prompts, tokens, d], as a column: float64, [d, n]."""
    return states.flatten(0, 1).double().T
