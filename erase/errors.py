"""The error for everything that a user can cause and correct, and how text from elsewhere is printed."""
# pyright: strict

from pathlib import Path


class EraseError(ValueError):
    """Bad input. The message says what is wrong, where, and what would be right; the command exits with code 2."""


def missing(package: str, problem: str | None = None) -> EraseError:
    """The error for an optional package that is not installed; it says how to install it.

    package: its name on the package index. problem: what cannot be done without it.
    """
    return EraseError(f"{problem or f'{package} is not installed'}; pip install {package}")


def no_file(path: str | Path) -> str:
    """Why a path is no file, for a message: it does not exist, or is a folder."""
    return f"{path} is a folder; a file is needed" if Path(path).is_dir() else f"{path}: no such file"


def printable(text: object) -> str:
    """Text from a file or an argument as it may be printed: control characters are escaped, as in `repr`.

    A terminal executes escape sequences, and some Unicode characters reverse the direction of what follows.
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))
