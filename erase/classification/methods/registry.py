"""The methods by name: ours, those of other packages, and any class; and how a method is made from option texts.

Packages register methods under the entry points `erase.classification.methods`; "module:Class" names any class that can
be imported.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass

from erase.classification.methods.protocol import Descends, Method, Solves
from erase.classification.presets import PRESETS, Preset
from erase.errors import EraseError
from erase.registry import Registry
from erase.words import did_you_mean


def problem(cls: type[Method]) -> str | None:
    """What is wrong with a method's class, in words that follow its name; None if nothing is."""
    if not issubclass(cls, (Descends, Solves)):
        return "derives from neither Descends nor Solves of erase.classification.methods"
    if not is_dataclass(cls):
        return "is not a dataclass; write @dataclass(frozen=True) above it"
    for item in fields(cls):
        if item.default is MISSING or type(item.default) not in (bool, int, float):
            return f"has the option {item.name!r} without a default that is a number, True or False"
    return None


def made_registry() -> Registry[Method]:
    """A registry of our methods and of those that are installed now."""
    return Registry(
        "method",
        base=Method,
        group="erase.classification.methods",
        own={name: f"{__package__}.{preset.method}" for name, preset in PRESETS.items() if preset.method},
        check=problem,
    )


REGISTRY = made_registry()  # one new method of ours is one new file and one line in presets.toml


def others() -> tuple[str, ...]:
    """Names of the methods that other installed packages register."""
    return tuple(name for name in REGISTRY.names() if name not in PRESETS)


def find(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        EraseError: no such method, or its class does not fit the contract in protocol.py.
    """
    return REGISTRY.load(name)


def preset(name: str) -> Preset:
    """Defaults of a method of another package, which its class states.

    Raises:
        EraseError: see `find`.
    """
    cls = find(name)
    return Preset(name, cls.epochs, cls.learning_rate, cls.mask, optimizer=cls.optimizer)


def make(class_of: type[Method], label: str, options: Mapping[str, str]) -> Method:
    """A method from the texts of its options.

    label: name of the method in error messages.

    Raises:
        EraseError: the method has no such option, or the value has the wrong type.
    """
    known = {item.name: item.default for item in fields(class_of)}  # pyright: ignore[reportArgumentType]
    values: dict[str, object] = {}
    for name, text in options.items():
        if name not in known:
            hint = did_you_mean(name, known).rstrip() or f"it has {', '.join(known) or 'none'}"
            raise EraseError(f"{label} has no option {name!r}; {hint}")
        values[name] = _value(label, name, text, type(known[name]))
    return class_of(**values)


def _value(label: str, name: str, text: str, kind: type) -> bool | float:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise EraseError(f"{name} of {label} is {text!r}; it must be true or false")
    try:
        value = kind(text)
        if not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, OverflowError):
        noun = "a whole number" if kind is int else "a number"
        raise EraseError(f"{name} of {label} is {text!r}; it must be {noun}") from None
