"""Lines of JSON on disk that several processes may write, whole after a crash."""

import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from erase.errors import EraseError
from erase.evaluation import shapes

_BEYOND = (
    2**31 - 2
)  # the byte that Windows locks; others cannot read a locked byte, so it is beyond the end of any file


def read_lines(path: Path, shape: Any = None) -> list[dict[str, Any]]:
    """The JSON lines of a file; an unterminated last one, which a crash leaves, does not count.

    shape: that each line must have, see `shapes`; by default any JSON object.

    Raises:
        EraseError: any other line that is no JSON object, or not of this shape.
    """
    if not path.exists():
        return []
    try:
        *whole, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise EraseError(f"{path} cannot be read ({error.strerror})") from error
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            value = json.loads(line)
            shapes.check(value, shape or {"*": Any}, "the line")
        except (ValueError, RecursionError) as error:  # EraseError is a ValueError
            raise EraseError(f"{path}, line {number}: {error}; the file is damaged, delete it and run again") from error
        lines.append(value)
    return lines


class Appender:
    """Adds JSON lines to a file, whole and on the disk when `write` returns; only one process at a time may.

    Raises:
        EraseError: another process is writing to the file.
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "Appender":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "ab")
        if not lock_file(self._file, wait=False):
            self._file.close()
            raise EraseError(f"{self._path} is being written by another process; wait for it or stop it")
        content = self._path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)  # the torn line of a crash
        return self

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise EraseError(f"cannot write {self._path}: {error.strerror}; free some space") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


def lock_file(file: IO[Any], *, wait: bool) -> bool:
    """Keep other processes out until `file`, open for writing, is closed; False if one has it and `wait` is not set."""
    while not _is_locked(file):
        if not wait:
            return False
        time.sleep(0.1)
    return True


def _is_locked(file: IO[Any]) -> bool:
    """Whether the file is this process's now. Where the file system has no locks, every process gets it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process works on this folder; waits for one that does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        lock_file(lock, wait=True)
        yield
