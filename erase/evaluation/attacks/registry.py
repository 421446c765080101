"""Attacks by name: one a file in this folder, and those of other packages (entry points `erase.attacks`)."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from erase.errors import EraseError
from erase.evaluation.attacks.protocol import Attack
from erase.registry import Registry, in_folder

# modules of this folder that are no attack
OTHERS = ("protocol", "registry", "guarded", "changed", "found_words")
PRESETS = Path(__file__).with_name("presets.toml")

ATTACKS: Registry[Attack] = Registry(
    "attack",
    base=Attack,
    group="erase.attacks",
    own=in_folder("erase.evaluation.attacks", Path(__file__).parent, skip=OTHERS),
)


def make(name: str, presets: Sequence[str] = (), given: Sequence[str] = ()) -> Attack:
    """The attack with its settings: the class's defaults, those of the presets in turn, the given ones.

    presets: tables of presets.toml: "sd", "mini", "classes", "quick".
    given: "name=value" texts, as --set takes them; several values of one setting are parted by "|".

    Raises:
        EraseError: no such attack or setting, or a value of another type.
    """
    cls: Any = ATTACKS.load(name)
    hints = get_type_hints(cls)
    types = {item.name: hints[item.name] for item in fields(cls)}
    stored, values = tomllib.loads(PRESETS.read_text(encoding="utf-8")), {}
    for preset in presets:
        values |= stored.get(preset, {}).get(name, {})
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in types:
            raise EraseError(f"--set is {text!r}; the attack {name} has {', '.join(types) or 'no settings'}")
        values[key] = _parsed(value.strip(), types[key], text)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _parsed(value: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_parsed(part.strip(), get_args(kind)[0], text) for part in value.split("|"))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise EraseError(f"--set is {text!r}; choose {', '.join(get_args(kind))}")
        return value
    if kind is str:
        return value
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        number = kind(value)
        if not math.isfinite(number) or number < 0:
            raise ValueError
        return number
    except (KeyError, ValueError, OverflowError) as error:
        wanted = {bool: "true or false", int: "a whole number, 0 or more", float: "a number, 0 or more"}[kind]
        raise EraseError(f"--set is {text!r}; it must be {wanted}") from error
