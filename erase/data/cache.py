"""Latents that were computed before: chunks of rows in the cache, with hashes, shared by all processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import tensor_files
from erase.errors import EraseError
from erase.progress import progress


@dataclass(frozen=True)
class Workers:
    """This process among several: it draws every `count`-th chunk, and all wait for one another."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Source:
    """Where images come from: one prompt each, what makes the rows of a range, and all that this depends on.

    announce: called with the range that `make` is asked for after its next call.
    """

    prompts: Sequence[Any]  # texts; None where neither the images nor the concept name one
    make: Callable[[range], dict[str, Tensor]]
    identity: Any
    announce: Callable[[range], None] = lambda rows: None


def cached(
    folder: Path,
    source: Source,
    batch_size: int,
    workers: Workers,
    label: str,
    quiet: bool,
    tell: Callable[[str], None],
) -> dict[str, Tensor]:
    """All rows of the source. Each chunk has a file of its own, so that interrupted work can continue.

    tell: called with a line about a damaged file, which is made again.
    """
    num = len(source.prompts)
    chunks = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
    paths = [folder / f"{rows.start:06d}.safetensors" for rows in chunks]

    def header(rows: range) -> dict[str, Any]:
        return {"kind": "latents", "key": folder.name, "rows": [rows.start, rows.stop]}

    found: dict[int, dict[str, Tensor]] = {}

    def read(i: int) -> None:
        """Into memory: other programs may write to the cache while this one works."""
        try:
            found[i], _ = tensor_files.read_own(paths[i], copied=True, **header(chunks[i]))
        except EraseError as error:
            if not paths[i].exists():
                raise
            tell(f"{str(error).partition('; copy')[0]}; these {label} are generated again")

    def make(i: int) -> None:
        made = source.make(chunks[i])
        found[i] = {name: tensor.cpu().contiguous() for name, tensor in made.items()}  # as a file gives them back
        tensor_files.write_tensors(paths[i], found[i], header(chunks[i]))

    mine = range(workers.rank, len(chunks), workers.count)
    for i in (i for i in mine if paths[i].exists()):
        read(i)
    missing = [i for i in mine if i not in found]
    with progress(sum(len(chunks[i]) for i in missing), label, "images", quiet=quiet) as bar:
        for i, following in zip_longest(missing, missing[1:]):
            if following is not None:
                source.announce(chunks[following])
            make(i)
            bar.update(len(chunks[i]))
    workers.wait()
    for i in (i for i in range(len(chunks)) if i not in found):  # those of other processes
        read(i)
        if i not in found:
            make(i)
    tensors = [found[i] for i in range(len(chunks))]
    return {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
