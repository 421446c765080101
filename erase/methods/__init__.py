"""Erasure methods: one paper, one file; each a frozen dataclass whose `loss` or `solve` is the paper's formula.

What a method class may have beside its fields, all optional but one of `loss` and `solve`:
    loss(model, frozen, batch)  yields (name, term) pairs, each backpropagated before the next is asked for
    solve(weights, text)        new weights by name, without training, and notes on the solution for run.json
    pictures                    the forget set: "concept" (default), "anchor", "trajectory", "noise"; see `erase.data`
    retains                     False: `loss` asks for no retain pictures, and none are drawn
    anchors                     False: neither `loss` nor `solve` asks what to say instead
    needs_base                  True: `loss` asks `frozen`, or `shrink` is there, and the loop keeps the base's values
    balance(ff, fr, rr)         factors of the "forget" and the "retain" gradient, from their inner products; None: 1, 1
    teacher_decay               the loop keeps an average of the weights, draws trajectories from it and returns it
    prepare(weights, ...)       changes weights before the first step, from the gradients of `prepare_batches` batches
    shrink(moved, step, steps)  changes how far weights have moved, after each step
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from erase.errors import EraseError


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for: a class, and what its authors run it with; None is the general default.

    path: "file:Class" in this package. hyperparameters: those that differ from the class's own defaults.
    target: "anchor" where the paper has nothing else; None leaves it to the recipe.
    """

    path: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "full"
    mask: str = "none"
    target: str | None = "anchor"
    learning_rate: float | None = None
    num_train_steps: int | None = None
    batch_size: int | None = None
    rank: int | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    num_forget: int | None = None
    num_inference_steps: int | None = None

    def defaults(self) -> dict[str, Any]:
        """The settings that this name implies."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found["alpha"] = self.hyperparameters.get("alpha")
        return {k: v for k, v in found.items() if k not in {"path", "hyperparameters"} and v is not None}


# one new method is one new file and one line here
METHODS: dict[str, Preset] = {
    "salun": Preset("relabel:Relabel", mask="saliency", target=None),
    "relabel": Preset("relabel:Relabel", target=None),
    "salun-soft": Preset("soft:Soft", target=None),
    "ga": Preset("ascent:GradientAscent", {"alpha": 0.1}, num_train_steps=1000),
    "esd-x": Preset(
        "esd:ESD",
        scope="xattn",
        learning_rate=5e-5,
        num_train_steps=200,
        batch_size=1,
        num_forget=200,
        num_inference_steps=50,
    ),
    "esd-strict": Preset(
        "esd:ESD",
        scope="xattn-kv",
        learning_rate=5e-5,
        num_train_steps=200,
        batch_size=1,
        num_forget=200,
        num_inference_steps=50,
    ),
    "leco": Preset(
        "esd:ESD",
        {"guidance": 1.0, "target": "paper"},
        scope="xattn",
        learning_rate=1e-4,
        num_train_steps=500,
        batch_size=1,
        rank=4,
        num_forget=500,
        num_inference_steps=50,
    ),
    "esd-u": Preset(
        "esd:ESD",
        {"guidance": 1.0, "target": "paper"},
        scope="noxattn",
        num_train_steps=1000,
        batch_size=1,
        num_inference_steps=50,
    ),
    "esd-full": Preset(
        "esd:ESD", {"guidance": 1.0, "target": "paper"}, num_train_steps=1000, batch_size=1, num_inference_steps=50
    ),
    "fmn": Preset(
        "fmn:ForgetMeNot",
        learning_rate=2e-6,
        num_train_steps=35,
        batch_size=1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        num_forget=35,
    ),
    "ca": Preset(
        "ablation:Ablation",
        {"alpha": 0.0},
        scope="xattn-kv",
        learning_rate=8e-6,
        num_train_steps=100,
        batch_size=4,
        weight_decay=0.01,
    ),
    "sdd": Preset("sdd:SelfDistillation", scope="xattn", num_train_steps=1500, batch_size=1, num_inference_steps=50),
    "erasediff": Preset("erasediff:EraseDiff"),
    "scissorhands": Preset("scissorhands:Scissorhands", learning_rate=2e-5, num_train_steps=150, batch_size=16),
    "uce": Preset("uce:UCE", scope="xattn-kv"),
    "rece": Preset("rece:RECE", scope="xattn-kv"),
    "speed": Preset("speed:SPEED", scope="xattn-kv"),
}

_GIVEN: dict[str, type] = {}  # classes that a caller handed over, by "module:Class"


def find(name: str) -> Preset:
    """The preset of a method; of "module:Class", a class of anybody's, the general defaults.

    Raises:
        EraseError: no such method.
    """
    if name not in METHODS and ":" in name:
        return Preset(name)
    if name not in METHODS:
        guess = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {guess[0]}?" if guess else ""
        raise EraseError(f"unknown method {name!r}{hint} ({', '.join(sorted(METHODS))})")
    return METHODS[name]


def load(name: str) -> type:
    """The class of a method.

    Raises:
        EraseError: "module:Class" cannot be imported, or is no dataclass with a `loss` or a `solve`.
    """
    from importlib import import_module

    if name in METHODS:
        module, class_name = METHODS[name].path.split(":")
        return getattr(import_module(f"erase.methods.{module}"), class_name)
    if name in _GIVEN:
        return _GIVEN[name]
    module, _, class_name = find(name).path.partition(":")
    try:
        cls = getattr(import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise EraseError(f"the method {name!r} cannot be imported ({error}); write package.module:Class") from error
    return _method(cls, name)


def give(method: Any) -> tuple[str, dict[str, Any]]:
    """("module:Class", hyperparameters) of a method class or of an instance, which `load` and `make` find from now on.

    Raises:
        EraseError: it is no dataclass with a `loss` or a `solve`.
    """
    cls = method if isinstance(method, type) else type(method)
    name = f"{cls.__module__}:{cls.__qualname__}"
    _GIVEN[name] = _method(cls, name)
    if isinstance(method, type):
        return name, {}
    return name, {item.name: getattr(method, item.name) for item in fields(method)}


def _method(cls: Any, name: str) -> type:
    if not (isinstance(cls, type) and is_dataclass(cls) and (hasattr(cls, "loss") or hasattr(cls, "solve"))):
        raise EraseError(f"the method {name!r} is no dataclass with a loss or a solve; see erase.methods")
    return cls


def make(name: str, general: Mapping[str, Any], given: Iterable[str]) -> Any:
    """The method with its hyperparameters: the class's defaults, the preset's, `general` where it has such fields, the
    given ones.

    general: what recipe and options say of every method. given: "name=value" texts, as --set takes them.

    Raises:
        EraseError: no such hyperparameter, or a value of another type.
    """
    cls: Any = load(name)
    hints = get_type_hints(cls)
    types = {item.name: hints[item.name] for item in fields(cls)}
    values = dict(find(name).hyperparameters) | {key: value for key, value in general.items() if key in types}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in types:
            known = ", ".join(f"{item.name}={item.default}" for item in fields(cls))
            raise EraseError(f"--set is {text!r}; {name} has {known}")
        values[key] = _parsed(value.strip(), types[key], text)
    try:
        return cls(**values)
    except TypeError as error:  # a hyperparameter without a default
        raise EraseError(f"the method {name!r} cannot be made ({error}); complete it with --set") from error


def _parsed(value: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise EraseError(f"--set is {text!r}; choose {', '.join(get_args(kind))}")
        return value
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is str:
            return value
        if kind not in (int, float):
            raise EraseError(f"--set is {text!r}; a hyperparameter of this type cannot be given as text")
        number = kind(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (KeyError, ValueError, OverflowError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise EraseError(f"--set is {text!r}; it must be {wanted}") from error
