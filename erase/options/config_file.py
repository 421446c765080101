"""`--config-file`: the options of a command from a TOML file, or from the run.json of a finished run."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from erase import files
from erase.errors import EraseError
from erase.options.declare import checked, forms_of
from erase.words import did_you_mean

_OF_ONE_CALL = {"overwrite", "resume"}  # what a recorded run did with its folder is not repeated
_NAMES = ("precision", "mixed_precision")  # of one option


def merged(path: str | None, given: Mapping[str, Any], options: type) -> dict[str, Any]:
    """The options of the file with those of the command line in their place; None there means not given.

    Raises:
        EraseError: see `read`.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if path is None:
        return named
    taken = {*named, *(_NAMES if not named.keys().isdisjoint(_NAMES) else ())}
    return {name: value for name, value in read(Path(path), options).items() if name not in taken} | named


def read(path: Path, options: type) -> dict[str, Any]:
    """Values by the name of the field of `options`, a dataclass of options. Relative paths stay relative.

    Raises:
        EraseError: the file cannot be read, is of an unfinished run, or holds an option that does not exist or a value
            that it may not have.
    """
    values = _recorded(path) if path.suffix == ".json" else _written(path)
    known = {item.name: item for item in fields(options)}
    forms, found = forms_of(options), dict[str, Any]()
    for key, value in values.items():
        name = key.replace("-", "_")
        if name == "mixed_precision":
            found[name] = value  # checked together with `precision`
        elif name not in known:
            raise EraseError(f"{path}: there is no option {key!r}; {did_you_mean(name, known)}(see --help)")
        else:
            try:
                found[name] = checked(value, known[name], forms[name])
            except EraseError as error:
                raise EraseError(f"{path}: {error}") from error
    return found


def _written(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # Windows' editors write a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EraseError(f"{path} is not valid TOML: {error}") from error


def _recorded(path: Path) -> dict[str, Any]:
    stored = files.read_json(path)
    settings = stored.get("settings")
    if stored.get("status", "done") != "done" or not isinstance(settings, dict):
        raise EraseError(f"{path} is not the record of a finished run; give the run.json of one, or a .toml")
    without_effect = {  # recorded, but refused when given
        "num_forget": settings.get("forget_images") is not None,
        "num_retain": settings.get("retain_images") is not None,
        "lora_rank": "lora" not in settings.get("save", ()),
    }
    left_out = _OF_ONE_CALL | {name for name, is_so in without_effect.items() if is_so}
    return {name: value for name, value in settings.items() if value is not None and name not in left_out}
