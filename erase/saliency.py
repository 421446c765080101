"""Which weights may move: accumulate gradients into scores, select exactly k weights, keep the mask in a file.

A mask is plain data: a bool tensor for every parameter in the scope, under the parameter's name, in parameter order.
While it lies about it is `Packed`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn import Parameter

from erase import files
from erase.errors import EraseError, no_file

Mask = dict[str, torch.Tensor]
Score = Literal["abs_sum", "sum_abs", "sum_sq"]

SAMPLE = 1 << 18  # scores that are sorted to guess where the threshold lies
BUCKETS = 1 << 18  # that a bracket is divided into when its scores are counted
CHUNK = 1 << 20  # scores that are looked at together; 32 times as many on a GPU
LARGEST = 0x7FFFFFFF  # int32
INFINITY = 0x7F800000  # bit pattern of float32's infinity; those of NaN are above it
SMALLEST_NORMAL = 0x00800000


class Saliency:
    """A running score of every weight, from the gradients of a forget loss.

    SalUn (Fan et al., ICLR 2024) keeps the weights where |grad l_f(theta_o)| >= gamma. Over batches b that is
        abs_sum   |sum_b g_b|, the gradient of the whole loss, as in the authors' code
        sum_abs   sum_b |g_b|
        sum_sq    sum_b g_b^2, the diagonal of the empirical Fisher information
    all summed in float32, on the device where each parameter is.
    """

    def __init__(self, parameters: Mapping[str, Parameter], score: Score = "abs_sum"):
        if score not in get_args(Score):
            raise EraseError(f"unknown score '{score}'; one of {', '.join(get_args(Score))}")
        self.parameters, self.score, self._is_over = parameters, score, False
        self._sums = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients as they are now, a missing one as zero, and leave None in their place."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self._add(name, parameter)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, every backward pass is added by itself, each gradient as soon as it is there.

        So the dense gradients of two tensors are never in memory together.
        """
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._add, name))
            for name, parameter in self.parameters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _add(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None and not self._is_over
        g, total = parameter.grad.float(), self._sums[name]
        if self.score == "abs_sum":
            total.add_(g)
        elif self.score == "sum_abs":
            total.add_(g.abs())
        else:
            total.addcmul_(g, g)
        parameter.grad = None

    def scores(self) -> dict[str, torch.Tensor]:
        """float32 and not negative, in the parameters' shapes; the sums themselves, so this ends the accumulation.

        Raises:
            EraseError: a score is NaN or infinite; the message names the tensor.
        """
        self._is_over = True
        for name, total in self._sums.items():
            _patterns(name, total.abs_())
        return self._sums

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted accumulation needs to continue bit for bit; the tensors are live, not copies."""
        return {"score": self.score, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`.

        Raises:
            EraseError: it was accumulated with another score or over other tensors.
        """
        if state["score"] != self.score:
            raise EraseError(f"the stored sums are '{state['score']}', but '{self.score}' is asked for; start again")
        sums = state["sums"]
        if {name: s.shape for name, s in sums.items()} != {name: s.shape for name, s in self._sums.items()}:
            raise EraseError("the stored sums are of other tensors; was the scope or the model changed? start again")
        for name, total in self._sums.items():
            total.copy_(sums[name])


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
    _check_density(density)
    patterns = {name: _patterns(name, score) for name, score in scores.items()}
    flip = 0 if largest else LARGEST
    mask: Mask = {}
    for names in [[name] for name in scores] if per_tensor else [list(scores)]:
        chosen = _top([patterns[name] for name in names], density, flip)
        mask |= {name: bits.view(scores[name].shape) for name, bits in zip(names, chosen, strict=True)}
    return mask


def kth_largest(scores: Mapping[str, torch.Tensor], k: int) -> float:
    """The k-th largest of all scores, compared as float32, without sorting them; k from 1."""
    pattern, _, _ = _kth_largest([_patterns(name, score) for name, score in scores.items()], k, 0)
    return torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item()


def random_mask(shapes: Mapping[str, Sequence[int]], density: float, seed: int, *, per_tensor: bool = False) -> Mask:
    """As many ones as `select` chooses, at random places: every choice is as likely as any other, same seed, same mask.

    Needs four bytes a weight meanwhile. (Draws are among 2e9 values; a tie at the threshold favours one weight in 1e9.)
    """
    _check_density(density)
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Sequence[int]) -> torch.Tensor:
        bits = torch.empty(tuple(shape), dtype=torch.int32)  # random bits tie less often than uniform floats
        return bits.random_(SMALLEST_NORMAL, INFINITY, generator=generator).view(torch.float32)

    return select({name: draw(shape) for name, shape in shapes.items()}, density, per_tensor=per_tensor)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise EraseError(f"density {density} is no share of the weights; it must lie in (0, 1]")


def _patterns(name: str, score: torch.Tensor) -> torch.Tensor:
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


def _top(tensors: Sequence[torch.Tensor], density: float, flip: int) -> list[torch.Tensor]:
    """Where the int(N * density) largest patterns are, bool, [n] for every [n]."""
    masks = [torch.zeros_like(tensor, dtype=torch.bool) for tensor in tensors]
    k = int(sum(tensor.numel() for tensor in tensors) * density)
    if k == 0:
        return masks
    threshold, wanted, present = _kth_largest(tensors, k, flip)
    compare, ties = (torch.ge, 0) if wanted == present else (torch.gt, wanted)
    for chunk, mask in zip(_chunks(tensors, flip), _chunks(masks), strict=True):
        compare(chunk, threshold, out=mask)
        if ties:
            first = (chunk == threshold).nonzero()[:ties, 0]
            mask[first] = True
            ties -= len(first)
    return masks


def _kth_largest(tensors: Sequence[torch.Tensor], k: int, flip: int) -> tuple[int, int, int]:
    """The k-th largest pattern, how many of its equals are among the k largest, and how many equals there are.

    Each round counts the patterns in a bracket, bucket by bucket, and goes on inside the bucket that holds the k-th;
    with a good first bracket one round is enough, without any luck it takes four.
    """
    low, high = _bracket(tensors, k, flip)
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


def count(mask: Mapping[str, torch.Tensor]) -> int:
    """How many weights the mask lets move."""
    if isinstance(mask, Packed):
        return sum(int(np.bitwise_count(packed.numpy()).sum()) for packed in mask.bits.values())
    return sum(int(bits.count_nonzero()) for bits in mask.values())


def union(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> Mask:
    """The mask of what either lets move, for the tensors of `a`; those that `b` lacks are a's own."""
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


def save(path: str | Path, mask: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write a mask in one bit a weight: safetensors, uint8 [ceil(n / 8)] for a tensor of n weights, first bit highest.

    header: JSON-serialisable; how the mask was made ("base" and "base_hash" are what `check` looks at). The file adds
        "shapes" (pairs of name and shape, in parameter order), "total" (weights) and "ones".
    """
    shapes = [[name, list(bits.shape)] for name, bits in mask.items()]
    total = sum(math.prod(shape) for _, shape in shapes)
    header = {**header, "kind": "mask", "shapes": shapes, "total": total, "ones": count(mask)}
    files.write_tensors(path, pack(mask).bits, header)


def load(path: str | Path) -> tuple[Packed, dict[str, Any]]:
    """The mask of a file that `save` wrote, on the CPU, and its header.

    Raises:
        EraseError: the file is missing, damaged or no mask.
    """
    header = files.read_metadata(path)
    if header.get("kind") != "mask":
        raise EraseError(f"{path} is not a mask: its header does not say how it was made")
    for problem in _header_problems(header):
        raise EraseError(f"{path} is damaged: its header {problem}; copy it again or make it anew")
    packed = files.read_tensors(path)
    shapes = {name: tuple(shape) for name, shape in header["shapes"]}
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
    if count(mask) != header["ones"]:
        raise EraseError(f"{path} is damaged: it has {count(mask)} ones, but its header says {header['ones']}")
    return mask, header


def _header_problems(header: Mapping[str, Any]) -> Iterator[str]:
    """What is missing or of another type in the header of a mask's file."""
    shapes = header.get("shapes")
    pairs = shapes if isinstance(shapes, list) and shapes else [None]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            yield "has no names and shapes of the masked weights"
        elif not isinstance(pair[1], list) or not all(type(size) is int and 0 <= size < 2**40 for size in pair[1]):
            yield f"gives {pair[0]!r:.80} the shape {pair[1]!r:.40}"
    if len({str(pair[0]) for pair in pairs if isinstance(pair, list) and pair}) != len(pairs):
        yield "names a weight twice"
    if type(header.get("ones")) is not int:
        yield f"says that the mask has {header.get('ones')!r:.40} ones"
    for name in ("base", "base_hash"):
        if not isinstance(header.get(name), str | None):
            yield f"has {name} {header[name]!r:.40}, which is no text"


def check(
    mask: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
    parameters: Mapping[str, torch.Tensor],
    *,
    base_hash: str | None = None,
) -> None:
    """Nothing, when a loaded mask fits the model; a mask may cover fewer tensors than `parameters` has.

    base_hash: the model's hash, compared with the header's "base_hash" where both are there.

    Raises:
        EraseError: a tensor of the mask is missing or has another shape, or the mask was made for another model.
    """
    made_for = f"which was made for {header.get('base', 'another model')}"
    for name, bits in mask.items():
        if name not in parameters:
            raise EraseError(f"'{name}' is in the mask, {made_for}, but not here")
        here = parameters[name]
        if bits.numel() != here.numel():
            raise EraseError(f"'{name}' has {here.numel()} weights here but {bits.numel()} in the mask, {made_for}")
        if bits.shape != here.shape:
            raise EraseError(f"'{name}' has shape {[*here.shape]} here but {[*bits.shape]} in the mask, {made_for}")
    recorded = header.get("base_hash")
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
