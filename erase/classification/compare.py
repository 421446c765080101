"""Comparison of methods with retraining: every method on every seed; results.json, table.md and plot.png."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erase import files
from erase.classification import run
from erase.classification.cells import AGAIN, ANOTHER_SEED, ORIGINAL, RETRAIN, Bench, Row, cell
from erase.classification.membership import GAP_OVER
from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.classification.summary import plot, summarise, table
from erase.errors import EraseError

CONTROLS: dict[str, dict[str, str]] = {
    "random mask": {"mask": "random"},
    "inverse mask": {"mask": "inverse"},
    "no mask": {"mask": "none"},
    "score sum_abs": {"score": "sum_abs"},
    "score sum_sq": {"score": "sum_sq"},
}


def rows(
    settings: Settings, methods: Sequence[str], *, densities: Sequence[float] = (), controls: bool = False
) -> list[Row]:
    """The lines of the table, each once.

    The first three are the original model, the retrained model, and a second retraining from another seed: the gap
    between two retrainings is the scale for all other gaps.
    methods: names, or "all". densities: additional lines with SalUn at these densities. controls: additional lines with
    SalUn with other masks and scores.
    """
    names = [name for name in PRESETS if name != RETRAIN] if "all" in methods else list(methods)
    lines = [Row(label, replace(settings, method=RETRAIN)) for label in (ORIGINAL, RETRAIN, AGAIN)]
    lines += [Row(name, replace(settings, method=name)) for name in names if name != RETRAIN]
    salun = replace(settings, method="salun")
    lines += [Row(f"salun {100 * density:.10g}%", replace(salun, density=density)) for density in densities]
    if controls:
        lines += [Row(f"salun, {label}", replace(salun, **change)) for label, change in CONTROLS.items()]
    return list(dict.fromkeys(lines))


def compare(
    settings: Settings,
    lines: Sequence[Row],
    seeds: Sequence[int],
    folder: str | Path,
    cache_dir: str | Path,
    *,
    shadows: int = 0,
    tell: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run every cell that has no file yet, write results.json, table.md and plot.png, and return the results.

    A cell is one line on one seed, with its own split, original model and unlearning. Its file is in `folder`/cells.
    shadows: number of pairs of shadow models for LiRA per seed, one trained with and one without the forget set.
    tell: called with one line of text per cell.

    Raises:
        EraseError: the folder holds cells of other settings, or two lines have the same cell names.
    """
    folder = Path(folder)
    _require_own_names(lines)
    _require_seeds(seeds, shadows)
    for line in lines:
        run.check_method(line.settings.resolved())
    cells: list[dict[str, Any]] = []
    for seed in seeds:
        bench = Bench(replace(settings, seed=seed).resolved(), folder, cache_dir, shadows, quiet=quiet)
        for line in lines:
            cells.append(cell(line, bench))
            tell(f"seed {seed}: {line.label:16} {_in_short(cells[-1])}")
    results = summarise(cells, settings, seeds)
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", table(results))
    plot(folder / "plot.png", results)
    return results


def _require_own_names(lines: Sequence[Row]) -> None:
    owners: dict[str, Row] = {}
    for line in lines:
        other = owners.setdefault(line.stem, line)
        if other is not line:
            raise EraseError(
                f"the lines {other.label!r} and {line.label!r} would have cells of the same name; leave one out"
            )


def _require_seeds(seeds: Sequence[int], shadows: int) -> None:
    """Second trainings and shadow models use seeds above those of the cells, which must exist too."""
    added = 2 * ANOTHER_SEED + shadows
    if max(seeds, default=0) + added >= 2**32:
        raise EraseError(
            f"the last seed is {max(seeds)}; compare also trains with seeds up to {added} above it, "
            f"so it must be at most {2**32 - 1 - added}"
        )


def _in_short(cell: dict[str, Any]) -> str:
    if "diverged" in cell:
        return cell["diverged"]
    return ", ".join(f"{name} {100 * cell['scores'][name]['value']:.1f}" for name in GAP_OVER)
