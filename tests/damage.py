"""Ways in which a file that we wrote can be damaged; all must be noticed by whoever reads it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from erase import tensor_files


def _bytes(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        changed = change(content)
        path.write_bytes(content if changed is None else changed)

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    """Another content under the old header, in a file that is whole."""

    def damage(path: Path) -> None:
        header = tensor_files.read_metadata(path)
        tensors = {name: tensor.clone() for name, tensor in tensor_files.read_tensors(path).items()}
        change(tensors, max(tensors, key=lambda name: tensors[name].numel()))
        save_file(tensors, path, {tensor_files.METADATA_KEY: json.dumps(header)})

    return damage


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, tensors = tensor_files.read_metadata(path), tensor_files.read_tensors(path)
        change(header)
        save_file(tensors, path, {tensor_files.METADATA_KEY: json.dumps(header)})

    return damage


def _plain(path: Path) -> None:
    save_file(tensor_files.read_tensors(path), path)


def _flip(where: int) -> Callable[[bytearray], None]:
    def flip(content: bytearray) -> None:
        content[where] ^= 1

    return flip


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": _bytes(lambda content: b""),
    "text": _bytes(lambda content: b"hello\n"),
    "a pickle": lambda path: torch.save({"losses": []}, path),
    "zeros": _bytes(lambda content: bytes(len(content))),
    "truncated": _bytes(lambda content: content[:-1]),
    "half": _bytes(lambda content: content[: len(content) // 2]),
    "header cut": _bytes(lambda content: content[:30]),
    "longer": _bytes(lambda content: content + b"\0"),
    "length of the header": _bytes(lambda content: struct.pack("<Q", 1 << 60) + content[8:]),
    "flipped last bit": _bytes(_flip(-1)),
    "flipped bit of the header": _bytes(_flip(30)),
    "a folder": _folder,
    "a tensor of zeros": _tensors(lambda tensors, name: tensors[name].zero_()),
    "1 added": _tensors(lambda tensors, name: tensors[name].add_(1)),
    "nan": _tensors(lambda tensors, name: tensors.update({name: torch.full_like(tensors[name].float(), torch.nan)})),
    "another dtype": _tensors(lambda tensors, name: tensors.update({name: tensors[name].half()})),
    "a row less": _tensors(lambda tensors, name: tensors.update({name: tensors[name][1:].clone()})),
    "another shape": _tensors(lambda tensors, name: tensors.update({name: tensors[name][None].clone()})),
    "a tensor less": _tensors(lambda tensors, name: tensors.pop(name)),
    "a tensor more": _tensors(lambda tensors, name: tensors.update(extra=torch.zeros(1))),
    "another name": _tensors(lambda tensors, name: tensors.update(extra=tensors.pop(name))),
    "no header": _plain,
    "no hash": _header(lambda header: header.pop(tensor_files.CONTENT)),
    "another hash": _header(lambda header: header.update({tensor_files.CONTENT: "0" * 64})),
    "another kind": _header(lambda header: header.update(kind="something else")),
}
