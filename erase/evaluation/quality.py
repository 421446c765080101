"""FID, and the files and names of features, of which FID and KID (kid.py) are made.

    FID   |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) between the Gaussians of two sets of features

FID is biased: fewer images, higher FID. It has no interval here: its bias is larger than its spread. KID has no bias
and is what small sets need. A value of either means nothing without the network, the resize rule and the number of
images; `metric_id` puts them into the name.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from erase.errors import EraseError, missing
from erase.tensor_files import read_metadata, read_tensors, write_tensors

INCEPTION = 2048  # features of the network that FID is defined by


def metric_id(metric: Literal["fid", "kid", "kid-pairs"], identity: Mapping[str, Any], n: int) -> str:
    """As fid/inception2015/299-bilinear-tf1/n=5000: values of different names cannot be compared.

    identity: of the `Features`. n: images in the smaller of the two sets.
    """
    return f"{metric}/{identity['kind']}/{identity['resize']}/n={n}"


def min_fid(dimension: int) -> int:
    """The fewest images that FID takes: with fewer than features, their covariance has no full rank."""
    return dimension


def fid(a: np.ndarray, b: np.ndarray, *, allow_small: bool = False) -> float:
    """Frechet distance between two sets of features, [n, d] each, in float64; 0 for equal sets, lower is closer.

    Takes about 20 s for d = 2048: the eigenvalues of a d x d matrix.

    Raises:
        EraseError: a set has fewer images than `min_fid` and `allow_small` is not set.
    """
    from_a, from_b = checked(a, b)
    n, least = min(len(from_a), len(from_b)), min_fid(from_a.shape[1])
    if n < (2 if allow_small else least):
        raise EraseError(f"FID of {n} images is mostly bias; it needs at least {least}; use KID, which has no bias")
    _require_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_they_are = torch.nn.Identity()
    as_they_are.num_features = from_a.shape[1]  # pyright: ignore
    metric = FrechetInceptionDistance(feature=as_they_are)
    metric.update(from_a, real=True)
    metric.update(from_b, real=False)
    return metric.compute().item()


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
        raise EraseError(f"{path} is not a features file; create one with save_features")
    different = sorted(key for key in {*stored, *identity} if stored.get(key) != identity.get(key))
    if different:
        key = different[0]
        raise EraseError(
            f"the features in {path} were made in another way: {key} is {stored.get(key)} there and "
            f"{identity.get(key)} here; make the file again"
        )
    return read_tensors(path)["features"].numpy()


def checked(a: np.ndarray, b: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features in float64.

    Raises:
        EraseError: they are of different networks, or not finite.
    """
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
