"""What erasure changed: new values of the changed weights, in one file that says how it was made.

A delta keeps, of every tensor that changed, one bit a weight (did it change?) and the XOR of the old and the
new bit patterns of those that did. XOR undoes itself: the delta that makes the new model from the base also brings
the base back, without a copy of it. (`base + (new - base)` would not be `new` in floating point.)
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase.errors import EraseError
from erase.tensor_files import content_hash, read_metadata, read_tensors, write_tensors

State = Mapping[str, Tensor]
Layout = dict[str, tuple[str, tuple[int, ...]]]

_FORMAT = "erase delta 1"
_KIND = "exact"  # the header's word for a delta that restores every bit
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a weight: integers as wide


@dataclass(frozen=True, eq=False)
class Delta:
    """A change from one model to another.

    tensors: for each changed tensor `name.bitmap`, uint8, [ceil(n / 8)], lowest bit first, one where a weight changed,
        and `name.values`, [changed], in order: integers as wide as the weights.
    layout: dtype and shape of every tensor of the base model, changed or not.
    base_hash, result_hash: `content_hash` of the model before and after.
    provenance: how it was made (JSON-serialisable); "made_for" names the base model in error messages.
    """

    tensors: State
    layout: Layout
    base_hash: str
    result_hash: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

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

    Bit patterns are compared, not values: 0.0 and -0.0 differ, and a NaN equals itself.

    Raises:
        EraseError: names, shapes or dtypes differ.
    """
    require_layout(layout_of(new), layout_of(base), "the base model")
    tensors: dict[str, Tensor] = {}
    for name in sorted(base):
        _put(tensors, name, _patterns(base[name]) ^ _patterns(new[name]))
    return Delta(tensors, layout_of(base), content_hash(base), content_hash(new), dict(provenance or {}))


def apply(state: State, delta: Delta) -> dict[str, Tensor]:
    """The erased model, bit for bit. Tensors that did not change are those of `state`, not copies.

    Raises:
        EraseError: `state` is not the very model that the delta was made from, or the delta is damaged.
    """
    return _switch(state, delta, delta.base_hash, delta.result_hash, "starts from", "the delta is applied already")


def remove(state: State, delta: Delta) -> dict[str, Tensor]:
    """The base model, bit for bit, from the erased one. Tensors that did not change are those of `state`, not copies.

    Raises:
        EraseError: `state` is not the very model that the delta leads to, or the delta is damaged.
    """
    return _switch(state, delta, delta.result_hash, delta.base_hash, "leads to", "the delta is not applied")


def save(path: str | Path, delta: Delta) -> None:
    """Write the delta as one safetensors file; the same delta gives the same bytes."""
    header = {"format": _FORMAT, "kind": _KIND, "layout": delta.layout, "provenance": delta.provenance}
    write_tensors(path, delta.tensors, header | {"base_hash": delta.base_hash, "result_hash": delta.result_hash})


def load(path: str | Path) -> Delta:
    """The delta that `save` wrote.

    Raises:
        EraseError: the file is missing, not a delta, or its parts contradict each other.
    """
    header = read_metadata(path)
    if header.get("format") != _FORMAT:
        raise EraseError(f"{path} is not a delta: its header does not say {_FORMAT!r}")
    for problem in _header_problems(header):
        raise EraseError(f"{path} is damaged: its header {problem}; copy it again or make it anew")
    layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in header["layout"].items()}
    hashes = header["base_hash"], header["result_hash"]
    delta = Delta(read_tensors(path), layout, *hashes, header["provenance"])
    for problem in _problems(delta):
        raise EraseError(f"{path} is damaged: {problem}; copy it again or make it anew")
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


def _switch(state: State, delta: Delta, start: str, end: str, verb: str, hint: str) -> dict[str, Tensor]:
    require_layout(layout_of(state), delta.layout, _origin(delta))
    found = content_hash(state)
    if found != start:
        reason = hint if found == end else "it fits that model only"
        raise EraseError(f"this model is {found[:12]} but {_origin(delta)}, {verb} {start[:12]}: {reason}")
    switched = dict(state)
    for name in delta.changed:
        new = _dense(delta, name).bitwise_xor_(_patterns(state[name])).view(state[name].dtype)
        switched[name] = new.reshape(state[name].shape).to(state[name].device)
    if (reached := content_hash(switched)) != end:
        raise EraseError(f"the delta is damaged: it gives {reached[:12]} instead of {end[:12]}; make it anew")
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


def _header_problems(header: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or of another type in the header of a delta's file."""
    if header.get("kind") != _KIND:
        yield f"says that the delta is {header.get('kind')!r:.40}, not {_KIND}"
    for name in ("base_hash", "result_hash"):
        value = header.get(name)
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            yield f"has {name} {value!r:.40} instead of 64 hexadecimal digits"
    provenance = header.get("provenance")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("concept", ""), dict | str):
        yield "does not say how the delta was made (provenance)"
    layout = header.get("layout")
    if not isinstance(layout, dict) or not layout:
        yield "has no layout of the base model"
        return
    for name, entry in layout.items():
        if not isinstance(entry, list) or len(entry) != 2:
            yield f"gives {name!r:.80} no dtype and shape"
            continue
        dtype, shape = entry
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            yield f"gives {name!r:.80} the dtype {dtype!r:.40}"
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            yield f"gives {name!r:.80} the shape {shape!r:.40}"


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
