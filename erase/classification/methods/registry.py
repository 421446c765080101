"""All methods by class name, and how a method is made from option texts."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields

from erase.classification.methods.boundary import BoundaryExpand, BoundaryShrink
from erase.classification.methods.fine_tune import FineTune
from erase.classification.methods.fisher import FisherForgetting
from erase.classification.methods.gradient_ascent import GradientAscent
from erase.classification.methods.influence import Influence
from erase.classification.methods.l1_sparse import L1Sparse
from erase.classification.methods.protocol import Method
from erase.classification.methods.random_label import RandomLabel, RandomLabelJoint
from erase.classification.methods.scissorhands import Scissorhands
from erase.classification.methods.soft_threshold import SoftThreshold
from erase.errors import EraseError
from erase.words import did_you_mean

# a new method is a new file and one line here; presets.toml names it
METHODS: dict[str, type[Method]] = {
    "FineTune": FineTune,
    "GradientAscent": GradientAscent,
    "RandomLabel": RandomLabel,
    "RandomLabelJoint": RandomLabelJoint,
    "SoftThreshold": SoftThreshold,
    "L1Sparse": L1Sparse,
    "BoundaryShrink": BoundaryShrink,
    "BoundaryExpand": BoundaryExpand,
    "Scissorhands": Scissorhands,
    "Influence": Influence,
    "FisherForgetting": FisherForgetting,
}


def find(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        EraseError: no such class.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS).rstrip() or f"choose {', '.join(METHODS)}"
        raise EraseError(f"unknown method class {name!r}; {hint}")
    return METHODS[name]


def make(class_of: type[Method], label: str, options: Mapping[str, str]) -> Method:
    """A method from the texts of its options.

    label: name of the method in error messages.

    Raises:
        EraseError: the method has no such option, or the value has the wrong type.
    """
    known = {item.name: item.default for item in fields(class_of)}  # pyright: ignore[reportArgumentType]
    assert MISSING not in known.values(), class_of
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
