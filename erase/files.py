"""How files reach the disk: whole or not at all, never through a link, the same bytes for the same content."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erase.errors import EraseError
from erase.locks import is_at, locked, locked_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    The file is flushed to the disk before the rename. A link at `path` is replaced itself; what it points to stays as
    it is. Each target has one temporary file, `.NAME.partial`, which a lock keeps for one process at a time; the one
    that a killed process left is used again by the next writer.

    Raises:
        EraseError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = locked(temporary)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        os.ftruncate(descriptor, 0)
        if fcntl is None:  # Windows cannot rename an open file
            os.close(descriptor)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if fcntl is not None:
            os.close(descriptor)


@contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """An empty temporary folder beside `path`, deleted at the end unless it was renamed.

    What a killed process left of it is deleted first.

    Raises:
        EraseError: the disk is full or a folder cannot be written.
    """
    path = Path(path)
    temporary = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = locked_folder(temporary)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield temporary
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if is_at(descriptor, temporary):
            shutil.rmtree(temporary)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """An empty temporary folder beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    path: must not exist, or be an empty folder.

    Raises:
        EraseError: the disk is full, a folder cannot be written, or `path` is not empty.
    """
    path = Path(path)
    with scratch_folder(path) as temporary:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.rename(temporary, path)


def partial(path: Path) -> Path:
    """The temporary file or folder of a target."""
    return path.with_name(f".{path.name}.partial")


def is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def refuse_links(folder: str | Path) -> None:
    """Nothing, unless a folder inside `folder` is a link: writing or deleting there would reach something else.

    Raises:
        EraseError: it is one.
    """
    for parent, names, _ in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_symlink():
                raise EraseError(f"{path} is a link to {path.resolve()}; remove the link or choose another folder")


def copy(source: str | Path, target: str | Path) -> None:
    """Copy a file's bytes; `target` appears whole, as a file of its own."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_pickle(path: str | Path, value: Any) -> None:
    """Write `value` with torch.save, for the formats of others that are such files."""
    import torch

    with replacing(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # torch's way to say that the disk is full
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({str(error).splitlines()[0]})") from error


def read_json(path: str | Path, **types: type | tuple[type, ...]) -> dict[str, Any]:
    """The JSON object in a file.

    types: keys that the object must have, with the types of their values.

    Raises:
        EraseError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EraseError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise EraseError(f"{path} holds no JSON object; copy or download it again")
    for name, kind in types.items():
        if not isinstance(value.get(name), kind):
            found = f"is {str(value[name])[:40]!r}" if name in value else "is missing"
            raise EraseError(f"{path} is damaged: {name!r} {found}; copy or download it again")
    return value


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def default_cache_dir() -> Path:
    """$ERASE_CACHE, else erase-concept under $XDG_CACHE_HOME or ~/.cache.

    Raises:
        EraseError: neither variable is set, and the user has no home folder.
    """
    if os.environ.get("ERASE_CACHE"):
        return Path(os.environ["ERASE_CACHE"])
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise EraseError("this user has no home folder; say where to keep caches by ERASE_CACHE=DIR") from error
    return Path(base) / "erase-concept"


def _write_error(path: Path, error: OSError) -> EraseError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a folder in this path is a file"
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, None}  # None: a library's own text, mostly of a full disk
    advice = "free some space or choose another folder" if is_full else "choose another folder"
    return EraseError(f"cannot write {path}: {reason}; {advice}")
