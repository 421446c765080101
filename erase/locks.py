"""Locks on files and folders that processes share."""

import errno
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from pathlib import Path


def locked(path: Path) -> int:
    """A descriptor of the file `path`, made if need be, that holds its lock; waits for another process that has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if fcntl is None or lock(descriptor, path):
            return descriptor


def locked_folder(path: Path) -> int | None:
    """The same of a folder; None on Windows, which locks no folders."""
    while True:
        path.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        if lock(descriptor, path):
            return descriptor


def lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder; False, and closed, if it is no longer at `path` when the lock is free.

    Where the file system has no locks, two processes must not write the same target at once.
    """
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            os.close(descriptor)
            raise
    if is_at(descriptor, path):
        return True
    os.close(descriptor)
    return False


def is_at(descriptor: int | None, path: Path) -> bool:
    """Whether `path` is the open file or folder; without a descriptor, whether there is one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return descriptor is None or os.path.samestat(os.fstat(descriptor), found)
