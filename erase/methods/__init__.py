"""Erasure methods: one paper, one file; each a frozen dataclass whose `loss` or `solve` is the paper's formula.

What a method class may have beside its fields, all optional but one of `loss` and `solve`:
    loss(model, frozen, batch)  yields (name, term) pairs, each backpropagated before the next is asked for
    solve(weights, text)        the new weights themselves, without training
    pictures                    what `loss` sees: "concept" (default), "anchor" or "trajectory"; see `erase.data`
    balance(ff, fr, rr)         factors of the "forget" and the "retain" gradient, from their inner products
    teacher_decay               the loop keeps an average of the weights, draws trajectories from it and returns it
    prepare(parameters, ...)    changes weights before the first step
    shrink(moved, step, steps)  changes how far weights have moved, after each step
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from erase.errors import EraseError


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for: a class, and what its authors run it with; None is the general default.

    path: "file:Class" in this package. hyperparameters: those that differ from the class's own defaults.
    """

    path: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "full"
    mask: str = "none"
    learning_rate: float | None = None
    num_train_steps: int | None = None
    batch_size: int | None = None

    def defaults(self) -> dict[str, Any]:
        """The settings that this name implies."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {k: v for k, v in found.items() if k not in {"path", "hyperparameters"} and v is not None}


# one new method is one new file and one line here
METHODS: dict[str, Preset] = {
    "salun": Preset("relabel:Relabel", mask="saliency"),
    "relabel": Preset("relabel:Relabel"),
}


def find(name: str) -> Preset:
    """The preset of a method.

    Raises:
        EraseError: no such method.
    """
    if name not in METHODS:
        guess = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise EraseError(f"unknown method {name!r}{hint} ({', '.join(sorted(METHODS))})")
    return METHODS[name]


def load(name: str) -> type:
    """The class of a method."""
    from importlib import import_module

    module, class_name = find(name).path.split(":")
    return getattr(import_module(f"erase.methods.{module}"), class_name)


def make(name: str, general: Mapping[str, Any], given: Iterable[str]) -> Any:
    """The method with its hyperparameters: the class's defaults, `general` where it has such fields, the preset's, the
    given ones.

    general: what recipe and options say of every method. given: "name=value" texts, as --set takes them.

    Raises:
        EraseError: no such hyperparameter, or a value of another type.
    """
    cls: Any = load(name)
    types = {item.name: item.type for item in fields(cls)}
    values = {key: value for key, value in general.items() if key in types} | dict(find(name).hyperparameters)
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in types:
            known = ", ".join(f"{item.name}={item.default}" for item in fields(cls))
            raise EraseError(f"--set is {text!r}; {name} has {known}")
        values[key] = _parsed(value.strip(), types[key], text)
    return cls(**values)


def _parsed(value: str, kind: Any, text: str) -> Any:
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except (KeyError, ValueError) as error:
        wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise EraseError(f"--set is {text!r}; it must be {wanted}") from error
