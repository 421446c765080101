"""Comparison of methods with retraining: every method on every seed; results.json, table.md and plot.png."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from erase import files
from erase.classification import data, run
from erase.classification.at_once import processes
from erase.classification.cells import AGAIN, ANOTHER_SEED, ORIGINAL, RETRAIN, Bench, Row, cell
from erase.classification.membership import GAP_OVER
from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.classification.summary import plot, summarise, table
from erase.errors import EraseError
from erase.progress import progress

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
    jobs: int = 1,
    tell: Callable[[str], None] = lambda line: None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Run every cell that has no file yet, write results.json, table.md and plot.png, and return the results.

    A cell is one line on one seed, with its own split, original model and unlearning. Its file is in `folder`/cells.
    shadows: number of pairs of shadow models for LiRA per seed, one trained with and one without the forget set.
    jobs: number of cells that run at once, each in a process of its own (a script then needs the usual
        `if __name__ == "__main__":`). Figures are the same with any number; only the seconds are not.
    tell: called with one line of text per cell, as soon as it is finished.

    Raises:
        EraseError: the folder holds cells of other settings, or two lines have the same cell names.
    """
    folder = Path(folder)
    _require_own_names(lines)
    _require_seeds(seeds, shadows)
    for line in lines:
        run.check_method(line.settings.resolved())
    benches = [
        Bench(replace(settings, seed=seed).resolved(), folder, cache_dir, shadows, quiet=quiet) for seed in seeds
    ]
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for one in _one_by_one(lines, benches) if jobs == 1 else _at_once(lines, benches, jobs, quiet=quiet):
        found[one["seed"], one["label"]] = one
        tell(f"seed {one['seed']}: {one['label']:16} {_in_short(one)}")
    cells = [found[seed, line.label] for seed in seeds for line in lines]
    results = summarise(cells, settings, seeds)
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", table(results))
    plot(folder / "plot.png", results)
    return results


def _one_by_one(lines: Sequence[Row], benches: Sequence[Bench]) -> Iterator[dict[str, Any]]:
    for bench in benches:
        for line in lines:
            yield cell(line, bench)


def _at_once(lines: Sequence[Row], benches: Sequence[Bench], jobs: int, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """The finished cells, then the others as they are finished.

    The first line of a seed makes what all its cells share, so the others are given out when it is finished. If it
    diverges, what they share may be missing, and one process takes them one after the other.
    """
    missing: dict[int, list[Row]] = {}
    for bench in benches:
        for line in lines:
            if bench.path_of(line).is_file():
                yield cell(line, bench)
            else:
                missing.setdefault(bench.settings.seed, []).append(line)
    num, total = sum(map(len, missing.values())), len(lines) * len(benches)
    if not num:
        return
    first = benches[0].settings
    data.load(first.data, benches[0].cache_dir, size=first.size, quiet=quiet)  # into the cache, before all ask for it
    by_seed = {bench.settings.seed: replace(bench, quiet=True) for bench in benches}
    with (
        processes(min(jobs, num)) as several,
        progress(total, "compare", "cells", done=total - num, quiet=quiet) as bar,
    ):

        def give(rows: Sequence[Row], seed: int) -> None:
            if rows:
                several.give(f"{rows[0].label}, seed {seed}", _cells, list(rows), by_seed[seed])

        for seed, rows in missing.items():
            for part in [rows[:1]] if rows[0] is lines[0] else [[row] for row in rows]:
                give(part, seed)
        for cells in several.results():
            for one in cells:
                yield one
                bar.update()
            seed = cells[0]["seed"]
            if cells[0]["label"] == lines[0].label:
                rest = missing[seed][1:]
                for part in [rest] if "diverged" in cells[0] else [[row] for row in rest]:
                    give(part, seed)


def _cells(lines: Sequence[Row], bench: Bench) -> list[dict[str, Any]]:
    """The cells of some lines of a seed, in a process of `_at_once`, which keeps what the last seed's cells share."""
    bench = _kept(bench)
    found = [cell(line, bench) for line in lines]
    if not any("diverged" in one for one in found):
        bench.shadows()
    return found


@lru_cache(maxsize=1)
def _kept(bench: Bench) -> Bench:
    return bench


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
