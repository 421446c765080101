"""Captions of an image folder: metadata.csv or metadata.jsonl, text files beside images, and names of folders.

    metadata.csv       file_name,text    columns as in any prompt file (prompt_files.py); metadata.jsonl likewise
    a.png, a.txt       the caption of a.png (.txt or .caption)
    church/a.png       "an image of a church"
    10_red circle/a.png   "red circle", and each image counts ten times: kohya's repeats

The first of these that names an image captions it.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from erase.data import images, prompt_files
from erase.errors import EraseError
from erase.words import article

METADATA = ("metadata.csv", "metadata.jsonl")
SUFFIXES = (".txt", ".caption")
_REPEATS = re.compile(r"([1-9]\d*)_(.+)")  # 01_church is a number and no count
_MAX_REPEATS = 1000


@dataclass(frozen=True)
class Captioned:
    """An image file, its caption or None, and how many times it counts."""

    path: Path
    text: str | None
    repeats: int = 1


def read(folder: Path) -> tuple[list[Captioned], str]:
    """All images of a folder with their captions, and one line that says where the captions come from.

    Raises:
        EraseError: no image; a caption that names no image, or an image that has two.
    """
    files = images.list_files(folder)
    paths = images.image_files(folder)
    if not paths:
        raise EraseError(f"{folder} holds no image ({', '.join(sorted(images.SUFFIXES))})")
    metadata = _metadata([path for path in files if path.name in METADATA], set(paths))
    beside = _beside([path for path in files if path.suffix.lower() in SUFFIXES], paths)
    found, sources = [], {"metadata": 0, "text files beside them": 0, "names of their folders": 0}
    for path in paths:
        name, repeats = _of_folder(path.parent.name) if path.parent != folder else (None, 1)
        for source, text in zip(sources, (metadata.get(path), beside.get(path), name), strict=True):
            if text:
                sources[source] += 1
                break
        found.append(Captioned(path, text or None, repeats))
    return found, _summary(folder, found, sources)


def files_of(folder: Path) -> set[Path]:
    """The files of an image folder that hold captions."""
    stems = {path.with_suffix("") for path in images.image_files(folder)}
    return {path for path in images.list_files(folder) if path.name in METADATA or _is_beside(path, stems)}


def _is_beside(path: Path, stems: Collection[Path]) -> bool:
    return path.suffix.lower() in SUFFIXES and path.with_suffix("") in stems


def _metadata(sources: Sequence[Path], paths: set[Path]) -> dict[Path, str]:
    texts: dict[Path, str] = {}
    for source in sources:
        for row in prompt_files.read(source, prompts_only=True, allow_blank=True).rows:
            where, name = f"{source}, line {row.line}", row.facts.get("file_name")
            if not isinstance(name, str) or not name:
                raise EraseError(
                    f"{where}: no file_name; the columns file_name and text are needed, as in 'a.png,a church'"
                )
            image = source.parent / name
            if image not in paths:
                raise EraseError(f"{where}: there is no image {name!r}; correct the line or remove it")
            if image in texts:
                raise EraseError(f"{where}: {name!r} already has a caption; remove one of the two")
            texts[image] = row.prompt.strip()
    return texts


def _beside(sources: Sequence[Path], paths: Sequence[Path]) -> dict[Path, str]:
    by_stem: dict[Path, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(path.with_suffix(""), []).append(path)
    captioned = {source.parent for source in sources if _is_beside(source, by_stem)}
    texts: dict[Path, str] = {}
    for source in sources:
        if source.parent not in captioned:
            continue  # other text files
        named = by_stem.get(source.with_suffix(""))
        if named is None:
            raise EraseError(
                f"{source} is a caption without an image: no image beside it has this name; remove the file"
            )
        if named[0] in texts:
            raise EraseError(f"{named[0]} has two captions, a .txt and a .caption file; remove one of them")
        texts |= dict.fromkeys(named, " ".join(prompt_files.text_of(source).split()))
    return texts


def _of_folder(name: str) -> tuple[str, int]:
    """The caption that a folder's name gives its images, and how many times each of them counts."""
    kohya = _REPEATS.fullmatch(name)
    if kohya:
        repeats = int(kohya[1])
        if repeats > _MAX_REPEATS:
            raise EraseError(
                f"the folder {name!r} means {repeats:,} repeats of its images; rename it (at most {_MAX_REPEATS:,})"
            )
        return kohya[2].replace("_", " "), repeats
    label = re.sub(r"^\d+_(?=.)", "", name).replace("_", " ")
    return f"an image of {article(label)} {label}", 1


def _summary(folder: Path, found: Sequence[Captioned], sources: dict[str, int]) -> str:
    parts = [f"{num:,} caption{'s' * (num != 1)} from {source}" for source, num in sources.items() if num]
    bare = sum(image.text is None for image in found)
    if bare:
        parts.append(f"{bare:,} without a caption, which get the concept's prompts in turn")
    total = sum(image.repeats for image in found)
    if total > len(found):
        parts.append(f"{total:,} images including the repeats of folder names")
    return f"{folder}: {len(found):,} image{'s' * (len(found) != 1)}; {'; '.join(parts)}"
