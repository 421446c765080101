"""Images from a folder or from a `datasets` name, with their captions."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase.data import captions, images, prompt_files
from erase.errors import EraseError, missing


@dataclass(frozen=True)
class SourceImage:
    """One image, by file or by the bytes of a data set's row, with a name for messages.

    repeats: how many times it counts.
    """

    name: str
    path: Path | None = None
    content: bytes = b""
    repeats: int = 1

    def digest(self) -> str:
        with self._readable():
            return hashlib.sha256(images.content(self.path) if self.path else self.content).hexdigest()

    def pixels(self, size: int) -> Tensor:
        """[3, size, size] in [-1, 1]: shorter side resized (bicubic), centre cut out.

        Raises:
            EraseError: the image cannot be read.
        """
        with self._readable():
            pixels = images.read(self.path or self.content)
        return torch.from_numpy(images.square(pixels, size)).float().permute(2, 0, 1) / 127.5 - 1

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except images.BadImage as error:
            raise EraseError(f"cannot read the image {self.name} ({error.reason}); repair or remove it") from error


def list_images(source: str, tell: Callable[[str], None] = lambda line: None) -> list[tuple[SourceImage, str | None]]:
    """The images of a folder, or of a data set on the hub, with their captions (captions.py) where they have one.

    tell: called with a line about the source of the captions.

    Raises:
        EraseError: no such folder, no image in it, captions that fit no image.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return _from_datasets(source)
    found, summary = captions.read(folder)
    tell(summary)
    return [(SourceImage(str(one.path), one.path, repeats=one.repeats), one.text) for one in found]


def _from_datasets(name: str) -> list[tuple[SourceImage, str | None]]:
    try:
        from datasets import Image as Column
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", f"{name}: no such folder, and a data set of the hub is read with datasets") from error
    try:
        rows: Any = load_dataset(name, split="train").cast_column("image", Column(decode=False))
    except Exception as error:  # the hub client's and datasets' errors share no class
        raise EraseError(
            f"{name}: no such folder, and not a data set with a column 'image' ({' '.join(str(error).split())[:300]})"
        ) from error
    images = []
    for number, line in enumerate(rows):
        given = (line.get(name) for name in prompt_files.COLUMNS["prompt"])
        text = next((value for value in given if isinstance(value, str) and value.strip()), None)
        image = line["image"] or {}  # an empty row
        path = Path(image["path"]) if image.get("path") and not image.get("bytes") else None
        images.append((SourceImage(f"{name}[{number}]", path, image.get("bytes") or b""), text))
    if not images:
        raise EraseError(f"the data set {name} is empty")
    return images
