"""safetensors files with hashes, written atomically and checked when read."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erase.errors import EraseError, no_file
from erase.files import replacing

METADATA_KEY = "erase"  # one key only: safetensors writes several keys in random order
CONTENT = "content"  # in the metadata: `content_hash` of the tensors
ALIGNMENT = 64  # bytes; kernels of the CPU round differently for tensors that begin elsewhere


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: same tensors and metadata, same bytes.

    The data begin at a multiple of 64 bytes however long the header is, so that the tensors of two files of the same
    layout are aligned alike when they are mapped into memory, and a CPU computes the same bits with both.

    metadata: JSON-serialisable; stored as one JSON text under the key "erase", together with a hash of the tensors,
        which `read_tensors` checks.
    labels: further entries of the header, which other software looks for.
    """
    entries = {"format": "pt"} if metadata is None else {}
    if metadata is not None:
        entries[METADATA_KEY] = json.dumps({**metadata, CONTENT: content_hash(tensors)}, sort_keys=True)
    header: dict[str, Any] = {"__metadata__": entries | dict(sorted((labels or {}).items()))}
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


class OneByOne(Mapping[str, Any]):
    """The tensors of safetensors files in float32, by name; each is read when it is asked for, and none is kept.

    Raises:
        EraseError: a file is missing or not a whole safetensors file.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self._paths: dict[str, str | Path] = {}
        for path in paths:
            with open_tensors(path) as file:
                self._paths |= dict.fromkeys(file.keys(), path)
        self._headers = {path: _header(path) for path in self._paths.values()}

    def __getitem__(self, name: str) -> Any:
        import torch

        path = self._paths[name]
        start, header = self._headers[path]
        entry = header[name]
        begin, end = entry["data_offsets"]
        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[entry["dtype"]])
        tensor = torch.empty(entry["shape"], dtype=dtype)  # aligned, see `aligned`
        if tensor.numel():
            with open(path, "rb") as file:
                file.seek(start + begin)
                if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != end - begin:
                    raise EraseError(f"{path} is not a whole safetensors file; copy or download it again")
        return tensor.float() if dtype.is_floating_point else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _header(path: str | Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


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


def content_hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (64 hexadecimal digits) of names, dtypes, shapes and bit patterns; the order and device do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, _dtype_name(tensor), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


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
_TORCH_NAMES = {theirs: ours for ours, theirs in _SAFETENSORS_NAMES.items()}


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Any) -> Any:
    """The bytes of a tensor, as a buffer; it shares the memory of a contiguous CPU tensor."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
