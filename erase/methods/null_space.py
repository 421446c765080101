"""The null space of text embeddings: the directions in which none of them has a part."""

import torch
from torch import Tensor

ROUNDING = 1e-10  # eigenvalues below this share of the largest one are zero in float64


def null_projector(columns: Tensor, threshold: float) -> Tensor:
    """P, [d, d]: the projector on the eigenvectors of R = mean r r^T whose eigenvalues are below `threshold`.

    columns: the embeddings r, float64, [d, n]. threshold: 0 takes eigenvalues that are zero up to rounding, so that
    P r = 0 for every r; a larger one gives more directions, in which the embeddings have a small part.
    """
    eigenvalues, U = torch.linalg.eigh(columns @ columns.T / columns.shape[1])
    U = U[:, eigenvalues < max(threshold, ROUNDING * float(eigenvalues[-1]))]
    return U @ U.T
