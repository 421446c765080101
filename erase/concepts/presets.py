"""Concepts from presets and .toml files."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from erase import files
from erase.concepts import refusal
from erase.concepts.concept import Concept, FreeKind, override, type_name
from erase.concepts.describe import describe
from erase.errors import EraseError
from erase.words import closest, did_you_mean, listed

FAMILIES = ("mini",)  # model families for which a TOML may hold a table of its own


def names() -> list[str]:
    """The presets that `load` knows, sorted."""
    return sorted(path.stem for path in _presets_dir().glob("*.toml"))


def load(name: str, *, model_family: str | None = None) -> Concept:
    """A preset by its name ("french horn", "french_horn" and "French Horn" are one), or the concept in a .toml file.

    model_family: "mini" for the embedded model. A table of that name in the TOML replaces the keys that it holds, so
        that one preset serves models which know different words; any other family takes the file as it is.

    Raises:
        EraseError: no such preset or file, a file that is not valid, or a target that this tool refuses.
    """
    if name.lower().endswith(".toml"):
        return _read(Path(name).expanduser(), model_family)
    if (key := preset_key(name)) in names():
        return _read(_presets_dir() / f"{key}.toml", model_family)
    refusal.refuse([name], "name", target=True)
    guesses = [known for known in names() if key in known.split("_")] or closest(key, names(), num=3)
    hint = f"did you mean {listed(guesses, 'or')}?" if guesses else f"the presets are {listed(names(), 'and')};"
    raise EraseError(
        f"unknown concept {name!r}; {hint} or describe your own with --kind {listed(get_args(FreeKind), 'or')}"
    )


def preset_key(name: str) -> str:
    """The file name that a preset of this name has, without its ending."""
    return "_".join(re.split(r"[\s_-]+", name.strip().lower()))


def find(
    name: str,
    kind: FreeKind | None = None,
    *,
    forget: Sequence[str] = (),
    anchor: Sequence[str] = (),
    retain: Sequence[str] = (),
    model_family: str | None = None,
) -> Concept:
    """The concept that a user names: `load` or, with a kind, `describe`; prompts that are given replace its own.

    A preset of the embedded model's world ("circle") is free text for any other model.
    """
    if kind and name.lower().endswith(".toml"):
        raise EraseError(f"--kind is for free text, but {name!r} is a file, which has its own kind")
    if kind and (key := preset_key(name)) in names():
        preset = _read(_presets_dir() / f"{key}.toml", model_family)
        if model_family == "mini" or preset.judge.get("type") != "mini":
            raise EraseError(
                f"{name!r} is a preset of kind {preset.kind}; leave out --kind, or describe your own under another name"
            )
    concept = describe(name, kind) if kind else load(name, model_family=model_family)
    return override(concept, forget=forget or None, anchor=anchor or None, retain=retain or None)


def write(concept: Concept, path: str | Path) -> None:
    """Write the concept as a .toml that `load` reads; it has no tables of model families."""
    content = asdict(concept)
    judge = content.pop("judge")
    lines = [f"{key} = {_toml(value)}" for key, value in content.items()]
    if judge:
        lines += ["", "[judge]", *(f"{_toml(key)} = {_toml(value)}" for key, value in judge.items())]
    files.write_text(path, "\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    """A string, number or list. JSON writes them as TOML does, but for the character that deletes."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _presets_dir() -> Path:
    """In a wheel the presets lie inside the package; in a working copy they lie beside it."""
    package_dir = Path(__file__).resolve().parents[1]
    installed = package_dir / "_prompts"
    return installed if installed.is_dir() else package_dir.parent / "prompts"


def _read(path: Path, model_family: str | None) -> Concept:
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # Windows' editors write a byte order mark
    except FileNotFoundError as error:
        raise EraseError(f"{path}: no such file; the presets are {listed(names(), 'and')}") from error
    except OSError as error:
        raise EraseError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EraseError(f"{path} is not valid TOML: {error}") from error
    try:
        return _parse(content, path.stem.replace("_", " "), model_family)
    except EraseError as error:
        raise EraseError(f"{path}: {error}") from error


def _parse(content: dict[str, Any], default_name: str, model_family: str | None) -> Concept:
    """The concept that a TOML holds. Family tables are checked even when they are not asked for."""
    allowed = [f.name for f in fields(Concept)]
    _refuse_unknown_keys(content, [*allowed, *FAMILIES])
    general = {key: value for key, value in content.items() if key not in FAMILIES}
    concepts: dict[str | None, Concept] = {None: _from_table({"name": default_name, **general})}
    for family in FAMILIES:
        own = content.get(family, {})
        if not isinstance(own, dict):
            raise EraseError(f"'{family}' must be a table, not {type_name(own)}")
        _refuse_unknown_keys(own, [key for key in allowed if key not in {"name", "kind"}], inside=family)
        concepts[family] = _from_table({"name": default_name, **general, **own}) if own else concepts[None]
    return concepts.get(model_family, concepts[None])


def _from_table(table: dict[str, Any]) -> Concept:
    missing = [key for key in ("kind", "forget", "anchor") if key not in table]
    if missing:
        raise EraseError(f"'{missing[0]}' is missing")
    return Concept(**table)


def _refuse_unknown_keys(table: Mapping[str, Any], allowed: Sequence[str], inside: str = "") -> None:
    for key in table:
        if key not in allowed:
            where = f" in [{inside}]" if inside else ""
            raise EraseError(f"unknown key '{key}'{where}; {did_you_mean(key, allowed)}({', '.join(allowed)})")
