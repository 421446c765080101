"""The tuned numbers of presets.toml: how each method is run and how the original models are trained.

Standard library only, so that `--help` needs no torch.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from erase.errors import EraseError
from erase.words import did_you_mean

MOST_SIZE = 4096  # of images, in pixels a side
PATH = Path(__file__).with_name("presets.toml")
Kind = Literal["share", "half", "class"]  # of a request: see `settings.kind_of`


@dataclass(frozen=True)
class Preset:
    """Defaults of a method.

    method: "file:Class" in methods/, or the name of another package's method; "" trains a new model on the retain set.
    mask: the weights that may change. density: their share, where there is a mask.
    options: values of the class's fields that differ from the class's own defaults.
    optimizer: "sgd" or "adam".
    """

    method: str = ""
    epochs: int = 0
    learning_rate: float = 0.0
    mask: str = "none"
    options: tuple[tuple[str, float], ...] = ()
    optimizer: str = "sgd"
    density: float = 0.5


@dataclass(frozen=True)
class Training:
    """Defaults of a data set: the network of its original model, and the training of this and the retrained model.

    batch_norm: of unlearning, see `descent.Recipe`.
    """

    network: str
    batch_size: int
    epochs: int
    learning_rate: float
    batch_norm: str = "moving"


@dataclass(frozen=True)
class Presets:
    """The content of presets.toml.

    general: by method. tuned: by data set and kind of request, then by method. training: by data set, and "default".
    """

    general: Mapping[str, Preset]
    tuned: Mapping[tuple[str, str], Mapping[str, Preset]]
    training: Mapping[str, Training]


def read(path: Path) -> Presets:
    """Read and check a file in the format of presets.toml.

    Raises:
        EraseError: the file cannot be read or is not TOML, or a table has an unknown name, an unknown field or a value
            of the wrong type; the message names the table.
    """
    try:
        stored = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EraseError(f"{path} cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise EraseError(f"{path} is not TOML: {error}") from error
    where = str(path)
    _require_names(stored, ("training", "presets", "tuned"), where)
    training = {
        name: Training(**_values(Training, row, f"{where}, [training.{name}]"))
        for name, row in _tables(stored.get("training", {}), f"{where}, [training]").items()
    }
    if "default" not in training:
        raise EraseError(f"{where} has no table [training.default]")
    general = {
        name: Preset(**_values(Preset, row, f"{where}, [presets] {name}"))
        for name, row in _tables(stored.get("presets", {}), f"{where}, [presets]").items()
    }
    tuned: dict[tuple[str, str], dict[str, Preset]] = {}
    for data, kinds in _tables(stored.get("tuned", {}), f"{where}, [tuned]").items():
        _require_names(kinds, get_args(Kind), f"{where}, [tuned.{data}]")
        for kind, rows in _tables(kinds, f"{where}, [tuned.{data}]").items():
            here = f"{where}, [tuned.{data}.{kind}]"
            _require_names(rows, general, here)
            tuned[data, kind] = {
                name: replace(general[name], **_values(Preset, row, f"{here} {name}"))
                for name, row in _tables(rows, here).items()
            }
    return Presets(general, tuned, training)


def _require_names(table: Any, known: Any, where: str) -> None:
    for name in _table(table, where):
        if name not in known:
            hint = did_you_mean(name, known).rstrip() or f"choose {', '.join(known)}"
            raise EraseError(f"{where}: unknown name {name!r}; {hint}")


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EraseError(f"{where} is {value!r}; it must be a table")
    return value


def _tables(value: Any, where: str) -> dict[str, dict[str, Any]]:
    return {name: _table(row, f"{where} {name}") for name, row in _table(value, where).items()}


_NOUNS = {str: "a string", int: "a whole number, 0 or more", float: "a number, 0 or more", tuple: "a table of numbers"}


def _values(cls: type[Preset] | type[Training], row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as arguments of the dataclass."""
    texts: dict[str, type] = dict.fromkeys(("method", "network", "mask", "optimizer", "batch_norm"), str)
    kinds = texts | {"options": tuple, "learning_rate": float, "density": float}
    names = [item.name for item in fields(cls)]
    _require_names(row, names, where)
    missing = [item.name for item in fields(cls) if item.default is MISSING and item.name not in row]
    if missing:
        raise EraseError(f"{where} has no {missing[0]}")
    return {name: _value(value, kinds.get(name, int), f"{where}: {name}") for name, value in row.items()}


def _value(value: Any, kind: type, where: str) -> Any:
    if kind is float and _is_number(value):
        return float(value)
    if kind is int and _is_number(value) and isinstance(value, int):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is tuple and isinstance(value, dict) and all(map(_is_number, value.values())):
        return tuple(value.items())
    raise EraseError(f"{where} is {value!r}; it must be {_NOUNS[kind]}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


_STORED = read(PATH)
PRESETS, TUNED, TRAINING = _STORED.general, _STORED.tuned, _STORED.training
