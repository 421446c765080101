"""Double projections (Zhang et al., CVPR 2026): onto a safe subspace, in the null space of what must stay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Text, Tokens
from erase.methods.null_space import null_projector
from erase.methods.protocol import ClosedForm
from erase.methods.rece import derive


@dataclass(frozen=True)
class DoubleProjections(ClosedForm):
    """dW = W (C* - C) (P C)^+ for every W of attn2.to_k and attn2.to_v, with the two projections

        C* = S (S^T S)^+ S^T C   of the erased embeddings C (columns) onto the span of the anchors' embeddings S,
        P = U_2 U_2^T            onto the null space of the retained embeddings r: P r = 0, so that dW r = 0.
    For one embedding c this is W (c* - c) x^T / ||x||^2 U_2^T with x = U_2^T c, the paper's form: W + dW gives for c
    what W gives for c*, and for every r what it gave before. ^+ is the pseudo-inverse.

    The retained embeddings are those of the retain prompts and all of the empty prompt.

    rounds: after the first solution, `rounds` times: embeddings C' for which the edited weights give what W gives for
    C (RECE's closed form, Gong et al., ECCV 2024) become erased embeddings too, and dW is solved for again. This
    attack is not part of the paper.

    Costs: a decomposition of the embeddings for all layers together, no images. Known weakness: what of the concept
    lies in the span of the retained embeddings cannot be erased, and where little of it lies outside, dW is large;
    anchors that fill the whole space leave nothing to erase: raise `least`.
    """

    threshold: Annotated[
        float, "directions in which the mean square of retained embeddings is below it may change; 0: exactly none"
    ] = 0.0
    least: Annotated[float, "directions of S and P C below this share of the largest singular value are left out"] = (
        1e-3
    )
    rounds: Annotated[int, "further rounds against embeddings that still lead to the concept"] = 0
    xi: Annotated[float, "RECE's penalty on the norm of these embeddings"] = 0.1
    tokens: Annotated[Tokens, "which tokens of the forget prompts are erased"] = "last"
    retain_tokens: Annotated[Tokens, "which tokens of the retain prompts stay"] = "last"

    def __post_init__(self) -> None:
        if self.rounds < 0 or not self.xi > 0 or not 0 < self.least < 1 or self.threshold < 0:
            raise EraseError(
                f"dp has threshold={self.threshold:g}, least={self.least:g}, rounds={self.rounds} and xi={self.xi:g}; "
                "threshold and rounds must be 0 or more, least between 0 and 1, and xi above 0"
            )

    def solve(self, weights: Mapping[str, Tensor], text: Text) -> tuple[dict[str, Tensor], dict[str, Any]]:
        old = [W.double() for W in weights.values()]
        C, S = text.pairs(self.tokens)
        P = null_projector(torch.cat([text.kept(self.retain_tokens), text.empty[0].double().T], dim=1), self.threshold)
        rank = int(P.trace().round())
        if not rank:
            raise EraseError(
                f"dp: the retained prompts fill all {len(P)} dimensions of the text states; raise threshold, or retain "
                "fewer prompts"
            )
        safe = span(S, self.least)
        erased, new = C, old
        for number in range(self.rounds + 1):
            if number:
                erased = torch.cat([erased, derive(old, new, C, xi=self.xi)], dim=1)
            D = (safe @ erased - erased) @ torch.linalg.pinv(P @ erased, rtol=self.least)
            new = [W + W @ D for W in old]
        left = float((safe @ C - C).norm() / C.norm())
        notes = {"null_space_dimensions": rank, "of": len(P), "safe_dimensions": int(safe.trace().round())}
        return dict(zip(weights, new, strict=True)), {**notes, "distance_to_safe": left}


def span(columns: Tensor, least: float) -> Tensor:
    """The projector on the span of the columns, without directions below `least` of the largest: S (S^T S)^+ S^T."""
    U, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    U = U[:, sizes >= least * sizes[0]]
    return U @ U.T
