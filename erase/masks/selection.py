"""The selection of a mask: exactly the k weights with the largest (or smallest) scores.

A mask is plain data: a bool tensor for every parameter in the scope, under the parameter's name, in parameter order.
Stored masks use one bit per weight (`Packed`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from erase.errors import EraseError
from erase.masks.store import Mask, Packed, pack

SAMPLE = 1 << 18  # scores that are sorted to guess where the threshold lies
BUCKETS = 1 << 18  # that a bracket is divided into when its scores are counted
CHUNK = 1 << 20  # scores that are looked at together; 32 times as many on a GPU
LARGEST = 0x7FFFFFFF  # int32
INFINITY = 0x7F800000  # bit pattern of float32's infinity; those of NaN are above it
SMALLEST_NORMAL = 0x00800000


class Others(Protocol):
    """Processes of which each holds some rows of every score: the first ones, the next ones, and so on.

    rank: number of this process, from 0.
    """

    rank: int

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, which have one shape, [processes, ...]."""
        ...


def select(
    scores: Mapping[str, torch.Tensor], density: float, *, per_tensor: bool = False, largest: bool = True
) -> Mask:
    """The mask of the int(N * density) largest of all N scores; among equals those of lower index come first.

    Bitwise what a stable descending argsort gives, on any device and with any number of threads. Scores are compared
    as float32. Besides the mask it needs only some megabytes.

    density: share of the weights to choose, in (0, 1].
    per_tensor: choose int(n * density) in each tensor of n weights instead.
    largest: False chooses the *least* salient weights, the control of every ablation.

    Raises:
        EraseError: density is no share, or a score is negative, NaN or infinite.
    """
    return dict(_selected(scores, density, per_tensor, largest))


def select_packed(
    scores: Mapping[str, torch.Tensor],
    density: float,
    *,
    per_tensor: bool = False,
    largest: bool = True,
    others: Others | None = None,
) -> Packed:
    """The mask of `select` in one bit a weight; only one tensor of it is ever in memory as bools.

    others: the processes that hold the other rows of the scores; all select at once, and each gets its rows of the
        mask of all.
    """
    bits: dict[str, torch.Tensor] = {}
    for name, mask in _selected(scores, density, per_tensor, largest, others):
        bits |= pack({name: mask}).bits
    return Packed(bits, {name: tuple(score.shape) for name, score in scores.items()})


def _selected(
    scores: Mapping[str, torch.Tensor],
    density: float,
    per_tensor: bool,
    largest: bool,
    others: Others | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The name and the mask of each tensor, one after the other."""
    _check_density(density)
    patterns = {name: bit_patterns(name, score) for name, score in scores.items()}
    flip = 0 if largest else LARGEST
    for names in [[name] for name in scores] if per_tensor else [list(scores)]:
        for name, bits in zip(names, _top([patterns[name] for name in names], density, flip, others), strict=True):
            yield name, bits.view(scores[name].shape)


def kth_largest(scores: Mapping[str, torch.Tensor], k: int) -> float:
    """The k-th largest of all scores, compared as float32, without sorting them; k from 1."""
    pattern, _, _ = _kth_largest([bit_patterns(name, score) for name, score in scores.items()], k, 0)
    return torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item()


def threshold(scores: Mapping[str, torch.Tensor], k: int) -> torch.Tensor:
    """`kth_largest` as a tensor without dimensions, on the scores' device.

    On a GPU nothing waits: the number is built bit by bit from counts that stay there. Scores are not checked then.
    """
    first = next(iter(scores.values()))
    if first.device.type != "cuda":
        return torch.tensor(kth_largest(scores, k), device=first.device)
    patterns = torch.cat([score.detach().float().reshape(-1).view(torch.int32) for score in scores.values()])
    found = torch.zeros((), dtype=torch.int32, device=first.device)
    for bit in range(30, -1, -1):
        higher = found + (1 << bit)
        found = torch.where((patterns >= higher).count_nonzero() >= k, higher, found)
    return found.view(torch.float32)


def random_mask(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    seed: int,
    *,
    per_tensor: bool = False,
    by_rows: Callable[[str], bool] = lambda name: False,
) -> Mask:
    """As many ones as `select` chooses, at random places: every choice is as likely as any other, same seed, same mask.

    by_rows: whether the matrix of this name is taken row by row.

    Needs four bytes a weight meanwhile. (Draws are among 2e9 values; a tie at the threshold favours one weight in 1e9.)
    """
    _check_density(density)
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: Sequence[int]) -> torch.Tensor:
        drawn = (shape[0], 1) if by_rows(name) else tuple(shape)
        bits = torch.empty(drawn, dtype=torch.int32)  # random bits tie less often than uniform floats
        return bits.random_(SMALLEST_NORMAL, INFINITY, generator=generator).view(torch.float32).expand(tuple(shape))

    return select({name: draw(name, shape) for name, shape in shapes.items()}, density, per_tensor=per_tensor)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise EraseError(f"density {density} is no share of the weights; it must lie in (0, 1]")


def bit_patterns(name: str, score: torch.Tensor) -> torch.Tensor:
    """The scores' float32 bit patterns as int32, [n]: they order like the numbers, as none is negative."""
    score = score.detach().float().reshape(-1)
    patterns = score.view(torch.int32)
    if score.numel() and patterns.min() < 0:
        patterns = (score + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    if score.numel() and not (0 <= patterns.min() and patterns.max() < INFINITY):
        worst = score[(patterns < 0) | (patterns >= INFINITY)][0].item()
        raise EraseError(
            f"'{name}' has a score of {worst}; scores must be finite and not negative. "
            "Did a loss or a gradient overflow? try float32 or bfloat16"
        )
    return patterns


def _top(tensors: Sequence[torch.Tensor], density: float, flip: int, others: Others | None) -> Iterator[torch.Tensor]:
    """Where the int(N * density) largest patterns are, bool, [n] for every [n]."""
    k = int(_summed(sum(tensor.numel() for tensor in tensors), others) * density)
    threshold, wanted, present = _kth_largest(tensors, k, flip, others) if k else (LARGEST, 0, 0)
    compare, ties = (torch.ge, 0) if k and wanted == present else (torch.gt, wanted)
    shares = _shares_of_ties(tensors, threshold, ties, flip, others) if ties and others else None
    for number, tensor in enumerate(tensors):
        ties = ties if shares is None else shares[number]
        mask = torch.empty_like(tensor, dtype=torch.bool)
        for chunk, part in zip(_chunks([tensor], flip), _chunks([mask]), strict=True):
            compare(chunk, threshold, out=part)
            if ties:
                first = (chunk == threshold).nonzero()[:ties, 0]
                part[first] = True
                ties -= len(first)
        yield mask


def _summed(number: int, others: Others | None) -> int:
    """Over all processes."""
    return number if others is None else int(others.gathered(torch.tensor(number)).sum())


def _shares_of_ties(tensors: Sequence[torch.Tensor], threshold: int, ties: int, flip: int, others: Others) -> list[int]:
    """How many of the `ties` first patterns that equal the threshold each tensor of this process has."""
    own = [sum(int((chunk == threshold).count_nonzero()) for chunk in _chunks([tensor], flip)) for tensor in tensors]
    counts = others.gathered(torch.tensor(own))  # [processes, tensors]; in a tensor the rows of process 0 come first
    before = (counts.T.reshape(-1).cumsum(0) - counts.T.reshape(-1)).view(len(own), -1)[:, others.rank]
    return (ties - before).clamp(min=0).minimum(torch.tensor(own)).tolist()


def _kth_largest(
    tensors: Sequence[torch.Tensor], k: int, flip: int, others: Others | None = None
) -> tuple[int, int, int]:
    """The k-th largest pattern, how many of its equals are among the k largest, and how many equals there are.

    Each round counts the patterns in a bracket, bucket by bucket, and goes on inside the bucket that holds the k-th;
    with a good first bracket one round is enough, without any luck it takes four.
    """
    low, high = (0, LARGEST) if others else _bracket(tensors, k, flip)
    while True:
        shift = max(0, (high - low).bit_length() - (BUCKETS - 1).bit_length())
        counts = torch.zeros(((high - low) >> shift) + 1, dtype=torch.int64, device=tensors[0].device)
        above = 0
        for chunk in _chunks(tensors, flip):
            over = chunk > high
            above += int(over.count_nonzero())
            inside = (chunk >= low) ^ over
            if low == high:  # as with many zeros: nothing to tell apart, and far too many to gather
                counts += inside.count_nonzero()
            else:
                bucket = ((chunk[inside] - low) >> shift).long()
                counts.scatter_add_(0, bucket, torch.ones_like(bucket))
        if others:
            counts, above = others.gathered(counts).sum(0), _summed(above, others)
        at_least = above + counts.flip(0).cumsum(0)  # [i]: patterns in the i + 1 highest buckets or above them
        if k <= above:  # the sample misled: look on the other side
            low, high = high + 1, LARGEST
        elif k > at_least[-1]:
            low, high = 0, low - 1
        else:
            place = int((at_least < k).count_nonzero())
            bucket = len(counts) - 1 - place
            present = int(counts[bucket])
            if shift == 0:
                return low + bucket, k - (int(at_least[place]) - present), present
            low += bucket << shift
            high = min(high, low + (1 << shift) - 1)


def _bracket(tensors: Sequence[torch.Tensor], k: int, flip: int) -> tuple[int, int]:
    """Bounds, both included, that hold the k-th largest pattern almost surely: three deviations of a sample's rank."""
    total = sum(tensor.numel() for tensor in tensors)
    if total <= SAMPLE:
        kth = int((torch.cat(list(tensors)) ^ flip).sort(descending=True).values[k - 1])
        return kth, kth
    share = SAMPLE / total
    parts = [tensor[_spread(tensor.numel(), math.ceil(tensor.numel() * share), tensor.device)] for tensor in tensors]
    sample = (torch.cat(parts) ^ flip).sort(descending=True).values
    rank, margin = len(sample) * k / total, 1.5 * len(sample) ** 0.5
    first, last = int(rank - margin), int(rank + margin)
    low = int(sample[last]) if last < len(sample) else 0
    high = int(sample[first]) if first > 0 else LARGEST
    return low, high


def _spread(total: int, num: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`num` indices below `total`, even, yet in step with no stride of the tensor (Weyl's golden-ratio sequence)."""
    return (torch.arange(num, dtype=torch.float64, device=device) * 0.6180339887498949 % 1 * total).long()


def _chunks(tensors: Sequence[torch.Tensor], flip: int = 0) -> Iterator[torch.Tensor]:
    """Views of the tensors that fit a cache, in order; `flip` turns the order of int32 patterns around."""
    for tensor in tensors:
        for chunk in tensor.split(CHUNK if tensor.device.type == "cpu" else 32 * CHUNK):
            yield chunk ^ flip if flip else chunk
