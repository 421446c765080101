"""Data sets by name, and the format of a folder."""

from pathlib import Path

from erase.classification.data.built_in import digits, drawings
from erase.classification.data.cifar import cifar, num_classes_in
from erase.classification.data.folder import image_folder
from erase.classification.data.hub import SOURCES, from_hub, from_parquet
from erase.classification.data.labelled import Dataset
from erase.errors import EraseError

OFFLINE = ("digits", "drawings")


def load(name: str, cache_dir: str | Path, *, size: int | None = None, quiet: bool = True) -> Dataset:
    """The data set of a name or a folder.

    name: digits, drawings, one of SOURCES, or a folder with CIFAR's python or binary files, with train/CLASS/image and
        test/CLASS/image (or val), or with parquet files.
    cache_dir: folder in which the drawings and the decoded images of folders are kept.
    size: side in pixels to which images of a folder or the hub are cropped and scaled; without it a folder's images
        must all have the same size.

    Raises:
        EraseError: there is no such data set, or it is damaged; the message names the file.
    """
    if name == "digits":
        return digits()
    if name == "drawings":
        return drawings(cache_dir)
    if name in SOURCES:
        return from_hub(name, size)
    folder = Path(name)
    if not folder.is_dir():
        raise EraseError(f"{name!r} is no data set and no folder; choose {', '.join([*OFFLINE, *SOURCES])} or a folder")
    num_classes = num_classes_in(folder)
    if num_classes:
        return cifar(folder, num_classes)
    if (folder / "train").is_dir() and any(folder.glob("train/*/*")):
        return image_folder(folder, size, cache_dir, quiet=quiet)
    if any(folder.rglob("*.parquet")):
        return from_parquet(folder, size)
    raise EraseError(f"{folder} holds neither CIFAR's files, nor train/CLASS/images, nor parquet files")
