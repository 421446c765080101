"""Text for users: file names, lists, articles, did-you-mean."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from erase.errors import EraseError
from erase.files import text_hash

_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?")  # no file names on Windows


def slug(name: str) -> str:
    """The name as the name of one file or folder, below whatever folder it is put in.

    Letters, digits, "-" and "." stay as they are; everything else becomes "_". A name of more than 80 bytes, or one
    without any letter or digit, ends in a part of its hash, so that different names stay different.

    Raises:
        EraseError: the name is empty.
    """
    if not name.strip():
        raise EraseError("a concept needs a name, such as 'golf ball'")
    plain = unicodedata.normalize("NFC", " ".join(name.split()))
    plain = re.sub(r"[^\w.-]", "_", plain).strip(".")
    if len(plain.encode()) <= 80 and re.search(r"[^\W_]", plain) and not _RESERVED.fullmatch(plain):
        return plain
    return f"{plain.encode()[:64].decode(errors='ignore').strip('._-') or 'concept'}-{text_hash(name)[:12]}"


def listed(items: Sequence[str], joint: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {joint} {items[-1]}"


def counted(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def closest(name: str, known: Iterable[str], *, num: int = 1, cutoff: float = 0.6) -> list[str]:
    """At most `num` of the known names that a misspelt one may stand for, the closest first.

    cutoff: how close they must be, in [0, 1]; see `difflib.get_close_matches`.
    """
    return difflib.get_close_matches(name, list(known), n=num, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean salun? " with the closest of the known names, or "" if none is close."""
    return "".join(f"did you mean {guess}? " for guess in closest(name, known))


def article(text: str) -> str:
    """ "an" if the text starts with the sound of a vowel, else "a"."""
    start = text.lower()
    if start.startswith(("eu", "one", "uni", "use", "uku")):
        return "a"
    return "an" if start[:1] in set("aeiou") or start.startswith(("hour", "heir", "honest")) else "a"
