"""Files of `torch.save`, read without running any code that they name.

A pickle names functions and classes, and loading it calls them. PyTorch Lightning checkpoints hold callback objects
beside their weights, so torch's own safe loader (`weights_only=True`) refuses the whole file. Here tensors and plain
containers are built as usual, and every other class or function is replaced by an inert stub: nothing else is called.
"""

import collections
import pickle
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import _utils

from erase.errors import EraseError, no_file


def load(path: str | Path) -> tuple[Any, list[str]]:
    """The content of a file of `torch.save`, on the CPU, and the sorted names of what was replaced by stubs.

    Names are dotted, such as "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"; usually there are none.

    Raises:
        EraseError: the file cannot be read, or is a TorchScript archive.
    """
    if not Path(path).is_file():
        raise EraseError(no_file(path))
    try:
        return _load(path, weights_only=True), []
    except pickle.UnpicklingError:  # it names something that torch does not build; or it is damaged
        pass
    except Exception as error:
        raise _unreadable(path, error) from error
    stubs: set[str] = set()

    class Unpickler(_Unpickler):
        def stub(self, name: str) -> Any:
            stubs.add(name)
            return super().stub(name)

    def read(file: BinaryIO, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    # what torch asks of a pickle module
    module = SimpleNamespace(__name__="erase.pickles", Unpickler=Unpickler, load=read)
    try:
        return _load(path, weights_only=False, pickle_module=module), sorted(stubs)
    except Exception as error:  # a damaged pickle may raise anything
        raise _unreadable(path, error) from error


def tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict in a file of `torch.save`, and the names of stubs; see `load`. Of several, the last of `states`.

    Raises:
        EraseError: the file cannot be read, or holds no state dict.
    """
    found, stubs = states(path)
    return found[-1], stubs


def states(path: str | Path) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
    """The state dicts in a file of `torch.save`, and the names of stubs; see `load`.

    The file holds a state dict itself or, under "state_dict", "model" or "unet", among other things; or it holds a list
    of states, as DDIM's code writes them: weights, optimizer, step and, last, the moving average of the weights.
    Whatever is no tensor is left out.

    Raises:
        EraseError: the file cannot be read, or holds no state dict.
    """
    content, stubs = load(path)
    for key in ("state_dict", "model", "unet"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    parts = [part for part in (content if isinstance(content, list) else [content]) if isinstance(part, dict)]
    found = [{k: v for k, v in part.items() if torch.is_tensor(v)} for part in parts]
    found = [part for part in found if part]
    if not found or not all(isinstance(name, str) for part in found for name in part):
        raise EraseError(f"{path} holds no weights by name (a state dict); give the file of torch.save that does")
    return found, stubs


def require_allowed(path: str | Path, allow_pickle: bool) -> None:
    """Raise an EraseError for a file of `torch.save` that the user has not allowed."""
    if not allow_pickle:
        raise EraseError(
            f"{path} is a pickle, which can run code when loaded; "
            "use a .safetensors file, or pass --allow-pickle if you trust its source"
        )


def stubbed(path: str | Path, stubs: list[str]) -> str:
    """One line for the user about what `load` replaced."""
    shown = ", ".join(stubs[:4]) + (f" and {len(stubs) - 4} more" if len(stubs) > 4 else "")
    return f"{path} also holds objects that are no weights ({shown}); they were not built, and none of their code ran"


class _Unpickler(pickle.Unpickler):
    """Finds what tensors and plain containers are made of, and stubs for all else."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.stub(f"{module}.{name}")

    def stub(self, name: str) -> Any:
        return type("Stub", (_Stub,), {"__qualname__": name})


class _Stub:
    """Stands for an object of any class: takes whatever a pickle puts into one, and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): _utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
}


def _load(path: str | Path, **how: Any) -> Any:
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4" and not zipfile.is_zipfile(path):
            raise ValueError("it is cut short")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of storages that were saved by older versions
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), **how)


def _unreadable(path: str | Path, error: Exception) -> EraseError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
    return EraseError(f"{path} cannot be read as a file of torch.save ({reason}); copy or download it again")
