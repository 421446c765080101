"""The state of an interrupted training of a classifier, kept in one file, from which the same command continues."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erase import tensor_files
from erase.errors import EraseError

KIND = "state of a classifier's training"


@dataclass
class Checkpoint:
    """A file with the state after an epoch. A training that continues from it ends with the same bits.

    identity: text that differs for every other training; a file with another one is not used.
    seconds: least time between two writes, so that short trainings write none.
    """

    path: Path
    identity: str
    seconds: float = 60.0

    def __post_init__(self) -> None:
        self._written = time.monotonic()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Put the stored state in place; returns the number of epochs that are done, 0 without a file.

        Raises:
            EraseError: the file is damaged or belongs to another training.
        """
        if not self.path.is_file():
            return 0
        advice = "delete it, and this training starts again"
        try:
            stored, header = tensor_files.read_own(self.path, copied=True, kind=KIND)
        except EraseError as error:
            raise EraseError(f"{error}; {advice}") from error
        if header["identity"] != self.identity:
            raise EraseError(f"{self.path} belongs to another training; {advice}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "generator": {}}
        for name, tensor in stored.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        model.load_state_dict(parts["model"])
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(parts["generator"]["state"])
        return int(header["epochs"])

    def keep(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        epochs: int,
        *,
        last: bool = False,
    ) -> None:
        """Write the state after `epochs` epochs, if the last one written is old enough; remove it after the last."""
        if last:
            self.path.unlink(missing_ok=True)
            return
        if time.monotonic() - self._written < self.seconds:
            return
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": value for key, value in state.items() if torch.is_tensor(value)}
        tensors["generator/state"] = generator.get_state()
        tensor_files.write_tensors(self.path, tensors, {"kind": KIND, "identity": self.identity, "epochs": epochs})
        self._written = time.monotonic()
