"""Where the masked weights of a tensor are, as slices or indices."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import Parameter

GPU_CHUNK = 1 << 23  # weights that are handled together on a GPU; temporaries take 12 bytes for each


@dataclass(frozen=True, eq=False)
class Update:
    """What one parameter brings to an optimizer's step.

    gradient: gathered, [masked weights], or dense, [weights]. exp_avg, exp_avg_sq, master: float32, [masked weights].
    """

    parameter: Parameter
    gradient: torch.Tensor
    is_gathered: bool
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    master: torch.Tensor | None


class Places:
    """Where one parameter's masked weights are: everywhere, at int32 indices (few), or in packed bits (many).

    Indices take 32 bits per one, bits 1 per weight and longer to walk: below a quarter of ones indices are faster.

    only_bits: keep packed bits however few ones there are.
    """

    def __init__(self, name: str, total: int, mask: torch.Tensor | None, *, only_bits: bool = False):
        self.name, self.total = name, total
        self.num = total if mask is None else int(mask.count_nonzero())
        self.checksum = 0  # of a mask that is all ones
        self.stored: torch.Tensor | None = None
        if mask is not None and self.num < total:
            bits = mask.detach().cpu().reshape(-1)
            packed = np.packbits(bits.numpy())
            self.checksum = zlib.crc32(packed.tobytes())
            few = self.num < total / 4 and not only_bits
            self.stored = nonzero(bits).int() if few else torch.from_numpy(packed)
            starts = range(0, len(packed), GPU_CHUNK // 8)
            self._counts = [int(np.bitwise_count(packed[start : start + GPU_CHUNK // 8]).sum()) for start in starts]

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the masked values of a tensor of the parameter's shape, [num], in one piece."""
        flat = tensor.detach().reshape(-1)
        taken = flat.new_empty(self.num)
        for part, where in self.chunks(flat.device):
            taken[part] = take(flat, where)
        return taken

    def chunks(self, device: torch.device) -> Iterator[tuple[slice, slice | torch.Tensor]]:
        """Pairs of a slice of the compact state [num] and its places in the flat parameter [total], cache by cache."""
        size = 1 << 18 if device.type == "cpu" else GPU_CHUNK
        if self.stored is None:
            for start in range(0, self.total, size):
                yield slice(start, start + size), slice(start, start + size)
            return
        self.stored = self.stored.to(device)
        if self.stored.dtype == torch.int32:
            for start in range(0, self.num, size):
                yield slice(start, start + size), self.stored[start : start + size].long()
            return
        done = 0
        for number, packed in enumerate(self.stored.split(size // 8)):
            if device.type == "cpu":
                where = nonzero(unpacked(packed)).add_(number * size)
            else:
                where = places_of(packed, self._counts[number]).add_(number * size)
            yield slice(done, done + len(where)), where
            done += len(where)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The bools of packed bits on the CPU, zeros at the end included."""
    return torch.from_numpy(np.unpackbits(packed.numpy()).view(np.bool_))


def nonzero(bits: torch.Tensor) -> torch.Tensor:
    """Indices of the ones on the CPU, int64; numpy's is 6 to 10 times as fast as torch's."""
    return torch.from_numpy(np.flatnonzero(bits.numpy()))


def places_of(packed: torch.Tensor, num: int) -> torch.Tensor:
    """Indices of the `num` ones among packed bits, int64; unlike `nonzero`, this does not wait for a GPU.

    The k-th one is where the running sum of the bits reaches k.
    """
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(1)
    sums = bits.view(-1).cumsum(0, dtype=torch.int32)
    return torch.searchsorted(sums, torch.arange(1, num + 1, dtype=torch.int32, device=packed.device))


@contextmanager
def flat(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's values in one dimension, to be written to."""
    flat = tensor.detach().reshape(-1)
    yield flat
    if flat.data_ptr() != tensor.data_ptr():  # channels-last: the flat values are a copy
        tensor.copy_(flat.view_as(tensor))


def take(flat: torch.Tensor, where: slice | torch.Tensor) -> torch.Tensor:
    return flat[where] if isinstance(where, slice) else flat.index_select(0, where)


def put(flat: torch.Tensor, where: slice | torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(where, slice):
        flat[where] = values
    else:
        flat.scatter_(0, where, values.to(flat.dtype))  # on a CPU twice as fast as index_copy_
