"""Where the masked weights of a tensor are, as slices or indices."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class Places:
    """Where one parameter's masked weights are: everywhere, at int32 indices (few), or in packed bits (many).

    Indices take 32 bits per one, bits 1 per weight and longer to walk: below a quarter of ones indices are faster.
    """

    def __init__(self, name: str, total: int, mask: torch.Tensor | None):
        self.name, self.total = name, total
        self.num = total if mask is None else int(mask.count_nonzero())
        self.checksum = 0  # of a mask that is all ones
        self.stored: torch.Tensor | None = None
        if mask is not None and self.num < total:
            bits = mask.detach().cpu().reshape(-1)
            packed = np.packbits(bits.numpy())
            self.checksum = zlib.crc32(packed.tobytes())
            self.stored = nonzero(bits).int() if self.num < total / 4 else torch.from_numpy(packed)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the masked values of a tensor of the parameter's shape, [num], in one piece."""
        flat = tensor.detach().reshape(-1)
        taken = flat.new_empty(self.num)
        for part, where in self.chunks(flat.device):
            taken[part] = take(flat, where)
        return taken

    def chunks(self, device: torch.device) -> Iterator[tuple[slice, slice | torch.Tensor]]:
        """Pairs of a slice of the compact state [num] and its places in the flat parameter [total], cache by cache."""
        size = 1 << 18 if device.type == "cpu" else 1 << 25
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
            where = nonzero(unpacked(packed)).add_(number * size)
            yield slice(done, done + len(where)), where
            done += len(where)


# The eight bools of every byte, as one int64 that is made of them.
_BYTES = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)).view(np.int64))


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The bools of packed bits, zeros at the end included; on a CPU numpy takes half the time of the table."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy()).view(np.bool_))
    return _BYTES.to(packed.device).index_select(0, packed.int()).view(torch.bool)


def nonzero(bits: torch.Tensor) -> torch.Tensor:
    """Indices of the ones, int64; numpy's is 6 to 10 times as fast as torch's on a CPU."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(bits.numpy()))
    return bits.nonzero().view(-1)


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
