"""The header of a mask's file: which weights it is for, how many may change, and how it was made."""
# pyright: strict

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from erase.errors import EraseError
from erase.tensor_files import CONTENT

FORMAT = 1  # version 0.1.0 wrote the same fields without a number


@dataclass(frozen=True)
class Header:
    """What a mask's file says of itself.

    shapes: of the masked weights by name, in the order of the parameters. ones: how many weights may change.
    made: how it was made (JSON-serialisable), such as "base", "base_hash", "density" and "seed"; fields that this
        version does not know are kept here.
    """

    shapes: Mapping[str, tuple[int, ...]]
    ones: int
    made: Mapping[str, Any]

    @property
    def total(self) -> int:
        """How many weights the mask covers."""
        return sum(map(math.prod, self.shapes.values()))

    def as_json(self) -> dict[str, Any]:
        """The header as `write_tensors` stores it."""
        shapes = [[name, list(shape)] for name, shape in self.shapes.items()]
        known = {"kind": "mask", "format": FORMAT, "shapes": shapes, "total": self.total, "ones": self.ones}
        return {**self.made, **known}


def header_from_json(stored: Mapping[str, Any], path: object) -> Header:
    """The header that a file's metadata hold.

    path: of the file, for error messages.

    Raises:
        EraseError: it is no mask's, of a later version, or damaged.
    """
    if stored.get("kind") != "mask":
        raise EraseError(f"{path} is not a mask: its header does not say how it was made")
    found = stored.get("format", 1)
    if type(found) is int and found > FORMAT:
        raise EraseError(f"{path} has mask format {found}, which a later version wrote; this one reads up to {FORMAT}")
    for problem in _problems(stored):
        raise EraseError(f"{path} is damaged: its header {problem}; copy or create it again")
    shapes = {name: tuple(shape) for name, shape in stored["shapes"]}
    known = {"kind", "format", "shapes", "total", "ones", CONTENT}
    return Header(shapes, stored["ones"], {name: value for name, value in stored.items() if name not in known})


def _problems(header: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or of another type in the header of a mask's file."""
    shapes = header.get("shapes")
    pairs = cast(list[list[Any] | None], shapes if isinstance(shapes, list) and shapes else [None])
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            yield "has no names and shapes of the masked weights"
        elif not isinstance(pair[1], list) or not all(
            type(size) is int and 0 <= size < 2**40 for size in cast(list[Any], pair[1])
        ):
            yield f"gives {pair[0]!r:.80} the shape {pair[1]!r:.40}"
    if len({str(pair[0]) for pair in pairs if isinstance(pair, list) and pair}) != len(pairs):
        yield "names a weight twice"
    if type(header.get("format", 1)) is not int or header.get("format", 1) < 1:
        yield f"has the format {header['format']!r:.40}"
    if type(header.get("ones")) is not int:
        yield f"says that the mask has {header.get('ones')!r:.40} ones"
    for name in ("base", "base_hash"):
        if not isinstance(header.get(name), str | None):
            yield f"has {name} {header[name]!r:.40}, which is not a string"
