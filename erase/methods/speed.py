"""SPEED (Li et al., ICLR 2026): a closed form inside the null space of what must stay."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from erase.errors import EraseError
from erase.methods.inputs import Text, Tokens
from erase.methods.null_space import null_projector
from erase.methods.protocol import ClosedForm
from erase.methods.ridge import solve_right

CHUNK = 128  # retained embeddings that are augmented and filtered together, as in the authors' code


@dataclass(frozen=True)
class SPEED(ClosedForm):
    """dW = W (S_at - S_tt) P [I - M K (K^T P M K + lamb I)^-1 K^T P] M with M = (S_tt P + rho I)^-1

    for every W of attn2.to_v. S_tt = mean c_e c_e^T, S_at = mean c_a c_e^T. P projects on the eigenvectors of
    R = mean r r^T whose eigenvalues are below `threshold`: the null space of the retained embeddings r, of which
      influence-based filtering keeps those that W (S_at - S_tt)(I + S_tt)^-1 changes more than the mean one (not if
      there is no augmentation), and
      directed augmentation adds r + v v^T eps, eps ~ N(0, I), v the right singular vector of W with the smallest
      singular value, filtered in the same way.
    K = [start token, `centres` k-means centres of the empty prompt's other tokens]; with lamb = 0, dW K = 0 exactly.
    arXiv:2503.07392; the authors use rho 1 and lamb 0, for nudity all tokens, rho 0.7 and lamb 0.5, and for many
    concepts at once rho 0.05 without the filter.

    Costs: an eigendecomposition per layer, no images. Known weakness: with many different retain prompts the null space
    is small and leaves no room to erase; keys do not change.
    """

    formula = 2  # 1: version 0.1.0
    values_only = True

    rho: Annotated[float, "penalty on the norm of dW; a larger one erases less"] = 1.0
    lamb: Annotated[float, "how much the empty prompt may change; 0: not at all"] = 0.0
    threshold: Annotated[float, "eigenvalues of R that count as null; a larger one erases more and retains less"] = 0.1
    filter: Annotated[bool, "influence-based filtering of retained embeddings; augmented ones always are"] = True
    augment: Annotated[int, "augmented embeddings for each retained one; more retain a wider neighbourhood"] = 10
    centres: Annotated[int, "k-means centres of the empty prompt's tokens"] = 3
    tokens: Annotated[Tokens, "which tokens of the forget prompts are mapped to the anchor's"] = "last"
    retain_tokens: Annotated[Tokens, "which tokens of the retain prompts are retained"] = "last"
    seed: Annotated[int, "seed of augmentation and k-means; the run's --seed unless it is set"] = 0

    def __post_init__(self) -> None:
        if not self.rho > 0 or self.lamb < 0:
            raise EraseError(f"speed has rho={self.rho} and lamb={self.lamb}; rho must be above 0 and lamb 0 or more")
        if self.augment < 0 or self.centres < 1:
            raise EraseError(
                f"speed has augment={self.augment} and centres={self.centres}; "
                "augment must be 0 or more, centres 1 or more"
            )

    def solve(self, weights: Mapping[str, Tensor], text: Text) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not weights or not len(text.retain):
            raise EraseError(
                "speed needs values of cross-attention in its scope and retain prompts; "
                "use --scope xattn-kv and --retain"
            )
        values = {name: W.double() for name, W in weights.items()}
        draw = torch.Generator().manual_seed(self.seed)
        c_e, c_a = text.pairs(self.tokens)
        S_tt, S_at = c_e @ c_e.T / c_e.shape[1], c_a @ c_e.T / c_e.shape[1]
        retained = text.kept(self.retain_tokens)
        null = text.empty[0].double()
        K_2 = torch.cat([null[:1], k_means(null[1:], self.centres, draw)]).T
        new, conditions, ranks = {}, [], []
        for name, W in values.items():
            P = null_space(self, W, S_at - S_tt, S_tt, retained, draw)
            dW, condition = constrained(self, W, S_at - S_tt, S_tt, P, K_2)
            new[name] = W + dW
            conditions.append(condition)
            ranks.append(int(P.trace().round()))
        return new, {"condition_number": max(conditions), "null_space_dimensions": ranks, "of": len(S_tt)}


def null_space(method: SPEED, W: Tensor, away: Tensor, S_tt: Tensor, retained: Tensor, draw: torch.Generator) -> Tensor:
    """P, [d, d]: the projector on what no retained embedding, filtered and augmented for this W, has a part in."""
    identity = torch.eye(len(S_tt), dtype=torch.float64)
    D_0 = W @ solve_right(away, identity + S_tt)

    def influenced(columns: Tensor) -> Tensor:
        influence = (D_0 @ columns).norm(dim=0)
        return columns[:, influence >= influence.mean()]  # a single one stays

    r = influenced(retained) if method.filter and method.augment else retained
    if method.augment:
        v = torch.linalg.svd(W, full_matrices=True).Vh[-1:].T
        parts = [r]
        for part in r.split(CHUNK, dim=1):  # the mean is over the embeddings around one part
            around = part.repeat(1, method.augment)
            eps = torch.randn(around.shape, generator=draw, dtype=torch.float64)
            parts.append(influenced(around + v @ (v.T @ eps)))
        r = torch.cat(parts, dim=1)
    return null_projector(r, method.threshold)


def constrained(method: SPEED, W: Tensor, away: Tensor, S_tt: Tensor, P: Tensor, K: Tensor) -> tuple[Tensor, float]:
    """dW, and the condition number of S_tt P + rho I.

    dW is the D P that minimises mean ||(W + D P) c_e - W c_a||^2 + rho ||D P||^2 + ||D P K||^2 / lamb.
    """
    d = len(S_tt)
    A = S_tt @ P + method.rho * torch.eye(d, dtype=torch.float64)
    if method.lamb == 0:  # the same constraint in a basis of what P leaves of K, so that the small matrix is regular
        U, sizes, _ = torch.linalg.svd(P @ K, full_matrices=False)
        K = U[:, sizes > 1e-9 * K.norm()]
    free = solve_right(W @ away @ P, A)  # without K; what follows takes back what it does to K
    small = K.T @ P @ torch.linalg.solve(A, K) + method.lamb * torch.eye(K.shape[1], dtype=torch.float64)
    return free - solve_right(free @ K, small) @ solve_right(K.T @ P, A), float(torch.linalg.cond(A))


def k_means(points: Tensor, num: int, draw: torch.Generator) -> Tensor:
    """Centres, [at most num, d], by Lloyd's iteration from a farthest-first start whose first point is drawn."""
    from scipy.cluster.vq import kmeans2

    chosen = [int(torch.randint(len(points), (), generator=draw))]
    while len(chosen) < min(num, len(points)):
        chosen.append(int(torch.cdist(points, points[chosen]).min(dim=1).values.argmax()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty")  # of equal points; its centre stays
        centres, _ = kmeans2(points.numpy(), points[chosen].numpy(), iter=100, minit="matrix")
    return torch.from_numpy(centres).to(points)
