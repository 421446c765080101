"""results.json: its shape, its one reader and its one writer."""

import typing
from collections import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from erase.errors import EraseError
from erase.evaluation import shapes
from erase.evaluation.report import earlier
from erase.files import read_json, text_hash, write_json
from erase.statistics import Comparison, Score

ROLES = {
    "forget": "Forget prompts",
    "synonym": "Forget prompts, synonyms",
    "retain": "Retain prompts",
    "": "Other",
    "still": "Failures: still shows the concept, or is invalid",
    "lost": "Failures: right with the base, wrong with the erased model",
}
FORMAT = 2  # raise it with every change that an earlier version cannot read, and keep a reader of the earlier one
MACHINE = ("generation.device", "generation.batch_size", "generation.libraries.")  # begin fields of a protocol
Role = Literal["forget", "synonym", "retain", "", "still", "lost"]


@dataclass(frozen=True)
class Arm:
    """A model: what it is called, and the hashes of all that decides its images."""

    name: str
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Invalid:
    """Images that are black, flat or unreadable, of all."""

    k: int
    n: int


@dataclass(frozen=True)
class Verdict:
    """Whether the concept is erased and the rest kept, and the same as a sentence.

    outcome: None in results of 0.1.0, which had two outcomes for each and ignored n.
    """

    success: bool
    text: str
    outcome: Literal["erased and kept", "erased but damaged", "not erased", "cannot tell"] | None = None


@dataclass(frozen=True)
class ScoreRow:
    """One score of both models and their difference.

    about: one sentence. copy_of: name of the score that this one repeats or inverts; they are one test in a table.
    target: hash of the images that a distance is to; figures of different ones cannot be compared.
    gold: of the model that was trained without the concept, if there is one.
    """

    name: str
    title: str
    about: str
    higher_is_better: bool
    base: Score | None
    erased: Score
    comparison: Comparison | None
    copy_of: str | None = None
    target: str | None = None
    gold: Score | None = None


@dataclass(frozen=True)
class GroupRow:
    """A score once more, on the samples of one label."""

    label: str
    role: Role
    base: Score | None
    erased: Score
    comparison: Comparison | None
    gold: Score | None = None


@dataclass(frozen=True)
class Group:
    """A score by label; with an axis, a curve, whose labels are numbers on it."""

    name: str
    title: str
    rows: Sequence[GroupRow]
    axis: str | None = None


@dataclass(frozen=True)
class Pair:
    """Images of both models on the same seed; paths start from the images folder. flagged: to be blurred."""

    prompt: str
    role: Role
    flagged: bool
    base: str | None
    erased: str | None


@dataclass(frozen=True)
class TaskIdentity:
    """Which samples were generated."""

    id: str
    version: int
    options: Mapping[str, Any]
    num_samples: int
    prompts_hash: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """What results.json holds: everything that a report is made of, beside the images.

    name: what was evaluated, such as "circle by salun".
    protocol: all that must be equal for two results to be comparable, judge and settings; and the machine's part,
        which may differ (see `is_of_machine`).
    protocol_hash: of the part that must be equal.
    arms, invalid: of "erased", and of "base" and "gold" (trained without the concept) if there are such models.
    primary: name of the score that the verdict is about.
    retention: name of the score that tells what was kept: second axis of the Pareto plot.
    limits: what was not tested.
    unjudged: names of scores that no image could be judged for, such as a mean over valid images where all are black.
    outcomes_hash: of outcomes.json.
    """

    name: str
    task: TaskIdentity
    protocol: Mapping[str, Any]
    protocol_hash: str
    arms: Mapping[str, Arm]
    primary: str
    retention: str | None = None
    verdict: Verdict | None = None
    scores: Sequence[ScoreRow]
    groups: Sequence[Group]
    invalid: Mapping[str, Invalid]
    sheet: Sequence[Pair]
    command: str
    versions: Mapping[str, str]
    limits: Sequence[str]
    outcomes_hash: str | None = None
    unjudged: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, in the order of the file."""
        found = {"format": FORMAT} | _plain(self)
        absent = [name for name in ("outcomes_hash", "unjudged") if not found[name]]
        return {name: value for name, value in found.items() if name not in absent}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], place: str = "results") -> "Results":
        """The results that a JSON value holds.

        place: what the value is called in an error.

        Raises:
            EraseError: see `check`.
        """
        check(value, place)
        return _built(cls, {key: part for key, part in value.items() if key not in {"format", "hash"}})


def is_of_machine(field: str) -> bool:
    """Whether a field of a protocol names device, batch size or versions, which change the last bits of an image."""
    return field.startswith(MACHINE)


def machine_differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What the machines of two protocols disagree about, where both state it."""
    return [
        f"{key} is {first[key]} or {other[key]}"
        for key in first
        if is_of_machine(key) and key in other and first[key] != other[key]
    ]


def _plain(part: Any) -> Any:
    if is_dataclass(part):
        return {item.name: _plain(getattr(part, item.name)) for item in fields(part)}
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items()}
    return [_plain(one) for one in part] if isinstance(part, (list, tuple)) else part


def _built(kind: Any, value: Any) -> Any:
    """An object of this type from its JSON value, which has its shape."""
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        return None if value is None else _built(arguments[0], value)
    if is_dataclass(kind):
        hints: Any = typing.get_type_hints(kind)
        made: Any = kind
        return made(**{key: _built(hints[key], part) for key, part in value.items()})
    if typing.get_origin(kind) is abc.Mapping:
        return {key: _built(arguments[1], part) for key, part in value.items()}
    return [_built(arguments[0], part) for part in value] if typing.get_origin(kind) is abc.Sequence else value


def _shape(kind: Any) -> Any:
    """The shape of a type's JSON values, as `shapes` writes it; a field with a default may be missing."""
    arguments, origin = typing.get_args(kind), typing.get_origin(kind)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if kind in (Score, Comparison):
            return hints
        return {f"{i.name}{'' if i.default is MISSING else '?'}": _shape(hints[i.name]) for i in fields(kind)}
    if type(None) in arguments:
        return (_shape(arguments[0]), None)
    if origin is Literal:
        return set(arguments)
    if origin is abc.Mapping:
        models = {role: _shape(arguments[1]) for role in ("base?", "erased", "gold?")}
        return models if arguments[1] in (Arm, Invalid) else {"*": arguments[1]}
    return [_shape(arguments[0])] if origin is abc.Sequence else kind


# hash: of all else, so that an edited file is noticed
SCHEMA = {"format": {FORMAT}, **_shape(Results), "hash?": str}


def check(results: Mapping[str, Any], place: str = "results") -> None:
    """Refuse results that a report cannot be made of.

    Raises:
        EraseError: a key is missing or unknown, a value has another type, or is NaN or infinite; with the place.
    """
    shapes.check(results, SCHEMA, place)
    names = [score["name"] for score in results["scores"]]
    for key in ("primary", "retention"):
        if results.get(key) is not None and results[key] not in names:
            raise EraseError(f"{place}.{key} is '{results[key]}', which is no score ({', '.join(names)})")
    if twice := {name for name in names if names.count(name) > 1}:
        raise EraseError(f"{place}.scores holds '{min(twice)}' twice; give each score its own name")


def read(path: Path, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The results in a file that `write` wrote, or that version 0.1.0 wrote.

    note: called with a line if the file is of an earlier version.

    Raises:
        EraseError: they are of another shape, or were changed since.
    """
    stored = read_json(path)
    results = earlier.upgraded(stored)
    check(results, f"{path}: results")
    is_earlier = results is not stored
    if "hash" not in results and not is_earlier:
        raise EraseError(f"{path} has no hash, so it cannot be checked; run eval-concept report again")
    if "hash" in stored and stored["hash"] != _seal(stored):
        raise EraseError(f"{path} was changed since it was written; run eval-concept report again")
    if is_earlier:
        unchecked = "" if "hash" in stored else "has no hash, so it cannot be checked, and "
        note(f"{path} {unchecked}{earlier.NOTE}")
    return {key: value for key, value in results.items() if key != "hash"}


def write(results: Mapping[str, Any], path: Path) -> None:
    """Write checked results with their hash."""
    write_json(path, {**results, "hash": _seal(results)})


def _seal(results: Mapping[str, Any]) -> str:
    return text_hash({key: value for key, value in results.items() if key != "hash"})
