"""The exact change from one model to another: made, applied, removed, saved and loaded.

A delta keeps, of every tensor that changed, one bit a weight (did it change?) and the XOR of the old and the
new bit patterns of those that did. XOR undoes itself: the delta that makes the new model from the base also brings
the base back, without a copy of it. (`base + (new - base)` would not be `new` in floating point.)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase.delta.header import Header, Layout, header_from_json
from erase.errors import EraseError
from erase.tensor_files import content_hash, read_metadata, read_tensors, write_tensors

State = Mapping[str, Tensor]

_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a weight: integers as wide


@dataclass(frozen=True, eq=False)
class Delta:
    """A change from one model to another.

    tensors: for each changed tensor `name.bitmap`, uint8, [ceil(n / 8)], lowest bit first, one where a weight changed,
        and `name.values`, [changed], in order: integers as wide as the weights.
    header: which model it was made from, which one it leads to, and how it was made.
    """

    tensors: State
    header: Header

    @property
    def layout(self) -> Layout:
        return self.header.layout

    @property
    def base_hash(self) -> str:
        return self.header.base_hash

    @property
    def result_hash(self) -> str:
        return self.header.result_hash

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.header.provenance

    @property
    def component(self) -> str:
        """The component of the pipeline that changed, such as "unet"."""
        return next(iter(self.layout)).partition(".")[0]

    @property
    def changed(self) -> dict[str, int]:
        """How many weights of each changed tensor changed; tensors that did not change are absent."""
        values = {name: self.tensors.get(f"{name}.values") for name in self.layout}
        return {name: tensor.numel() for name, tensor in values.items() if tensor is not None}

    @property
    def total(self) -> int:
        """How many weights the base model has."""
        return sum(math.prod(shape) for _, shape in self.layout.values())


def difference(base: State, new: State, provenance: Mapping[str, Any] | None = None) -> Delta:
    """The delta from `base` to `new`.

    Bit patterns are compared, not values: 0.0 and -0.0 differ, and a NaN equals itself. Of each state one tensor at a
    time is used, so a mapping that reads its tensors from files is never in memory as a whole.

    Raises:
        EraseError: names, shapes or dtypes differ.
    """
    layout = layout_of(base)
    require_layout(layout_of(new), layout, "the base model")
    tensors: dict[str, Tensor] = {}
    for name in sorted(base):
        _put(tensors, name, _patterns(base[name]) ^ _patterns(new[name]))
    return Delta(tensors, Header(layout, content_hash(base), content_hash(new), dict(provenance or {})))


def apply(state: State, delta: Delta) -> dict[str, Tensor]:
    """The erased model, bit for bit. Tensors that did not change are those of `state`, not copies.

    Raises:
        EraseError: `state` is not the very model that the delta was made from, or the delta is damaged.
    """
    done = f"to which {_origin(delta)}, is already applied"
    return _switch(state, delta, delta.base_hash, delta.result_hash, "applied to", done)


def remove(state: State, delta: Delta) -> dict[str, Tensor]:
    """The base model, bit for bit, from the erased one. Tensors that did not change are those of `state`, not copies.

    Raises:
        EraseError: `state` is not the very model that the delta leads to, or the delta is damaged.
    """
    done = f"the base model of {_origin(delta)}: there is nothing to remove"
    return _switch(state, delta, delta.result_hash, delta.base_hash, "removed from", done)


def save(path: str | Path, delta: Delta) -> None:
    """Write the delta as one safetensors file; the same delta gives the same bytes."""
    write_tensors(path, delta.tensors, delta.header.as_json())


def load(path: str | Path) -> Delta:
    """The delta that `save` wrote.

    Raises:
        EraseError: the file is missing, not a delta, or its parts contradict each other.
    """
    header = header_from_json(read_metadata(path), path)
    delta = Delta(read_tensors(path), header)
    for problem in _problems(delta):
        raise EraseError(f"{path} is damaged: {problem}; copy or create it again")
    return delta


def summary(delta: Delta, block: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    """(changed weights, all weights) of each block; `block` gives a tensor's name its block."""
    table: dict[str, tuple[int, int]] = {}
    counts = delta.changed
    for name, (_, shape) in delta.layout.items():
        changed, total = table.get(block(name), (0, 0))
        table[block(name)] = changed + counts.get(name, 0), total + math.prod(shape)
    return table


def changed_bits(delta: Delta, name: str) -> Tensor:
    """Which weights of a changed tensor changed: bool, [n]."""
    return _unpack(delta, name)


def layout_of(state: State) -> Layout:
    """dtype and shape of every tensor, by name."""
    return {name: _describe(state[name]) for name in sorted(state)}


def require_layout(here: Layout, there: Layout, where: str, *, dtypes: bool = True) -> None:
    """Raise an EraseError that names the first tensor in which two models differ; `where` names the second."""
    for name in sorted(here.keys() | there.keys()):
        if name not in here:
            raise EraseError(f"{name!r} is missing here but in {where}")
        if name not in there:
            raise EraseError(f"{name!r} is here but not in {where}")
        (dtype, shape), (expected_dtype, expected_shape) = here[name], there[name]
        if math.prod(shape) != math.prod(expected_shape):
            raise EraseError(f"{name!r} has {math.prod(shape)} weights here but {math.prod(expected_shape)} in {where}")
        if shape != expected_shape:
            raise EraseError(f"{name!r} has the shape {list(shape)} here but {list(expected_shape)} in {where}")
        if dtypes and dtype != expected_dtype:
            raise EraseError(f"{name!r} is {dtype} here but {expected_dtype} in {where}; load it as {expected_dtype}")


def _switch(state: State, delta: Delta, start: str, end: str, verb: str, done: str) -> dict[str, Tensor]:
    """verb: for the message about another model. done: what the model is if it has the hash `end` already."""
    require_layout(layout_of(state), delta.layout, _origin(delta))
    found = content_hash(state)
    if found != start:
        reason = done if found == end else f"but {_origin(delta)}, can be {verb} {start[:12]} only"
        raise EraseError(f"this model is {found[:12]}, {reason}")
    switched = dict(state)
    for name in delta.changed:
        new = _dense(delta, name).bitwise_xor_(_patterns(state[name])).view(state[name].dtype)
        switched[name] = new.reshape(state[name].shape).to(state[name].device)
    if (reached := content_hash(switched)) != end:
        raise EraseError(f"the delta is damaged: it gives {reached[:12]} instead of {end[:12]}; create it again")
    return switched


def _patterns(tensor: Tensor) -> Tensor:
    """Bit patterns as integers, flat, on the CPU; shares the memory of a contiguous CPU tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(_PATTERNS[tensor.itemsize])


def _put(tensors: dict[str, Tensor], name: str, xor: Tensor) -> None:
    changed = xor != 0
    if changed.any():
        tensors[f"{name}.bitmap"] = _pack(changed)
        tensors[f"{name}.values"] = torch.from_numpy(xor.numpy()[np.flatnonzero(changed.numpy())])


def _dense(delta: Delta, name: str) -> Tensor:
    """The XOR of every weight of a tensor, zero where none changed, flat."""
    dtype, shape = delta.layout[name]
    xor = torch.zeros(math.prod(shape), dtype=_PATTERNS[_dtype(dtype).itemsize])
    if f"{name}.values" in delta.tensors:
        xor.masked_scatter_(_unpack(delta, name), delta.tensors[f"{name}.values"])
    return xor


def _pack(changed: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(changed.numpy(), bitorder="little"))


def _unpack(delta: Delta, name: str) -> Tensor:
    bitmap, count = delta.tensors[f"{name}.bitmap"].numpy(), math.prod(delta.layout[name][1])
    return torch.from_numpy(np.unpackbits(bitmap, count=count, bitorder="little").view(bool))


def _describe(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _origin(delta: Delta) -> str:
    return f"the delta, which was made for {delta.provenance.get('made_for', delta.base_hash[:12])}"


def _problems(delta: Delta) -> Iterator[str]:
    """What contradicts itself in a delta that was read from a file."""
    names = {key.rpartition(".")[0] for key in delta.tensors}
    for name in sorted(names):
        if name not in delta.layout:
            yield f"its header does not describe {name!r}"
            continue
        if {key for key in delta.tensors if key.rpartition(".")[0] == name} - {f"{name}.bitmap", f"{name}.values"}:
            yield f"{name!r} has more than a bitmap and values"
            continue
        if f"{name}.bitmap" not in delta.tensors or f"{name}.values" not in delta.tensors:
            yield f"{name!r} has a bitmap or values, but not both"
            continue
        bitmap, values = delta.tensors[f"{name}.bitmap"], delta.tensors[f"{name}.values"]
        dtype, shape = delta.layout[name]
        if bitmap.dtype != torch.uint8 or bitmap.dim() != 1 or values.dim() != 1:
            yield f"{name!r} has a bitmap or values of another type or shape"
        elif bitmap.numel() != -(-math.prod(shape) // 8):
            yield f"{name!r} has a bitmap of {bitmap.numel()} bytes for {math.prod(shape)} weights"
        elif (marked := int(_unpack(delta, name).sum())) != values.numel():
            yield f"{name!r} marks {marked} changed weights but has {values.numel()} values"
        elif values.dtype != _PATTERNS[_dtype(dtype).itemsize]:
            yield f"{name!r} is {dtype} but its values are {str(values.dtype).removeprefix('torch.')}"
