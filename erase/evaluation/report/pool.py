"""Reports on disk, and several erasures under one protocol as one row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase import files, statistics
from erase.errors import EraseError
from erase.evaluation import arm
from erase.evaluation.report import results as stored


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and outcomes of a report's folder."""
    for name in ("results.json", "outcomes.json"):
        if not (folder / name).is_file():
            raise EraseError(f"{folder} is no report (it has no {name}); make one with eval-concept report")
    results, outcomes = stored.read(folder / "results.json"), files.read_json(folder / "outcomes.json")
    if results.get("outcomes_hash") != files.text_hash(outcomes):
        raise EraseError(f"{folder / 'outcomes.json'} was changed since it was written; run eval-concept report")
    return results, outcomes


def pool(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> dict[str, Any]:
    """One row of a comparison over several erasures (other training seeds) under one protocol.

    Intervals resample runs and prompts; scores that are no outcome of single images are left out.

    Raises:
        EraseError: the runs were measured differently.
    """
    first = runs[0][0]
    for results, _ in runs:
        different = arm.differences(first["protocol"], results["protocol"])
        if different:
            raise EraseError(f"runs of {name!r} were measured differently ({'; '.join(different)})")
    if len(runs) == 1:
        return {**first, "name": name}
    scores = []
    for row in first["scores"]:
        columns = [outcomes["columns"].get(row["name"]) for _, outcomes in runs]
        if None in columns:
            continue
        places = [i for i, value in enumerate(columns[0]["erased"]) if value is not None]
        clusters = [[runs[0][1]["clusters"][i] for i in places]] * len(runs)

        def figure(values: list[list[float]], row: Any = row, clusters: Any = clusters) -> statistics.Score:
            return statistics.hierarchical(
                row["name"], values, higher_is_better=row["higher_is_better"], clusters=clusters
            )

        erased = [[float(column["erased"][i]) for i in places] for column in columns]
        pooled = {**row, "erased": statistics.to_json(figure(erased)), "comparison": None}
        if row["base"] is not None:
            base = [[float(column["base"][i]) for i in places] for column in columns]
            pairs = [(a, b) for one, other in zip(base, erased, strict=True) for a, b in zip(one, other, strict=True)]
            change = figure([[b - a for a, b in zip(*both, strict=True)] for both in zip(base, erased, strict=True)])
            is_rate = row["erased"]["k"] is not None
            comparison = statistics.Comparison(
                row["name"],
                base=row["base"]["value"],
                erased=pooled["erased"]["value"],
                difference=change.value,
                low=change.low,
                high=change.high,
                n=change.n,
                p=None,
                only_base=sum(a > b for a, b in pairs) if is_rate else None,
                only_erased=sum(b > a for a, b in pairs) if is_rate else None,
                clusters=change.clusters,
                interval=change.interval,
                test="none",
            )
            pooled["comparison"] = statistics.to_json(comparison)
        scores.append(pooled)
    hashes = {f"run {i}": results["arms"]["erased"]["hashes"]["unet"] for i, (results, _) in enumerate(runs, 1)}
    arms = {**first["arms"], "erased": {"name": name, "hashes": hashes}}
    return {**first, "name": name, "arms": arms, "scores": scores, "groups": [], "sheet": [], "verdict": None}
