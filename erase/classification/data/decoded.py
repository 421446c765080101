"""Pixels of labelled image files: decoded once, then read from one safetensors file that fits the files' content."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from erase import tensor_files
from erase.classification.data.pixels import read_pixels
from erase.data.images import READER
from erase.errors import EraseError
from erase.progress import progress

Labelled = Sequence[tuple[Path, int]]  # image files with their labels


def decoded(
    folder: Path, parts: Sequence[Labelled], size: int | None, cache_dir: str | Path, *, quiet: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Pixels, uint8, [n, 3, h, w], and labels, int64, [n], of each part, from the cache if they are there.

    The cache file is written whole or not at all. Its name is a hash of the files' names below `folder`, contents and
    labels, so a changed file is decoded again.

    Raises:
        EraseError: an image cannot be read, or, without `size`, images of one part differ in size; or the cache file is
            damaged.
    """
    path = Path(cache_dir) / f"images-{_identity(folder, parts, size)}.safetensors"
    if not path.is_file():
        total = sum(map(len, parts))
        with progress(total, "decode", "images", quiet=quiet) as bar:
            pixels = {f"{number}.x": _stacked(files, size, bar.update) for number, files in enumerate(parts)}
        labels = {f"{number}.y": torch.tensor([y for _, y in files]) for number, files in enumerate(parts)}
        tensor_files.write_tensors(path, pixels | labels, {"kind": "decoded images"})
    try:
        stored, _ = tensor_files.read_own(path, kind="decoded images")
    except EraseError as error:
        raise EraseError(f"{error}; delete it, and the images are decoded again") from error
    return [(stored[f"{number}.x"], stored[f"{number}.y"]) for number in range(len(parts))]


def _identity(folder: Path, parts: Sequence[Labelled], size: int | None) -> str:
    """A hash of everything that the cache file depends on; 60,000 small files take a second."""
    found = hashlib.sha256(json.dumps([READER, size]).encode())
    for files in parts:
        found.update(b"part")
        for path, y in files:
            try:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise EraseError(f"{path} cannot be read ({error.strerror}); repair or remove it") from error
            found.update(json.dumps([path.relative_to(folder).as_posix(), y, content]).encode())
    return found.hexdigest()[:32]


def _stacked(files: Labelled, size: int | None, count: Callable[[], object]) -> Tensor:
    first = read_pixels(files[0][0], str(files[0][0]), size)
    pixels = torch.empty((len(files), *first.shape), dtype=torch.uint8)
    for number, (path, _) in enumerate(files):
        image = read_pixels(path, str(path), size)
        if image.shape != first.shape:
            here, there = ("x".join(map(str, one.shape[1:])) for one in (image, first))
            raise EraseError(f"{path} is {here} pixels, but {files[0][0].name} is {there}; give --size")
        pixels[number] = image
        count()
    return pixels
