"""How good images are: their fit to the prompt (CLIP score), their distance from other images (FID, KID).

    CLIP score   100 cos(image, prompt), one number an image
    FID          |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) between the Gaussians of two sets of features
    KID          squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, averaged over subsets

FID is biased: fewer images, higher FID. KID is not, and is what small sets need. Images of two models on the same
prompts and seeds are pairs, not independent: KID of pairs leaves a pair's own likeness out, which would count against
the distance. A value of either means nothing without the network, the resize rule and the number of images;
`metric_id` puts them into the name.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from erase.errors import EraseError, missing
from erase.tensor_files import read_metadata, read_tensors, write_tensors

MIN_KID = 4
MIN_FID = 2048  # below it the covariance of 2,048 features has no full rank


def metric_id(metric: Literal["fid", "kid", "kid-pairs"], identity: Mapping[str, Any], n: int) -> str:
    """As fid/inception2015/299-bilinear-tf1/n=5000: values of different names cannot be compared.

    identity: of the `Features`. n: images in the smaller of the two sets.
    """
    return f"{metric}/{identity['kind']}/{identity['resize']}/n={n}"


def fid(a: np.ndarray, b: np.ndarray, *, allow_small: bool = False) -> float:
    """Frechet distance between two sets of features, [n, d] each, in float64; 0 for equal sets, lower is closer.

    Takes about 20 s for d = 2048: the eigenvalues of a d x d matrix.

    Raises:
        EraseError: a set has fewer than 2,048 features and `allow_small` is not set.
    """
    from_a, from_b = _checked(a, b)
    n = min(len(from_a), len(from_b))
    if n < (2 if allow_small else MIN_FID):
        raise EraseError(f"FID of {n} images is mostly bias, {MIN_FID} are the least; use KID, which has none")
    _require_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_they_are = torch.nn.Identity()
    as_they_are.num_features = from_a.shape[1]  # pyright: ignore
    metric = FrechetInceptionDistance(feature=as_they_are)
    metric.update(from_a, real=True)
    metric.update(from_b, real=False)
    return metric.compute().item()


def kid(
    a: np.ndarray,
    b: np.ndarray,
    *,
    are_pairs: bool = False,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of KID over random subsets of two sets of features, [n, d] each, in float64.

    Its expectation is 0 for two samples of one distribution, so values below 0 are in order. The deviation is that of
    one subset, not the mean's error. Takes 35 s for d = 2048.

    are_pairs: a[i] and b[i] are of the same prompt and seed. Then the mean over i != j of
        k(a_i, a_j) + k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i) (MMD_u^2 of Gretton et al., JMLR 2012, lemma 6), which
        is 0 for a set and itself; without it, k(a_i, b_i) counts too, and sets that are alike come out far below 0.
    subset_size: images of each set in a subset; by default 1,000, but no more than half of the smaller set, so that
        subsets differ.

    Raises:
        EraseError: too few features, or pairs of sets that are not equally long.
    """
    from_a, from_b = _checked(a, b)
    n = min(len(from_a), len(from_b))
    if are_pairs and len(from_a) != len(from_b):
        raise EraseError(f"{len(from_a)} and {len(from_b)} features are no pairs; give the same images of both models")
    size = min(1000, n // 2) if subset_size is None else subset_size
    if not 2 <= size <= n:
        raise EraseError(
            f"KID of {n} images in subsets of {size}; a subset holds two or more, and {MIN_KID} are the least"
        )
    _require_torchmetrics()
    from torchmetrics.image.kid import poly_kernel, poly_mmd

    generator = torch.Generator().manual_seed(seed)

    def drawn(features: torch.Tensor) -> torch.Tensor:
        return torch.randperm(len(features), generator=generator)[:size]

    def of_pairs() -> torch.Tensor:
        chosen = drawn(from_a)
        x, y = from_a[chosen], from_b[chosen]
        between = poly_kernel(x, y)
        kernels = poly_kernel(x, x) + poly_kernel(y, y) - between - between.T
        return (kernels.sum() - kernels.trace()) / (size * (size - 1))

    def of_sets() -> torch.Tensor:
        return poly_mmd(from_a[drawn(from_a)], from_b[drawn(from_b)])

    values = torch.stack([of_pairs() if are_pairs else of_sets() for _ in range(subsets)])
    return values.mean().item(), values.std(unbiased=False).item()


def save_features(path: str | Path, features: np.ndarray, identity: Mapping[str, Any]) -> None:
    """Keep features, [n, d], so that real images are looked at once; `identity` of the `Features` goes along."""
    write_tensors(path, {"features": torch.tensor(features)}, {"identity": identity})


def load_features(path: str | Path, identity: Mapping[str, Any]) -> np.ndarray:
    """The features in a file, [n, d], if they were made as `identity` says.

    Raises:
        EraseError: made by another network or another rule, or no such file.
    """
    stored = read_metadata(path).get("identity")
    if stored is None:
        raise EraseError(f"{path} is no file of features; make one with save_features")
    different = sorted(key for key in {*stored, *identity} if stored.get(key) != identity.get(key))
    if different:
        key = different[0]
        raise EraseError(
            f"the features in {path} were made otherwise: {key} is {stored.get(key)} there and {identity.get(key)} "
            "here; make the file again"
        )
    return read_tensors(path)["features"].numpy()


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise EraseError(
            f"features of shapes {list(a.shape)} and {list(b.shape)} are not of one network; needed [n, d]"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EraseError("there are features that are not finite; leave invalid images out")
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


def _require_torchmetrics() -> None:
    if find_spec("torchmetrics") is None:
        raise missing("torchmetrics")
