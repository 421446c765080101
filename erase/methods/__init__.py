"""Erasure methods: one paper, one file; each a frozen dataclass whose `loss` is the paper's formula."""

import difflib

from erase.errors import EraseError

# name -> "file:Class"; one new method is one new file and one line here
METHODS: dict[str, str] = {
    "salun": "relabel:Relabel",
    "relabel": "relabel:Relabel",
}


def load(name: str) -> type:
    """The class of a method.

    Raises:
        EraseError: no such method.
    """
    from importlib import import_module

    if name not in METHODS:
        guess = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise EraseError(f"unknown method {name!r}{hint} ({', '.join(sorted(METHODS))})")
    module, class_name = METHODS[name].split(":")
    return getattr(import_module(f"erase.methods.{module}"), class_name)
