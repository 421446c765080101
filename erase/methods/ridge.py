"""The ridge regression that closed forms share: some text embeddings are mapped to new targets, others are retained."""

import torch
from torch import Tensor

from erase.errors import EraseError


def ridge(lamb: float, *moves: tuple[float, Tensor, Tensor]) -> tuple[Tensor, float]:
    """D with W' = W + W D for every W at once, and the condition number of the matrix that was solved.

    W' = argmin lamb ||W' - W||^2 + sum_k s_k ||W' c_k - W t_k||^2 has the closed form W' = W B A^-1 with
    A = lamb I + sum_k s_k c_k c_k^T and B = lamb I + sum_k s_k t_k c_k^T, so that D = (B - A) A^-1; no W occurs in it.

    lamb: penalty on the change of W, above 0. moves: (s, c, t), embeddings c and their targets t as columns,
    float64, [d, n]; with t = c they are retained.

    Raises:
        EraseError: lamb is not above 0, or the matrix cannot be solved in float64.
    """
    if not lamb > 0:
        raise EraseError(f"the penalty on changes (lamb) is {lamb}; it must be above 0, or the solution is not unique")
    d = moves[0][1].shape[0]
    A = lamb * torch.eye(d, dtype=torch.float64)
    away = torch.zeros_like(A)  # B - A
    for s, c, t in moves:
        A += s * c @ c.T
        if t is not c:
            away += s * (t - c) @ c.T
    return solve_right(away, A), float(torch.linalg.cond(A))


def solve_right(b: Tensor, a: Tensor) -> Tensor:
    """b a^-1, without the inverse.

    Raises:
        EraseError: a is singular.
    """
    try:
        return torch.linalg.solve(a.T, b.T).T
    except torch.linalg.LinAlgError as error:
        raise EraseError(f"the closed form has no unique solution ({error}); raise its regularisation") from error
