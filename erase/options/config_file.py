"""`--config-file`: the options of a command from a TOML file, or from the run.json of a finished run."""

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from erase import files, methods
from erase.errors import EraseError, no_file
from erase.options.declare import checked, flag, forms_of
from erase.options.effect import OF_IMAGES, OF_TRAINING
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
    found = read(Path(path), options)
    if Path(path).suffix == ".json":
        _require_same_defaults(path, found, named)
    taken = {*named, *(_NAMES if not named.keys().isdisjoint(_NAMES) else ())}
    return {name: value for name, value in found.items() if name not in taken} | named


def read(path: Path, options: type) -> dict[str, Any]:
    """Values by the name of the field of `options`, a dataclass of options. Relative paths stay relative.

    Raises:
        EraseError: the file cannot be read, is of an unfinished run, or holds an option that does not exist or a value
            that it may not have.
    """
    if path.is_dir():
        raise EraseError(f"{path} is a folder; give the run.json in it, or a .toml")
    if not path.exists():
        raise EraseError(no_file(path))
    record = files.read_json(path) if path.suffix == ".json" else None
    values = _written(path) if record is None else _recorded(path, record)
    known = {item.name: item for item in fields(options)}
    aliases = {alias.removeprefix("--"): name for name in known for alias in known[name].metadata.get("aliases", ())}
    forms, found = forms_of(options), dict[str, Any]()
    for key, value in values.items():
        name = aliases.get(key, key.replace("-", "_"))
        if name in found:
            raise EraseError(f"{path}: {key!r} is a second value for {flag(name)}; leave one out")
        if name == "mixed_precision":
            if not isinstance(value, str):
                raise EraseError(f"{path}: {flag(name)} is {value!r}; it must be a string")
            found[name] = value  # checked together with `precision`
        elif name not in known:
            raise EraseError(f"{path}: there is no option {key!r}; {did_you_mean(name, known)}see --help")
        else:
            try:
                found[name] = checked(value, known[name], forms[name])
            except EraseError as error:
                raise EraseError(f"{path}: {error}") from error
    return found if record is None else _with_effect(found, record.get("method"))


def _require_same_defaults(path: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse another method or recipe for a recorded run: its record has no defaults left that they could fill in."""
    for name in ("method", "recipe"):
        if name in recorded and given.get(name, recorded[name]) != recorded[name]:
            raise EraseError(
                f"{path} has every setting of {flag(name)} {recorded[name]}, so {flag(name)} {given[name]} would not "
                "get its own defaults; write the options to keep in a .toml file"
            )


def _written(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # Windows' editors write a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EraseError(f"{path} is not valid TOML: {error}") from error


def _recorded(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a finished run that are not None and that a file may have."""
    settings = record.get("settings")
    if record.get("status", "done") != "done" or not isinstance(settings, dict):
        raise EraseError(f"{path} is not the record of a finished run; give the run.json of one, or a .toml")
    return {name: value for name, value in settings.items() if value is not None and name not in _OF_ONE_CALL}


def _with_effect(settings: dict[str, Any], method: Any) -> dict[str, Any]:
    """The recorded settings without those that are refused when given, because they had no effect.

    method: what the record says of the method and its hyperparameters.
    """
    without_effect = {
        "num_forget": "forget_images" in settings,
        "num_retain": "retain_images" in settings,
        "lora_rank": "lora" not in settings.get("save", ()),
        "alpha": (isinstance(method, dict) and "alpha" not in method)
        or "alpha" in (text.partition("=")[0].strip() for text in settings.get("set", ())),
    }
    steps, name = settings.get("num_train_steps"), settings.get("method")
    if steps is not None and name and not issubclass(methods.load(name), methods.TrainedMethod):
        is_scored = settings.get("mask") in {"saliency", "inverse"}
        without_effect |= dict.fromkeys(OF_TRAINING if is_scored else (*OF_TRAINING, *OF_IMAGES), True)
    without_effect["anchor_every"] = bool(steps) and settings.get("anchor_every", 0) > steps
    return {name: value for name, value in settings.items() if not without_effect.get(name)}
