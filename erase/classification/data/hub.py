"""Data sets of the Hugging Face hub, and folders with parquet files; both are read with the package datasets."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erase.classification.data.cifar import CIFAR10, CIFAR100
from erase.classification.data.labelled import Dataset, Images
from erase.classification.data.pixels import read_pixels, statistics
from erase.errors import EraseError, missing


@dataclass(frozen=True)
class Source:
    """A data set of the hub: its training and test split, its columns, and the statistics that papers use for it."""

    repository: str
    config: str | None
    splits: tuple[str, str]
    columns: tuple[str, str]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int
    flip: bool = True


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SVHN = ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052))
_TRAIN_TEST, _TRAIN_VALID = ("train", "test"), ("train", "validation")
SOURCES: dict[str, Source] = {
    "cifar10": Source("uoft-cs/cifar10", None, _TRAIN_TEST, ("img", "label"), 32, *CIFAR10, 4),
    "cifar100": Source("uoft-cs/cifar100", None, _TRAIN_TEST, ("img", "fine_label"), 32, *CIFAR100, 4),
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", _TRAIN_TEST, ("image", "label"), 32, *_SVHN, 0, False),
    "tiny-imagenet": Source("zh-plus/tiny-imagenet", None, ("train", "valid"), ("image", "label"), 64, *_IMAGENET, 4),
    "imagenette": Source("frgfm/imagenette", "160px", _TRAIN_VALID, ("image", "label"), 128, *_IMAGENET, 16),
}


def from_hub(name: str, size: int | None) -> Dataset:
    """One of SOURCES.

    size: side in pixels; None for the source's own.

    Raises:
        EraseError: it cannot be loaded, or has other splits or columns.
    """
    source = SOURCES[name]
    stored = _load_dataset(name, source.repository, source.config)
    return _collect(name, stored, source.splits, source.columns, size or source.size, source)


def from_parquet(folder: Path, size: int | None) -> Dataset:
    """A folder with parquet files of a training and a test split, with one image and one label column.

    Raises:
        EraseError: it cannot be loaded, or has other splits or columns.
    """
    stored = _load_dataset(str(folder), str(folder), None)
    if "train" not in stored or len(stored) < 2:
        raise EraseError(f"{folder} has the splits {', '.join(stored)}; it needs train and test (or validation)")
    test = next((name for name in ("test", "validation", "valid", "val") if name in stored), None) or list(stored)[1]
    features = stored["train"].features
    image = next((key for key, kind in features.items() if type(kind).__name__ == "Image"), None)
    label = next((key for key, kind in features.items() if type(kind).__name__ == "ClassLabel"), None)
    if image is None or label is None:
        raise EraseError(f"{folder} has the columns {', '.join(features)}; one must be an Image and one a ClassLabel")
    return _collect(str(folder), stored, ("train", test), (image, label), size, None)


def _load_dataset(name: str, repository: str, config: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise missing("datasets", f"{name} is read with the package datasets") from error
    try:
        stored: Any = datasets.load_dataset(repository, config)
    except Exception as error:  # network, disk and format errors of many kinds, each with a message of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        advice = "" if Path(repository).is_dir() else "; give --data a folder with its files instead"
        raise EraseError(f"{name} could not be loaded ({reason}){advice}") from error
    return stored


def _collect(
    name: str,
    stored: Mapping[str, Any],
    splits: tuple[str, str],
    columns: tuple[str, str],
    size: int | None,
    source: Source | None,
) -> Dataset:
    _require(name, "splits", splits, stored)
    parts: list[Images] = []
    for split in splits:
        _require(name, "columns", columns, stored[split].features)
        rows = _encoded(stored[split], columns[0])
        images = [read_pixels(row, f"image {i} of {split} of {name}", size) for i, row in enumerate(rows)]
        first = (parts[0].x if parts else images)[0]
        other = next((image for image in images if image.shape != first.shape), first)
        if other is not first:
            here, there = ("x".join(map(str, one.shape[1:])) for one in (other, first))
            raise EraseError(f"{split} of {name} has images of {here} pixels, but the first is {there}; give --size")
        parts.append(Images(torch.stack(images), torch.tensor(stored[split][columns[1]])))
    classes = tuple(stored[splits[0]].features[columns[1]].names)
    train, test = parts
    if source is None:
        return Dataset(name, train, test, classes, *statistics(train.x), padding=train.x.shape[2] // 8, flip=True)
    return Dataset(name, train, test, classes, source.mean, source.std, source.padding, source.flip)


def _encoded(split: Any, column: str) -> Iterator[Path | bytes]:
    """The images of a column, each as a file or its bytes; no bytes for an empty row."""
    from datasets import Image as Encoded

    for row in split.cast_column(column, Encoded(decode=False))[column]:
        row = row or {"bytes": b"", "path": None}
        yield row["bytes"] or (Path(row["path"]) if row["path"] else b"")


def _require(name: str, what: str, wanted: tuple[str, str], found: Iterable[str]) -> None:
    if not set(wanted) <= set(found):
        raise EraseError(f"{name} has the {what} {', '.join(found)}; it needs {' and '.join(wanted)}")
