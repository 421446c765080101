"""Options as fields of a dataclass: their types, ranges and choices, checked in one place.

Standard library only, so that `--help` needs no torch.
"""

import functools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from erase.errors import EraseError
from erase.words import did_you_mean


def option(default: Any, help: str, *, group: str, **metadata: Any) -> Any:
    """A dataclass field with its metadata for the command line.

    group: heading of `--help` under which it stands. metadata, as far as it applies: `least` and `most`, the smallest
    and the largest number allowed; `aliases`, other flags for it; `shown`, what stands for a default of None in
    `--help`; `metavar`, its value's name there; `choices`, the texts allowed where a Literal cannot list them;
    `also`, the form of a text with a colon that is allowed beside them; `more`, a function that finds further texts;
    `is_open`, a function that says whether any other text is allowed, which is then checked later.
    """
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class Form:
    """The values that a field takes: their type, the texts allowed (empty: any), and whether it holds several."""

    type: type
    choices: tuple[str, ...] = ()
    is_repeated: bool = False


@functools.cache
def forms_of(options: type) -> dict[str, Form]:
    """The form of every field of a dataclass of options, by its name."""
    annotations = get_type_hints(options)
    found = {item.name: form_of(annotations[item.name]) for item in fields(options)}
    listed = {item.name: item.metadata["choices"] for item in fields(options) if "choices" in item.metadata}
    return found | {name: replace(found[name], choices=choices) for name, choices in listed.items()}


def make_plain(options: Any) -> None:
    """Make every value of a frozen dataclass of options plain, and raise an EraseError for one that is not allowed."""
    for item in fields(options):
        value = getattr(options, item.name)
        if value is not None or item.default is not None:
            object.__setattr__(options, item.name, checked(value, item, forms_of(type(options))[item.name]))


# one type for all: typing remembers the order of the first Literal with these texts
Precision = Literal["fp32", "fp16", "bf16"]
MIXED_PRECISION = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}  # diffusers' names, and ours


def agreed_precision(precision: str | None, mixed_precision: str | None) -> str | None:
    """The precision, which may be given under either name.

    Raises:
        EraseError: the two names have different values, or `mixed_precision` has none that exists.
    """
    if mixed_precision is None:
        return precision
    if mixed_precision not in MIXED_PRECISION:
        raise EraseError(f"--mixed-precision is {mixed_precision!r}; choose {', '.join(MIXED_PRECISION)}")
    if precision not in {None, MIXED_PRECISION[mixed_precision]}:
        raise EraseError(
            f"--precision is {precision} but --mixed-precision {mixed_precision}; they mean the same, leave one out"
        )
    return MIXED_PRECISION[mixed_precision]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def form_of(annotation: Any) -> Form:
    """Of X, X | None, Literal[texts], tuple[X, ...] and X | tuple[X, ...], which are all that Settings is made of."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        *_, last = (part for part in parts if part is not NoneType)  # of X | tuple[X, ...] the tuple
        return form_of(last)
    if origin is tuple:
        return replace(form_of(parts[0]), is_repeated=True)
    if origin is Literal:
        return Form(str, choices=parts)
    assert annotation in _PLAIN, annotation
    return Form(annotation)


# A value as argparse and JSON know it: a number of numpy becomes Python's, a Path a text.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: bool(operator.index(value)),
    int: operator.index,
    float: float,
    str: os.fspath,
}
_NOUNS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


def checked(value: Any, item: Field[Any], form: Form) -> Any:
    if form.is_repeated:
        if isinstance(value, Mapping):
            value = [f"{name}={one}" for name, one in value.items()]
        if not isinstance(value, Iterable):
            raise EraseError(f"{flag(item.name)} is {value!r}; it must be a string or several strings")
        several = [value] if isinstance(value, (str, os.PathLike)) else value
        return tuple(_checked_one(one, item, form) for one in several)
    return _checked_one(value, item, form)


def _checked_one(value: Any, item: Field[Any], form: Form) -> Any:
    try:
        if isinstance(value, bool) and form.type is not bool:
            raise TypeError("bool")  # Python counts True as 1, but `seed = true` in a file is a mistake
        plain = _PLAIN[form.type](value)
    except (TypeError, ValueError, OverflowError) as error:
        raise EraseError(f"{flag(item.name)} is {value!r}; it must be {_NOUNS[form.type]}") from error
    if form.choices and plain not in form.choices and not ("also" in item.metadata and ":" in plain):
        choices = [*form.choices, *item.metadata.get("more", tuple)()]
        if plain in choices or item.metadata.get("is_open", bool)():
            return plain
        guess = did_you_mean(plain, choices)
        hint = f"{guess}({', '.join(choices)})" if guess else f"choose {', '.join(choices)}"
        raise EraseError(f"{flag(item.name)} is {plain!r}; {hint}")
    least, most = item.metadata.get("least"), item.metadata.get("most", math.inf)
    if least is not None and (not least <= plain <= most or plain == math.inf):
        allowed = (f"at least {least}" if least else "0 or more") + (f" and at most {most}" if most < math.inf else "")
        raise EraseError(f"{flag(item.name)} is {plain}; it must be {allowed}")
    return plain
