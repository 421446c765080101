"""The images to forget, to retain and to test: one split for training, unlearning and evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase import files
from erase.classification.data import Dataset, Images
from erase.errors import EraseError


@dataclass(frozen=True, eq=False)
class Split:
    """Positions, int64, ascending.

    request: the text that the split was made from, such as "10%", "class:3" or a file name.
    forget, retain: positions in the training images. test: positions in the test images.
    """

    request: str
    forget: Tensor
    retain: Tensor
    test: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of the forget and the retain set."""
        return files.text_hash({"forget": self.forget.tolist(), "retain": self.retain.tolist()})

    def save(self, path: str | Path) -> None:
        """Write the positions as JSON. `make` accepts the file as a request."""
        positions = {"forget": self.forget.tolist(), "retain": self.retain.tolist()}
        files.write_json(path, {"request": self.request, "sha256": self.digest, **positions})


def make(dataset: Dataset, request: str, seed: int) -> Split:
    """The split of a request.

    request: "10%" of the training images, chosen by `seed`; "class:3" or "class:cat", a whole class, which is left out
        of the test images too; or a file that `Split.save` wrote or that has one position per line.

    Raises:
        EraseError: the request cannot be read, or leaves nothing to forget or nothing to retain.
    """
    everything, tested = torch.arange(len(dataset.train)), torch.arange(len(dataset.test))
    if request.endswith("%"):
        num = _share(request, len(everything))
        drawn = np.random.default_rng(seed).choice(len(everything), num, replace=False)
        return _split(request, everything, torch.from_numpy(drawn), tested)
    if request.startswith("class:"):
        label = _class(request.removeprefix("class:"), dataset.classes)
        chosen = (dataset.train.y == label).nonzero().view(-1)
        return _split(request, everything, chosen, (dataset.test.y != label).nonzero().view(-1))
    forget, retain = _read(request, len(everything))
    return _split(request, everything if retain is None else retain, forget, tested)


def require_request(request: str) -> None:
    """Raise an EraseError for a request that no data set can meet."""
    if request.endswith("%"):
        _share(request, 1)
    elif not request.startswith("class:") and not Path(request).is_file():
        raise EraseError(f"--forget is {request!r}: no share like 10%, no class like class:3, no file")


def reference(labels: Tensor, seed: int, num_forget: int) -> tuple[Tensor, Tensor]:
    """The training set of SalUn's code, which leaves out a tenth of every class, and the forget set within it.

    SalUn's scripts train with seed 1 but unlearn with seed 2, so a tenth of their forget set was never trained on.
    """
    y = labels.numpy()
    random = np.random.RandomState(seed)
    aside = [random.choice(places, int(0.1 * len(places)), replace=False) for places in map(np.flatnonzero, _each(y))]
    train = np.setdiff1d(np.arange(len(y)), np.concatenate(aside))
    chosen = np.random.RandomState(seed - 1).choice(len(train), num_forget, replace=False)
    return torch.from_numpy(train), torch.from_numpy(train[chosen])


def make_reference(dataset: Dataset, request: str, seed: int) -> Split:
    """The split of SalUn's code, for comparison with it. A tenth of the training images is not used.

    A class is forgotten as a whole, and left out of the test images too.

    Raises:
        EraseError: the request is neither a share nor a class, or the seed is 0.
    """
    if not request.endswith("%") and not request.startswith("class:"):
        raise EraseError(f"--forget is {request!r}; the reference's split is for a share, like 10%, or a class")
    if seed < 1:
        raise EraseError(f"--seed is {seed}; the reference's split uses seed - 1, so it must be at least 1")
    train, _ = reference(dataset.train.y, seed, 0)
    if request.startswith("class:"):
        label = _class(request.removeprefix("class:"), dataset.classes)
        forget = train[dataset.train.y[train] == label]
        return _split(request, train, forget, (dataset.test.y != label).nonzero().view(-1))
    train, forget = reference(dataset.train.y, seed, _share(request, len(train)))
    return _split(request, train, forget, torch.arange(len(dataset.test)))


def parts(dataset: Dataset, split: Split) -> tuple[Images, Images, Images]:
    """The images to forget, to retain and to test."""
    return dataset.train[split.forget], dataset.train[split.retain], dataset.test[split.test]


def _each(y: np.ndarray) -> list[np.ndarray]:
    return [y == label for label in np.unique(y)]


def _split(request: str, pool: Tensor, forget: Tensor, test: Tensor) -> Split:
    forget = forget.sort().values
    retain = pool[~torch.isin(pool, forget)].sort().values
    if not len(forget):
        raise EraseError(f"--forget {request} leaves nothing to forget; ask for more")
    if not len(retain):
        raise EraseError(f"--forget {request} leaves nothing to retain; ask for less than all of the training images")
    return Split(request, forget, retain, test)


def _share(request: str, total: int) -> int:
    try:
        percent = float(request.removesuffix("%"))
    except ValueError:
        raise EraseError(f"--forget is {request!r}; a share is a number and a percent sign, like 10%") from None
    if not 0 <= percent <= 100:
        raise EraseError(f"--forget is {request!r}; a share lies between 0% and 100%")
    return int(total * percent / 100)


def _class(text: str, classes: Sequence[str]) -> int:
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    raise EraseError(f"--forget is 'class:{text}'; the classes are 0 to {len(classes) - 1}: {', '.join(classes[:12])}")


def _positions(values: Any) -> Tensor:
    """Raises ValueError: the values are not a list of whole numbers."""
    if not isinstance(values, list) or not all(type(value) is int and abs(value) < 2**62 for value in values):
        raise ValueError("no whole numbers")
    return torch.tensor(values, dtype=torch.int64)


def _read(path: str, total: int) -> tuple[Tensor, Tensor | None]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        stored = json.loads(text) if text.lstrip().startswith("{") else {"forget": [int(line) for line in text.split()]}
        lists = [stored["forget"], stored.get("retain")]
        forget, retain = (None if one is None else _positions(one) for one in lists)
    except OSError as error:
        raise EraseError(f"--forget is {path!r}: no share like 10%, no class like class:3, no file") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EraseError(f"{path} holds no positions: one a line, or JSON with 'forget'") from error
    assert forget is not None
    for positions in (forget, retain):
        if positions is not None and len(positions):
            if positions.min() < 0 or positions.max() >= total:
                raise EraseError(f"{path} names image {int(positions.max())}; images are numbered 0 to {total - 1}")
            if len(positions.unique()) < len(positions):
                raise EraseError(f"{path} names an image twice")
    return forget, retain
