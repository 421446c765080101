"""The state of an interrupted training, written and restored."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from erase import files, tensor_files
from erase.errors import EraseError
from erase.optim import MaskedAdam


class Kept(Protocol):
    """State of a training besides weights and moments: tensors by name, of fixed shapes and dtypes."""

    values: dict[str, Tensor]


class Stored:
    """Where work keeps its state: in one file of the main process, or, if sharded, in a file of each process.

    The files of processes carry the number of steps, since a process may be killed after it wrote and before another
    one did. Only a number that all processes have counts; older files are deleted when all have written.
    """

    def __init__(self, path: Path, accelerator: Accelerator, *, is_sharded: bool):
        self._path, self._accelerator, self._is_sharded = path, accelerator, is_sharded

    def last(self) -> Path | None:
        """The state to continue from."""
        if not self._is_sharded:
            return self._path if self._path.exists() else None
        every = gather_object([{number for number, _ in self._own()}])
        number = max(set.intersection(*every), default=None)
        return None if number is None else self.of(number)

    def new(self, num_steps: int) -> Path | None:
        """The file for the state after so many steps; None if this process writes none."""
        if self._is_sharded:
            return self.of(num_steps)
        return self._path if self._accelerator.is_main_process else None

    def settle(self, num_steps: int) -> None:
        """Wait until all processes have written, and delete what is older."""
        self._accelerator.wait_for_everyone()
        for number, path in self._own():
            if self._is_sharded and number < num_steps:
                path.unlink()

    def clear(self) -> None:
        """Delete what this process has stored."""
        for path in [path for _, path in self._own()] if self._is_sharded else [self._path]:
            path.unlink(missing_ok=True)

    @property
    def _end(self) -> str:
        return f".{self._accelerator.process_index}-of-{self._accelerator.num_processes}{self._path.suffix}"

    def of(self, num_steps: int) -> Path:
        """This process's own file, if sharded, for the state after so many steps."""
        return self._path.with_name(f"{self._path.stem}-{num_steps}{self._end}")

    def _own(self) -> list[tuple[int, Path]]:
        found = [path for path in self._path.parent.glob(f"{self._path.stem}-*{self._end}")]
        numbers = [path.name.removeprefix(f"{self._path.stem}-").removesuffix(self._end) for path in found]
        return [(int(number), path) for number, path in zip(numbers, found, strict=True) if number.isdecimal()]


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Add to an error about a file of intermediate state what to do about it."""
    try:
        yield
    except EraseError as error:
        told = str(error).replace("; copy or download it again", "")
        raise EraseError(
            f"{told if str(path) in told else f'{path}: {told}'}; delete it, and the same command {what}"
        ) from error


def keep(
    path: Path,
    optimizer: MaskedAdam,
    accelerator: Accelerator,
    losses: list[dict[str, float]],
    kept: Mapping[str, Kept],
) -> None:
    """Write the state that the next step depends on: of the weights only those inside the mask, since no others change.

    kept: further state of the training, by name.
    """
    tensors = {f"weights/{name}": weights for name, weights in optimizer.masked_weights().items()}
    moments: dict[str, dict[str, Any]] = {}
    for number, state in optimizer.state_dict()["state"].items():
        moments[str(number)] = {key: value for key, value in state.items() if not torch.is_tensor(value)}
        tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items() if torch.is_tensor(value)}
    for part, held in kept.items():
        tensors |= {f"{part}/{name}": weights for name, weights in held.values.items()}
    header: dict[str, Any] = {"kind": "training state", "losses": losses, "optimizer": moments}
    if accelerator.scaler is not None:
        header["scaler"] = accelerator.scaler.state_dict()
    tensor_files.write_tensors(path, tensors, header | {"state": files.text_hash(header)})


def restore(
    path: Path,
    optimizer: MaskedAdam,
    accelerator: Accelerator,
    kept: Mapping[str, Kept],
    num_steps: int,
) -> list[dict[str, float]]:
    """Put a stored state in place; returns the losses of the steps that led to it.

    Raises:
        EraseError: the file is damaged, or belongs to another training.
    """
    with damage_named(path, "trains from the first step"):
        tensors, header = tensor_files.read_own(path, kind="training state")
        told = header.pop("state", None)
        header.pop(tensor_files.CONTENT)
        if told != files.text_hash(header):
            raise EraseError(f"{path} is damaged: its header does not have the hash that it states")
        if len(header["losses"]) > num_steps:
            raise EraseError(f"{path} holds {len(header['losses'])} steps of {num_steps}")
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, **{name: {} for name in kept}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        weights = optimizer.masked_weights()
        _require_like(path, parts["weights"], weights)
        for part, held in kept.items():
            _require_like(path, parts[part], held.values)
        state: dict[int, dict[str, Any]] = {int(number): dict(of) for number, of in header["optimizer"].items()}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            state[int(number)][key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    optimizer.exchange({name: parts["weights"][name].to(now.device) for name, now in weights.items()})
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(header["scaler"])
    for part, held in kept.items():
        held.values = {name: parts[part][name].to(now.device) for name, now in held.values.items()}
    return header["losses"]


def _require_like(path: Path, stored: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    """Raise an EraseError unless two sets of weights have the same names, shapes and dtypes."""

    def layout(state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    if layout(stored) != layout(here):
        raise EraseError(f"{path} holds the weights of another training")
