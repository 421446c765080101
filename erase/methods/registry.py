"""The methods by name: ours with the settings that their papers use, those of other packages, and any class.

Packages register methods under the entry points `erase.methods`; "module:Class" names any class that can be imported.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from typing import Any, Literal, get_args, get_origin, get_type_hints

from erase.errors import EraseError
from erase.methods.protocol import derived, problem
from erase.registry import OWN, Registry
from erase.words import did_you_mean


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for: a class, and what its authors run it with; None is the general default.

    path: "file:Class" in this package. hyperparameters: those that differ from the class's own defaults.
    target: "anchor" where the paper has nothing else; None leaves it to the recipe.
    nudity: settings that the authors use for nudity instead, and under "hyperparameters" those of the method.
    families: settings for models of a family, see `Method.settings_for`; those of ours are in the models' folders.
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
    lr_scheduler: str | None = None
    proportion_empty_prompts: float | None = None
    anchor_every: int | None = None
    num_forget: int | None = None
    num_inference_steps: int | None = None
    nudity: Mapping[str, Any] = field(default_factory=dict)
    families: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def defaults(self, kind: str | None = None) -> dict[str, Any]:
        """The settings that this name implies for a concept of this kind."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found["alpha"] = self.hyperparameters.get("alpha")
        found |= self.nudity if kind == "nudity" else {}
        return {k: v for k, v in found.items() if k not in _NO_SETTINGS and v is not None}

    def settings_of_method(self, kind: str) -> tuple[str, ...]:
        """Hyperparameters that differ for a concept of this kind, as --set takes them."""
        found = self.nudity.get("hyperparameters", {}) if kind == "nudity" else {}
        return tuple(f"{name}={value}" for name, value in found.items())


_NO_SETTINGS = ("path", "hyperparameters", "nudity", "families")

# one new method is one new file and one line here
METHODS: dict[str, Preset] = {
    "salun": Preset("relabel:Relabel", mask="saliency", target=None),
    "relabel": Preset("relabel:Relabel", target=None),
    "salun-robust": Preset(
        "robust:Robust",
        {"alpha": 5.0},
        mask="saliency",
        lr_scheduler="cosine",
        proportion_empty_prompts=0.5,
    ),
    "salun-soft": Preset("soft:Soft", target=None),
    "ga": Preset("ascent:GradientAscent", {"alpha": 0.1}, num_train_steps=1000),
    "esd-x": Preset(
        "esd:ESD",
        scope="xattn",
        learning_rate=5e-5,
        num_train_steps=200,
        batch_size=1,
        num_inference_steps=50,
    ),
    "esd-strict": Preset(
        "esd:ESD",
        scope="xattn-kv",
        learning_rate=5e-5,
        num_train_steps=200,
        batch_size=1,
        num_inference_steps=50,
    ),
    "leco": Preset(
        "esd:ESD",
        {"guidance": 1.0, "target": "paper", "follows": "edited"},
        scope="xattn",
        learning_rate=1e-4,
        num_train_steps=500,
        batch_size=1,
        rank=4,
        weight_decay=0.01,
        num_inference_steps=50,
    ),
    "esd-u": Preset(
        "esd:ESD",
        {"guidance": 1.0, "target": "paper", "follows": "edited"},
        scope="noxattn",
        num_train_steps=1000,
        batch_size=1,
        num_inference_steps=50,
    ),
    "esd-full": Preset(
        "esd:ESD",
        {"guidance": 1.0, "target": "paper", "follows": "edited"},
        num_train_steps=1000,
        batch_size=1,
        num_inference_steps=50,
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
        {"alpha": 0.0, "frozen_target": False},
        scope="xattn-kv",
        learning_rate=8e-6,
        num_train_steps=200,
        batch_size=4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        num_forget=1000,
        nudity={"scope": "attn", "learning_rate": 3.2e-5, "num_train_steps": 800, "alpha": 1.0},
    ),
    "sdd": Preset(
        "sdd:SelfDistillation",
        scope="xattn",
        num_train_steps=1500,
        batch_size=1,
        weight_decay=1e-4,
        max_grad_norm=1.0,
        num_inference_steps=50,
    ),
    "erasediff": Preset(
        "erasediff:EraseDiff",
        num_train_steps=200,
        batch_size=16,
        nudity={"scope": "noxattn", "num_train_steps": 1000, "hyperparameters": {"epochs": 5, "rounds": 2}},
    ),
    "scissorhands": Preset(
        "scissorhands:Scissorhands",
        learning_rate=2e-5,
        num_train_steps=300,
        batch_size=8,
        nudity={
            "learning_rate": 1e-5,
            "num_train_steps": 250,
            "batch_size": 16,
            "hyperparameters": {"sparsity": 0.995, "forgetting": "relabel", "guidance": 0.0, "renewal": "kaiming"},
        },
    ),
    "stereo": Preset(
        "stereo:Stereo",
        scope="noxattn",
        learning_rate=2e-5,
        num_train_steps=1000,
        batch_size=1,
        num_forget=500,
    ),
    "recare": Preset(
        "recare:ReCARE",
        scope="noxattn",
        learning_rate=2e-5,
        num_train_steps=600,
        batch_size=1,
        num_forget=500,
    ),
    "advunlearn": Preset(
        "advunlearn:AdvUnlearn",
        scope="text",
        num_train_steps=1000,
        batch_size=5,
        num_inference_steps=50,
    ),
    "hirm": Preset(
        "hirm:HiRM",
        scope="text-first",
        learning_rate=1e-4,
        num_train_steps=50,
        batch_size=1,
        weight_decay=1e-8,
    ),
    "sa": Preset("sa:SelectiveAmnesia", learning_rate=1e-4, num_train_steps=20_000, batch_size=128, max_grad_norm=1.0),
    "uce": Preset("uce:UCE", scope="xattn-kv"),
    "rece": Preset("rece:RECE", scope="xattn-kv"),
    "speed": Preset("speed:SPEED", scope="xattn-kv"),
    "oce": Preset("oce:OCE", scope="xattn-kv"),
    "dp": Preset("double:DoubleProjections", scope="xattn-kv"),
}


def _problem(cls: type) -> str | None:
    """What keeps a class from being a method; its settings too are looked at."""
    stated = getattr(cls, "settings", {})
    if not isinstance(stated, Mapping) or not isinstance(stated.get("nudity", {}), Mapping):
        return "has settings that are no mapping"
    known = [item.name for item in fields(Preset) if item.name not in _NO_SETTINGS]
    for name in [*stated, *stated.get("nudity", {})]:
        if name not in (*known, "nudity"):
            return f"has the setting {name!r}; {did_you_mean(name, known).strip() or 'choose ' + ', '.join(known)}"
    return problem(cls)


def made_registry() -> Registry[object]:
    """A registry of our methods and of those that are installed now."""
    return Registry(
        "method",
        base=object,  # a class that does not derive from the protocol is accepted if it defines the same parts
        group="erase.methods",
        own={name: f"{__package__}.{preset.path}" for name, preset in METHODS.items()},
        check=_problem,
    )


REGISTRY = made_registry()


def others() -> tuple[str, ...]:
    """Names of the methods that other installed packages register."""
    return tuple(name for name in REGISTRY.names() if name not in METHODS)


def find(name: str) -> Preset:
    """The preset of a method; that of a class of another package has the settings that the class states.

    Raises:
        EraseError: no such method.
    """
    if name in METHODS:
        return METHODS[name]
    cls = load(name)
    own = {item.name: item.default for item in fields(cls) if item.name == "alpha" and item.default is not MISSING}
    return Preset(REGISTRY.entry(name).path, own, families=cls.settings_for, **cls.settings)


def load(name: str) -> type[Any]:
    """The class of a method, a TrainedMethod or a ClosedForm.

    A class that does not derive from them comes back as a subclass of itself with the protocol's defaults.

    Raises:
        EraseError: the class cannot be imported, or does not fit `erase.methods.protocol`.
    """
    return derived(REGISTRY.load(name))


def give(method: Any) -> tuple[str, dict[str, Any]]:
    """("module:Class", hyperparameters) of a method class or of an instance, which `load` and `make` find from now on.

    Raises:
        EraseError: the class does not fit `erase.methods.protocol`.
    """
    cls = method if isinstance(method, type) else type(method)
    hyperparameters = {} if method is cls else {item.name: getattr(method, item.name) for item in fields(method)}
    return REGISTRY.give(cls), hyperparameters


def origin(name: str) -> dict[str, str | None] | None:
    """The class, distribution and version of a method that is not ours; None of our own.

    Distribution and version are None for a class of no installed package, such as one in a script.
    """
    entry = REGISTRY.entry(name)
    if entry.distribution == OWN or entry.path.startswith("erase."):
        return None
    distribution = entry.distribution or _distribution(entry.path.partition(".")[0].partition(":")[0])
    version = metadata.version(distribution) if distribution else None
    return {"class": entry.path, "distribution": distribution, "version": version}


def _distribution(package: str) -> str | None:
    return next(iter(metadata.packages_distributions().get(package, [])), None)


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
