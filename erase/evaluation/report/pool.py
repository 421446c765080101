"""Reports on disk, and several erasures under one protocol as one row."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from erase import files, statistics
from erase.errors import EraseError
from erase.evaluation import arm
from erase.evaluation.report import results as stored


def read(folder: Path, note: Callable[[str], None] = lambda text: None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and outcomes of a report's folder. note: see `results.read`."""
    for name in ("results.json", "outcomes.json"):
        if not (folder / name).is_file():
            raise EraseError(f"{folder} is no report (it has no {name}); make one with eval-concept report")
    results, outcomes = stored.read(folder / "results.json", note), files.read_json(folder / "outcomes.json")
    if results.get("outcomes_hash") != files.text_hash(outcomes):
        raise EraseError(f"{folder / 'outcomes.json'} was changed since it was written; run eval-concept report")
    return results, outcomes


def pool(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> dict[str, Any]:
    """One row of a comparison over several erasures (other training seeds) under one protocol.

    Intervals hold the variance between runs and between prompts; scores that are no outcome of single images are left
    out, and so are images that any run could not judge.

    Raises:
        EraseError: the runs were measured differently, or two of them are the same erasure.
    """
    first = runs[0][0]
    for results, _ in runs:
        different = arm.differences(_binding(first), _binding(results))
        if different:
            raise EraseError(f"runs of {name!r} were measured differently ({'; '.join(different)})")
    if len(runs) == 1:
        return {**first, "name": name}
    models = [results["arms"]["erased"]["hashes"] for results, _ in runs]
    for number, model in enumerate(models):
        if model in models[:number]:
            same = f"runs {models.index(model) + 1} and {number + 1} have the same weights"
            raise EraseError(f"{name!r} names the same erasure twice ({same}); pool erasures of different seeds")
    clusters = runs[0][1]["clusters"]
    scores = []
    for row in first["scores"]:
        columns = [outcomes["columns"].get(row["name"]) for _, outcomes in runs]
        places = judged(columns, row["base"] is not None)
        if not places:
            continue
        labels = [clusters[i] for i in places]

        def values(role: str, columns: Any = columns, places: Any = places) -> list[list[Any]]:
            return [[column[role][i] for i in places] for column in columns]

        erased, pooled = values("erased"), {**row, "comparison": None}
        direction = row["higher_is_better"]
        pooled["erased"] = statistics.to_json(
            statistics.pooled(row["name"], erased, higher_is_better=direction, clusters=labels)
        )
        if row["base"] is not None:
            pair = statistics.paired_pooled(row["name"], values("base"), erased, clusters=labels)
            pooled["comparison"] = statistics.to_json(pair)
        scores.append(pooled)
    parts = {part: None for model in models for part in model}
    differing = [part for part in parts if len({model.get(part) for model in models}) > 1]
    told = [", ".join(str(model.get(part)) for part in differing) for model in models]
    hashes = {f"run {i}": text for i, text in enumerate(told, 1)}
    arms = {**first["arms"], "erased": {"name": name, "hashes": hashes}}
    return {**first, "name": name, "arms": arms, "scores": scores, "groups": [], "sheet": [], "verdict": None}


def judged(columns: Sequence[Any], has_base: bool) -> list[int]:
    """The places of images that have an outcome in every run and arm; none if a run lacks the column.

    columns: of one score in each run's outcomes, {"erased": values, "base": values}; None where there is none.
    """
    if None in columns:
        return []
    sides = [column[role] for column in columns for role in (("erased", "base") if has_base else ("erased",))]
    return [i for i, values in enumerate(zip(*sides, strict=True)) if None not in values]


def _binding(results: dict[str, Any]) -> dict[str, Any]:
    """The part of the protocol that must be equal."""
    return {key: value for key, value in results["protocol"].items() if not stored.is_of_machine(key)}
