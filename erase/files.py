"""How files reach the disk: whole or not at all, readable by others, the same bytes for the same content."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erase.errors import EraseError

METADATA_KEY = "erase"  # one key only: safetensors writes several keys in random order


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    The file is flushed to the disk before the rename and gets the mode that the umask asks for.

    Raises:
        EraseError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
    except OSError as error:
        raise _write_error(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are an error, because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        EraseError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EraseError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise EraseError(f"{path} holds no JSON object; copy or download it again")
    return value


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file: same tensors and metadata, same bytes.

    metadata: JSON-serialisable; stored as one JSON text under the key "erase".
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {"format": "pt"} if metadata is None else {METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, header)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: str | Path, *, device: str = "cpu") -> dict[str, Any]:
    """All tensors of a safetensors file.

    Raises:
        EraseError: the file is missing, truncated or not a safetensors file.
    """
    with open_tensors(path, device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_tensors` stored beside the tensors; empty for a file that this project did not write.

    Raises:
        EraseError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EraseError(f"the header of {path} is damaged ({error}); copy or download it again") from error
    if not isinstance(header, dict):
        raise EraseError(f"the header of {path} is damaged (it is no JSON object); copy or download it again")
    return header


@contextmanager
def open_tensors(path: str | Path, *, device: str = "cpu") -> Iterator[Any]:
    """`safetensors.safe_open`, with one clear line for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise EraseError(f"{path}: no such file")
    try:
        file = safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise EraseError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    with file:
        yield file


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(path: Path, error: OSError) -> EraseError:
    reason = error.strerror or str(error)
    return EraseError(f"cannot write {path}: {reason}; free some space or choose another folder")
