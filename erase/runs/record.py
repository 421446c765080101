"""The content of run.json as dataclasses, with its one reader and its one writer."""
# pyright: strict

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from erase import files
from erase.concepts import Concept
from erase.errors import EraseError
from erase.options.declare import MIXED_PRECISION
from erase.runs.identity import deciding, prompts_hash

FORMAT = 2  # 1, which had no number, is what version 0.1.0 wrote
DELTA = "delta.safetensors"  # every run writes it


@dataclass(frozen=True)
class Models:
    """The models before and after the run.

    name: the model that the run was given. base_hash, result_hash: content hashes of its network before and after.
    origin, origin_hash: the first model of a chain of runs, each of which continued from the previous one (--base).
    base_dtype: dtype of the stored base weights; None if they were not read from a folder.
    part: the component that was trained; None in older records, whose runs trained the family's own.
    """

    name: str
    base_hash: str
    result_hash: str
    origin: str
    origin_hash: str
    base_dtype: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class MaskSize:
    """Number of weights that the mask covers, and of those that may change."""

    weights: int
    ones: int


@dataclass(frozen=True)
class Changes:
    """Number of weights of the network, and of those that the run changed."""

    total: int
    changed: int


@dataclass(frozen=True)
class Started:
    """A run that is not finished. outputs: names of the files that it will write."""

    identity: Mapping[str, Any]
    outputs: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The record as run.json stores it."""
        return {"status": "running", "format": FORMAT, "identity": dict(self.identity), "outputs": sorted(self.outputs)}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run.

    identity: what decides the weights; two runs of the same identity have the same weights.
    concept: what was trained. concepts: its parts, the newest first, then those of the runs that this one continued.
    base: the run that this one continued: its folder, model, concepts and hash.
    settings: every option. compute: device and precision. data: number, seeds and fingerprint of the training images.
    method: its name, hyperparameters and notes. losses: loss terms of each logged step.
    seconds: duration of each phase. peak_memory_bytes: by "process" and "gpu".
    versions: of Python and the libraries. plugin: distribution and version of a method of another package.
    files: SHA-256 of each file that the run wrote, by its path in the folder.
    finished: time, ISO 8601 in UTC; None in records of version 0.1.0.
    """

    identity: Mapping[str, Any]
    concept: Concept
    concepts: tuple[Concept, ...]
    settings: Mapping[str, Any]
    model: Models
    weights: Changes
    mask: MaskSize | None
    base: Mapping[str, Any] | None = None
    compute: Mapping[str, str] = field(default_factory=dict[str, str])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    method: Mapping[str, Any] = field(default_factory=dict[str, Any])
    losses: Sequence[Mapping[str, float]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    versions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    plugin: Mapping[str, Any] | None = None
    command: Sequence[str] = ()
    finished: str | None = None
    files: Mapping[str, str] = field(default_factory=dict[str, str])

    def as_json(self) -> dict[str, Any]:
        """The record as run.json stores it."""
        stored = {name: plain(value) for name, value in asdict(self).items()}
        for name in ("plugin", "finished"):
            if stored[name] is None:
                del stored[name]
        return {"status": "done", "format": FORMAT, "identity_hash": files.text_hash(self.identity), **stored}


def plain(value: Any) -> Any:
    """A value as JSON gives it back: lists for tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in cast(Mapping[str, Any], value).items()}
    return [plain(item) for item in cast(Sequence[Any], value)] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> Started | RunRecord:
    """The record in a file, of any format.

    Raises:
        EraseError: it cannot be read, is no run's, or is of a later version.
    """
    stored = files.read_json(path)
    if stored.get("status") not in ("running", "done") or not isinstance(stored.get("identity"), dict):
        raise EraseError(f"{path} is not the record of an erasure; choose another folder")
    found = stored.get("format", stored["identity"].get("format", 1))
    if type(found) is not int or found > FORMAT:
        raise EraseError(f"{path} has format {found}, which a later version wrote; this one reads up to {FORMAT}")
    try:
        identity = _identity_of_format_1(stored) if found == 1 else stored["identity"]
        _require(identity["settings"], dict)
        _require(identity["base_hash"], str)
        return _finished(stored, identity) if stored["status"] == "done" else _started(stored, identity)
    except (KeyError, TypeError, ValueError, AttributeError, EraseError) as error:
        told = str(error) if isinstance(error, EraseError) else repr(error)
        raise EraseError(f"{path} is damaged: {told}; delete {path.parent} or choose another --output") from error


def write(path: Path, record: Started | RunRecord) -> None:
    """Write the record, atomically."""
    files.write_json(path, record.as_json())


def _started(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> Started:
    return Started(identity, tuple(_require(name, str) for name in stored.get("outputs", ())))


def _finished(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> RunRecord:
    known: dict[str, Any] = {one.name: stored[one.name] for one in fields(RunRecord) if one.name in stored}
    for name in ("files", "settings", "model", "weights", "seconds"):
        _require(stored[name], dict)
    for digest in stored["files"].values():
        _require(digest, str)
    _require(stored["files"][DELTA], str)
    if "finished" in stored:
        datetime.fromisoformat(stored["finished"])
    try:
        concept = Concept(**stored["concept"])
        concepts = tuple(Concept(**part) for part in stored.get("concepts", [stored["concept"]]))
    except (KeyError, TypeError, EraseError) as error:
        raise EraseError(f"its concepts cannot be read: {error}") from error
    model, weights, mask = stored["model"], stored["weights"], stored["mask"]
    known |= {
        "identity": identity,
        "concept": concept,
        "concepts": concepts,
        "model": Models(
            name=_require(model["name"], str),
            base_hash=_require(model["base_hash"], str),
            result_hash=_require(model["result_hash"], str),
            origin=_require(model.get("origin", model["name"]), str),
            origin_hash=_require(model.get("origin_hash", model["base_hash"]), str),
            base_dtype=model.get("base_dtype"),
            part=model.get("part"),
        ),
        "weights": Changes(_require(weights["total"], int), _require(weights["changed"], int)),
        "mask": mask and MaskSize(_require(mask["weights"], int), _require(mask["ones"], int)),
    }
    return RunRecord(**known)


def _require(value: Any, kind: type) -> Any:
    """The value, if it has this type; else a TypeError."""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")
    return value


def _identity_of_format_1(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run of version 0.1.0; an unfinished one does not say what its concept is."""
    old = stored["identity"]
    settings = {name: value for name, value in old["settings"].items() if name != "mixed_precision"}
    settings["precision"] = MIXED_PRECISION[old["settings"].get("mixed_precision", "no")]
    concepts = [stored["concept"], *stored["concepts"]] if "concept" in stored else None
    return {**old, "concept": concepts and prompts_hash(concepts), "settings": deciding(settings, old["mask"])}
