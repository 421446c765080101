"""Image folders: train/CLASS/image and test/CLASS/image, and Tiny ImageNet as it is distributed."""

from collections.abc import Sequence
from pathlib import Path

from erase.classification.data.decoded import decoded
from erase.classification.data.labelled import Dataset, Images
from erase.classification.data.pixels import statistics
from erase.data.images import SUFFIXES, image_files, is_system
from erase.errors import EraseError

_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file, class and box of each validation image


def image_folder(folder: Path, size: int | None, cache_dir: str | Path, *, quiet: bool = True) -> Dataset:
    """The images of train/CLASS and test/CLASS (or val/CLASS), with classes in alphabetical order.

    Images may be in folders below their class folder. For Tiny ImageNet as it is distributed, labels of val/images
    come from val_annotations.txt and class names from words.txt; its folder test, which has no labels, is ignored.
    The pixels are decoded once and then read from `cache_dir`, as long as no file changes.

    size: see `read_pixels`; without it all images must have the same size.

    Raises:
        EraseError: a folder, an image or a line of labels cannot be used; the message names it.
    """
    annotations = folder / "val" / _ANNOTATIONS
    names = ("val",) if annotations.is_file() else ("test", "val")
    test = next((folder / name for name in names if (folder / name).is_dir()), None)
    if test is None:
        raise EraseError(f"{folder} has a folder train but neither test nor val")
    train = _by_class(folder / "train")
    tested = _annotated(annotations) if annotations.is_file() else _by_class(test)
    unknown = sorted(tested.keys() - train.keys())
    if unknown:
        raise EraseError(f"{test / unknown[0]} is a class that {folder / 'train'} does not have")
    labelled = [
        [(path, y) for y, name in enumerate(train) for path in found.get(name, ())] for found in (train, tested)
    ]
    for part, files in zip((folder / "train", test), labelled, strict=True):
        if not files:
            raise EraseError(f"{part} holds no images in class folders ({', '.join(sorted(SUFFIXES))})")
    parts = [Images(*tensors) for tensors in decoded(folder, labelled, size, cache_dir, quiet=quiet)]
    classes = _in_words(folder / "words.txt", list(train))
    mean, std = statistics(parts[0].x)
    return Dataset(str(folder), parts[0], parts[1], classes, mean, std, padding=parts[0].x.shape[2] // 8, flip=True)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """The images of each class folder, in alphabetical order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not is_system(path.name))
    return {path.name: image_files(path) for path in classes}


def _annotated(path: Path) -> dict[str, list[Path]]:
    """The images of each class, from a file with lines "FILE TAB CLASS TAB box"; they are in images/ next to it."""
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        name, *rest = line.split("\t")
        if not rest or not (path.parent / "images" / name).is_file():
            raise EraseError(f"{path}, line {number}: needed are a file of {path.parent / 'images'}, a TAB and a class")
        found.setdefault(rest[0], []).append(path.parent / "images" / name)
    return found


def _in_words(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """The first name of each class in a file with lines "CLASS TAB name, other name".

    A class whose name is missing or not unique keeps its own.
    """
    if not path.is_file():
        return tuple(classes)
    lines = (line.partition("\t") for line in _text(path).splitlines())
    words = {name: text.split(",")[0].strip() for name, _, text in lines}
    named = [words.get(name) or name for name in classes]
    return tuple(word if named.count(word) == 1 else name for name, word in zip(classes, named, strict=True))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EraseError(f"{path} cannot be read as text ({error})") from error
