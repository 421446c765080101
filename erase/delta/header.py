"""The header of a delta's file: the base model, the result, and how the change was made."""
# pyright: strict

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from erase.errors import EraseError
from erase.tensor_files import CONTENT

Layout = dict[str, tuple[str, tuple[int, ...]]]

FORMAT = 1  # that of version 0.1.0 too
_FORMAT_TEXT = re.compile(r"erase delta (\d{1,9})")
_KIND = "exact"  # the header's word for a delta that restores every bit
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


@dataclass(frozen=True)
class Header:
    """What a delta's file says of itself.

    layout: dtype and shape of every tensor of the base model, changed or not.
    base_hash, result_hash: `content_hash` of the model before and after.
    provenance: how it was made (JSON-serialisable); "made_for" names the base model in error messages.
    more: fields that this version does not know; they are kept when the delta is saved again.
    """

    layout: Layout
    base_hash: str
    result_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_json(self) -> dict[str, Any]:
        """The header as `write_tensors` stores it."""
        known = {"format": f"erase delta {FORMAT}", "kind": _KIND, "layout": self.layout}
        hashes = {"base_hash": self.base_hash, "result_hash": self.result_hash}
        return {**self.more, **known, "provenance": self.provenance, **hashes}


def header_from_json(stored: Mapping[str, Any], path: object) -> Header:
    """The header that a file's metadata hold.

    path: of the file, for error messages.

    Raises:
        EraseError: it is no delta's, of a later version, or damaged.
    """
    found = _FORMAT_TEXT.fullmatch(str(stored.get("format")))
    if found is None:
        raise EraseError(f"{path} is not a delta: its header does not say 'erase delta {FORMAT}'")
    if int(found[1]) > FORMAT:
        raise EraseError(
            f"{path} has delta format {found[1]}, which a later version wrote; this one reads up to {FORMAT}"
        )
    for problem in _problems(stored):
        raise EraseError(f"{path} is damaged: its header {problem}; copy or create it again")
    layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in stored["layout"].items()}
    known = {"format", "kind", "layout", "base_hash", "result_hash", "provenance", CONTENT}
    more = {name: value for name, value in stored.items() if name not in known}
    return Header(layout, stored["base_hash"], stored["result_hash"], stored["provenance"], more)


def _problems(header: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or of another type in the header of a delta's file."""
    if header.get("kind") != _KIND:
        yield f"says that the delta is {header.get('kind')!r:.40}, not {_KIND}"
    for name in ("base_hash", "result_hash"):
        value = header.get(name)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            yield f"has {name} {value!r:.40} instead of 64 hexadecimal digits"
    provenance = header.get("provenance")
    if not isinstance(provenance, dict) or not isinstance(
        cast(dict[str, Any], provenance).get("concept", ""), dict | str
    ):
        yield "does not say how the delta was made (provenance)"
    layout = header.get("layout")
    if not isinstance(layout, dict) or not layout:
        yield "has no layout of the base model"
        return
    for name, entry in cast(dict[str, Any], layout).items():
        if not isinstance(entry, list) or len(cast(list[Any], entry)) != 2:
            yield f"gives {name!r:.80} no dtype and shape"
            continue
        dtype, shape = cast(list[Any], entry)
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            yield f"gives {name!r:.80} the dtype {dtype!r:.40}"
        if not isinstance(shape, list) or not all(
            type(size) is int and 0 <= size < 2**40 for size in cast(list[Any], shape)
        ):
            yield f"gives {name!r:.80} the shape {shape!r:.40}"
