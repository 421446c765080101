"""How files reach the disk: whole or not at all, never through a link, the same bytes for the same content."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erase.errors import EraseError, no_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

METADATA_KEY = "erase"  # one key only: safetensors writes several keys in random order
CONTENT = "content"  # in the metadata: `content_hash` of the tensors
ALIGNMENT = 64  # bytes; kernels of the CPU round differently for tensors that begin elsewhere


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
        descriptor = _locked(temporary)
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
        descriptor = _locked_folder(temporary)
    except OSError as error:
        raise _write_error(path, error) from error
    try:
        for left in temporary.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield temporary
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        if _is_at(descriptor, temporary):
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


# --- safetensors ----------------------------------------------------------------------------------------------------


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file: same tensors and metadata, same bytes.

    The data begin at a multiple of 64 bytes however long the header is, so that the tensors of two files of the same
    layout are aligned alike when they are mapped into memory, and a CPU computes the same bits with both.

    metadata: JSON-serialisable; stored as one JSON text under the key "erase", together with a hash of the tensors,
        which `read_tensors` checks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if metadata is not None:
        text = json.dumps({**metadata, CONTENT: content_hash(tensors)}, sort_keys=True)
        header["__metadata__"] = {METADATA_KEY: text}
    names, end = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)), 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        dtype = _SAFETENSORS_NAMES[_dtype_name(tensor)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(_bytes(tensors[name]))


def read_tensors(path: str | Path, *, device: str = "cpu", copied: bool = False) -> dict[str, Any]:
    """All tensors of a safetensors file, aligned, and checked against the hash in its header if it has one.

    copied: return copies. Otherwise the tensors are mapped from the file, and change when it is written to in place.

    Raises:
        EraseError: the file is missing, truncated, altered or not a safetensors file.
    """
    with open_tensors(path, device=device) as file:
        header = _metadata(path, file)
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            tensors = {name: tensor.clone() if copied else aligned(tensor) for name, tensor in tensors.items()}
        except Exception as error:  # safetensors raises several kinds; all are the file's fault
            raise EraseError(f"{path} cannot be read ({error}); copy or download it again") from error
    if CONTENT in header and header[CONTENT] != content_hash(tensors):
        raise EraseError(f"{path} is damaged: its content does not have the hash that its header states")
    return tensors


def aligned(tensor: Any) -> Any:
    """The tensor itself, or a copy of it if it lies in CPU memory and does not begin at a multiple of 64 bytes.

    Tensors of a safetensors file are mapped into memory where they lie in the file, and a CPU can compute other bits
    with the same weights at another place.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def read_own(path: str | Path, *, copied: bool = False, **expected: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a file that this project wrote for itself to read again.

    copied: as in `read_tensors`. expected: what the metadata must say.

    Raises:
        EraseError: the file is missing or damaged, has no hash, or its metadata say something else.
    """
    header = read_metadata(path)
    if CONTENT not in header:
        raise EraseError(f"{path} is damaged: its header has no hash of its content")
    for name, value in expected.items():
        if header.get(name) != value:
            raise EraseError(f"{path} is damaged: its header says {name} {header.get(name)!r} instead of {value!r}")
    return read_tensors(path, copied=copied), header


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_tensors` stored beside the tensors; empty for a file that this project did not write.

    Raises:
        EraseError: the file is missing or damaged.
    """
    with open_tensors(path) as file:
        return _metadata(path, file)


def _metadata(path: str | Path, file: Any) -> dict[str, Any]:
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

    try:
        is_file = Path(path).is_file()
    except OSError as error:
        raise EraseError(f"{path} cannot be read: {error.strerror}") from error
    if not is_file:
        raise EraseError(no_file(path))
    try:
        file = safe_open(path, framework="pt", device=device)
    except PermissionError as error:
        raise EraseError(f"{path} cannot be read: {error.strerror or 'permission denied'}") from error
    except (SafetensorError, OSError) as error:
        raise EraseError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    with file:
        yield file


# --- hashes ---------------------------------------------------------------------------------------------------------


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (64 hexadecimal digits) of names, dtypes, shapes and bit patterns; the order and device do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _dtype_name(tensor), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


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


_SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Any) -> Any:
    """The bytes of a tensor, as a buffer; it shares the memory of a contiguous CPU tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _locked(path: Path) -> int:
    """A descriptor of the file `path`, made if need be, that holds its lock; waits for another process that has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if fcntl is None or _lock(descriptor, path):
            return descriptor


def _locked_folder(path: Path) -> int | None:
    """The same of a folder; None on Windows, which locks no folders."""
    while True:
        path.mkdir(exist_ok=True)
        if fcntl is None:
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        if _lock(descriptor, path):
            return descriptor


def _lock(descriptor: int, path: Path) -> bool:
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
    if _is_at(descriptor, path):
        return True
    os.close(descriptor)
    return False


def _is_at(descriptor: int | None, path: Path) -> bool:
    """Whether `path` is the open file or folder; without a descriptor, whether there is one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return descriptor is None or os.path.samestat(os.fstat(descriptor), found)


def _write_error(path: Path, error: OSError) -> EraseError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "a folder in this path is a file"
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT, None}  # None: a library's own text, mostly of a full disk
    advice = "free some space or choose another folder" if is_full else "choose another folder"
    return EraseError(f"cannot write {path}: {reason}; {advice}")
