"""Masks in memory and in files, one bit per weight; ours and SalUn's .pt format."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase import files, tensor_files
from erase.errors import EraseError, no_file
from erase.masks.header import Header, header_from_json

Mask = dict[str, torch.Tensor]


def count(mask: Mapping[str, torch.Tensor]) -> int:
    """How many weights the mask allows to change."""
    if isinstance(mask, Packed):
        return sum(int(np.bitwise_count(packed.numpy()).sum()) for packed in mask.bits.values())
    return sum(int(bits.count_nonzero()) for bits in mask.values())


def union(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> Mask:
    """The union of two masks, for the tensors of `a`; tensors that `b` lacks are those of `a`."""
    return {name: bits | b[name].to(bits.device) if name in b else bits for name, bits in a.items()}


def iou(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Intersection over union of two masks of the same tensors, in [0, 1]; NaN when both are empty."""
    union = sum(int((a[name] | b[name]).count_nonzero()) for name in a)
    return sum(int((a[name] & b[name]).count_nonzero()) for name in a) / union if union else math.nan


def fraction_by_block(mask: Mapping[str, torch.Tensor], block: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    """(ones, weights) of every block, where `block` says to which one a parameter's name belongs."""
    blocks: dict[str, tuple[int, int]] = {}
    for name, bits in mask.items():
        ones, total = blocks.get(block(name), (0, 0))
        blocks[block(name)] = (ones + int(bits.count_nonzero()), total + bits.numel())
    return blocks


class Packed(Mapping[str, torch.Tensor]):
    """A mask in one bit a weight: what a bool mask is, an eighth of its size; every look at a tensor unpacks it."""

    def __init__(self, packed: Mapping[str, torch.Tensor], shapes: Mapping[str, Sequence[int]]):
        self.bits, self._shapes = packed, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = tuple(self._shapes[name])
        return torch.from_numpy(np.unpackbits(self.bits[name].numpy(), count=math.prod(shape)).view(np.bool_)).view(
            shape
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def pack(mask: Mapping[str, torch.Tensor]) -> Packed:
    """uint8 [ceil(n / 8)] for a tensor of n weights, first bit highest."""
    if isinstance(mask, Packed):
        return mask
    packed = {name: torch.from_numpy(np.packbits(bits.cpu().numpy().reshape(-1))) for name, bits in mask.items()}
    return Packed(packed, {name: tuple(bits.shape) for name, bits in mask.items()})


def save(path: str | Path, mask: Mapping[str, torch.Tensor], made: Mapping[str, Any]) -> None:
    """Write a mask in one bit a weight: safetensors, uint8 [ceil(n / 8)] for a tensor of n weights, first bit highest.

    made: JSON-serialisable; how the mask was made ("base" and "base_hash" are what `check` looks at). The header adds
        "format", "shapes" (pairs of name and shape, in parameter order), "total" (weights) and "ones".
    """
    shapes = {name: tuple(bits.shape) for name, bits in mask.items()}
    tensor_files.write_tensors(path, pack(mask).bits, Header(shapes, count(mask), made).as_json())


def load(path: str | Path) -> tuple[Packed, Header]:
    """The mask of a file that `save` wrote, on the CPU, and its header.

    Raises:
        EraseError: the file is missing, damaged or no mask.
    """
    header = header_from_json(tensor_files.read_metadata(path), path)
    packed = tensor_files.read_tensors(path)
    shapes = header.shapes
    if packed.keys() != shapes.keys():
        raise EraseError(f"{path} is damaged: header and content disagree about the names of its tensors")
    for name, shape in shapes.items():
        data, n = packed[name], math.prod(shape)
        need = math.ceil(n / 8)
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise EraseError(f"{path} is damaged: '{name}' is not stored as a row of bytes")
        if data.numel() != need:
            raise EraseError(f"{path} is damaged: '{name}' has {data.numel()} bytes where {n} weights take {need}")
    mask = Packed({name: packed[name] for name in shapes}, shapes)
    if count(mask) != header.ones:
        raise EraseError(f"{path} is damaged: it has {count(mask)} ones, but its header says {header.ones}")
    return mask, header


def check(
    mask: Mapping[str, torch.Tensor],
    made: Mapping[str, Any],
    parameters: Mapping[str, torch.Tensor],
    *,
    base_hash: str | None = None,
) -> None:
    """Nothing, when a loaded mask fits the model; a mask may cover fewer tensors than `parameters` has.

    made: how the mask was made, as its header says. base_hash: the model's hash, compared with the "base_hash" there.

    Raises:
        EraseError: a tensor of the mask is missing or has another shape, or the mask was made for another model.
    """
    made_for = f"which was made for {made.get('base', 'another model')}"
    for name, bits in mask.items():
        if name not in parameters:
            raise EraseError(f"'{name}' is in the mask, {made_for}, but not here")
        here = parameters[name]
        if bits.numel() != here.numel():
            raise EraseError(f"'{name}' has {here.numel()} weights here but {bits.numel()} in the mask, {made_for}")
        if bits.shape != here.shape:
            raise EraseError(f"'{name}' has shape {[*here.shape]} here but {[*bits.shape]} in the mask, {made_for}")
    recorded = made.get("base_hash")
    if base_hash and recorded and base_hash != recorded:
        raise EraseError(f"the mask was made for weights {recorded[:12]}, but this model is {base_hash[:12]}")


def save_reference(path: str | Path, mask: Mapping[str, torch.Tensor], rename: Callable[[str], str]) -> None:
    """Write the layout of SalUn's code: torch.save of {name: int64 zeros and ones}, eight bytes a weight."""
    files.write_pickle(path, {rename(name): bits.cpu().long() for name, bits in mask.items()})


def load_reference(path: str | Path, rename: Callable[[str], str]) -> Mask:
    """The mask of a file in the layout of SalUn's code, of any dtype, in the file's order and shapes.

    rename: from the file's names to the model's.

    Raises:
        EraseError: the file is missing, cannot be read, or holds anything but tensors of zeros and ones.
    """
    if not Path(path).is_file():
        raise EraseError(no_file(path))
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise EraseError(f"{path} cannot be read as a file of torch.save ({reason})") from error
    if not isinstance(stored, dict) or not stored or not all(map(_is_plain, stored.items())):
        raise EraseError(f"{path} is not a mask: a mask is a dict of tensors")
    for name, bits in stored.items():
        if not ((bits == 0) | (bits == 1)).all():
            raise EraseError(f"{path} is not a mask: '{name}' has values other than 0 and 1")
    return {rename(name): bits.bool() for name, bits in stored.items()}


def _is_plain(item: tuple[Any, Any]) -> bool:
    name, bits = item
    if not isinstance(name, str) or not torch.is_tensor(bits):
        return False
    return bits.layout == torch.strided and not (bits.is_complex() or bits.is_quantized or bits.is_meta)
