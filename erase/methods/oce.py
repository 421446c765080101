"""OCE (ICML 2026): an orthogonal change of the values of cross-attention, which keeps their norms and angles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Text, Tokens
from erase.methods.protocol import ClosedForm
from erase.methods.rece import derive


@dataclass(frozen=True)
class OCE(ClosedForm):
    """W' = P^T W for every W of attn2.to_v, P the rotation with the largest <P, M>, that is P = U V^T for M = U S V^T,

        M = -s_e R (I - R_*) + s_g W C_g W^T + s_c sum_k W k k^T W^T + lamb W W^T,
    (with the last column of U negated if P would be a reflection). R and R_* project on the span of the normalised
    values W c_e of the erased tokens and of the values W c_a of their anchors: the first term turns the values of the
    concept towards those of the anchors, the others keep values as they are, on the whole for C_g = mean c c^T over
    retained text states, and for single retained tokens k. P is orthogonal, so that the norms of all values and the
    angles between them stay.

    rounds: after the first solution, `rounds` times: embeddings C' for which the edited W' gives what W gives for c_e
    (RECE's closed form, Gong et al., ECCV 2024) become erased tokens too, and P is solved for again. The authors have
    such rounds as an option.

    The authors' settings: erase_scale 3000 for nudity, 2000 for objects, 500 for styles; global_scale 20, 10, 10;
    concept_scale 1 for styles, else 0; lamb 10. C_g is theirs for COCO captions; ours is that of the retain prompts and
    of the empty prompt.

    Costs: two singular value decompositions for each layer and round, no images. Known weakness: keys do not change;
    many different forget prompts span all directions of a small layer, and leave none to turn to: raise `least`.
    """

    values_only = True

    erase_scale: Annotated[float, "s_e; a larger one turns the concept's values further"] = 2000.0
    global_scale: Annotated[float, "s_g; a larger one changes the values of retained prompts less"] = 10.0
    concept_scale: Annotated[float, "s_c; a larger one changes the values of retained last words less"] = 0.0
    lamb: Annotated[float, "penalty on every change of W; a larger one erases less"] = 10.0
    least: Annotated[float, "directions of R and R_* below this share of the largest singular value are left out"] = (
        1e-6
    )
    rounds: Annotated[int, "further rounds against embeddings that still lead to the concept"] = 0
    xi: Annotated[float, "RECE's penalty on the norm of these embeddings"] = 0.1
    tokens: Annotated[Tokens, "which tokens of the forget prompts are turned to the anchor's"] = "last"

    def __post_init__(self) -> None:
        if self.rounds < 0 or not self.xi > 0 or not 0 < self.least < 1:
            raise EraseError(
                f"oce has rounds={self.rounds}, xi={self.xi:g} and least={self.least:g}; rounds must be 0 or more, xi "
                "above 0, and least between 0 and 1"
            )

    def solve(self, weights: Mapping[str, Tensor], text: Text) -> tuple[dict[str, Tensor], dict[str, Any]]:
        old = [W.double() for W in weights.values()]
        c_e, c_a = text.pairs(self.tokens)
        every = torch.cat([text.kept("all"), text.empty[0].double().T], dim=1)
        C_g, k = every @ every.T / every.shape[1], text.kept("last")
        erased, new = c_e, old
        for number in range(self.rounds + 1):
            if number:
                erased = torch.cat([erased, derive(old, new, c_e, xi=self.xi)], dim=1)
            new = [rotation(self, W, erased, c_a, C_g, k).T @ W for W in old]
        turned = [float((now - W).norm() / W.norm()) for now, W in zip(new, old, strict=True)]
        return dict(zip(weights, new, strict=True)), {"relative_change": turned}


def rotation(method: OCE, W: Tensor, c_e: Tensor, c_a: Tensor, C_g: Tensor, k: Tensor) -> Tensor:
    """P, [out, out]; embeddings as columns, [d, n]."""
    R, R_a = (projector(W @ c, method.least) for c in (c_e, c_a))
    identity = torch.eye(len(W), dtype=torch.float64)
    Wk = W @ k
    M = -method.erase_scale * R @ (identity - R_a) + method.global_scale * W @ C_g @ W.T
    M += method.concept_scale * Wk @ Wk.T + method.lamb * W @ W.T
    U, _, Vh = torch.linalg.svd(M)
    if torch.linalg.det(U @ Vh) < 0:
        U[:, -1] *= -1  # of the smallest singular value
    return U @ Vh


def projector(columns: Tensor, least: float) -> Tensor:
    """The projector on the span of the normalised columns, without directions below `least` of the largest."""
    U, sizes, _ = torch.linalg.svd(columns / columns.norm(dim=0).clamp(min=1e-12), full_matrices=False)
    U = U[:, sizes >= least * sizes[0]]
    return U @ U.T
