"""Methods of unlearning side by side: every method on every seed once, against retraining; table, figures and plot."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from erase import __version__, files
from erase.classification import membership, networks, run, split
from erase.classification.data import Dataset
from erase.classification.descent import Diverged
from erase.classification.membership import GAP_OVER
from erase.classification.networks import Classifier, Shape
from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.classification.split import Split
from erase.errors import EraseError
from erase.statistics import CONFIDENCE, Score

RETRAIN, AGAIN, ORIGINAL = "retrain", "retrain again", "original"
ANOTHER_SEED = 500_000  # added to a seed for a second training on the same split
CONTROLS: dict[str, dict[str, str]] = {
    "random mask": {"mask": "random"},
    "inverse mask": {"mask": "inverse"},
    "no mask": {"mask": "none"},
    "score sum_abs": {"score": "sum_abs"},
    "score sum_sq": {"score": "sum_sq"},
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a label and its settings but for the seed."""

    label: str
    settings: Settings


def rows(
    settings: Settings, methods: Sequence[str], *, densities: Sequence[float] = (), controls: bool = False
) -> list[Row]:
    """What the table compares. First come the original, the retrained model, and the retrained model once more: how
    far apart two trainings are says what a gap is worth.

    methods: names, or "all". densities, controls: more lines for SalUn, at other densities and with other masks.
    A line that is asked for twice is there once.

    Raises:
        EraseError: unknown method.
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
    """Run every cell that is not there yet, and write results.json, table.md and plot.png.

    A cell is one line on one seed: its own split, original model and unlearning. It is a file in `folder`/cells, and
    never run again.
    shadows: models trained with and as many without the forgotten pictures for LiRA, per seed; 0 for none.

    Raises:
        EraseError: the folder holds cells of other settings, or two lines have cells of one name.
    """
    folder = Path(folder)
    _require_own_names(lines)
    _require_seeds(seeds, shadows)
    for line in lines:
        run.check_method(line.settings.resolved())
    cells: list[dict[str, Any]] = []
    for seed in seeds:
        bench = _Bench(replace(settings, seed=seed), folder, cache_dir, shadows, quiet)
        for line in lines:
            cell = _cell(line, bench)
            tell(f"seed {seed}: {line.label:16} {_in_short(cell)}")
            cells.append(cell)
    results = summarise(cells, settings, seeds)
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", table(results))
    plot(folder / "plot.png", results)
    return results


def _stem(label: str) -> str:
    """What the files of a line's cells are called, before the seed."""
    return re.sub("[^a-z0-9.]+", "-", label)


def _require_own_names(lines: Sequence[Row]) -> None:
    owners: dict[str, Row] = {}
    for line in lines:
        other = owners.setdefault(_stem(line.label), line)
        if other is not line:
            raise EraseError(
                f"the lines {other.label!r} and {line.label!r} would have cells of the same name; leave one out"
            )


def _require_seeds(seeds: Sequence[int], shadows: int) -> None:
    """Second trainings and shadow models have seeds of their own, above those of the cells."""
    added = 2 * ANOTHER_SEED + shadows
    if max(seeds, default=0) + added >= 2**32:
        raise EraseError(
            f"the last seed is {max(seeds)}; compare also trains with seeds up to {added} above it, "
            f"so it must be at most {2**32 - 1 - added}"
        )


class _Bench:
    """What all cells of a seed share; made when the first of them needs it."""

    def __init__(self, settings: Settings, folder: Path, cache_dir: str | Path, shadows: int, quiet: bool):
        self.quiet = quiet
        self.settings, self.folder, self._cache_dir, self.num_shadows = settings.resolved(), folder, cache_dir, shadows
        self._prepared: tuple[Dataset, Split] | None = None
        self._original: tuple[Classifier, Shape] | None = None

    def prepared(self) -> tuple[Dataset, Split]:
        if self._prepared is None:
            self._prepared = run.prepare(self.settings, self._cache_dir)
        return self._prepared

    def original(self) -> tuple[Classifier, Shape]:
        path = self.folder / "originals" / f"seed-{self.settings.seed}.safetensors"
        if self._original is None and path.is_file():
            model, shape, _ = networks.load(path)
            self._original = model.to(run.device_of(self.settings)), shape
        elif self._original is None:
            dataset, chosen = self.prepared()
            images = run.training_images(dataset, chosen, False)
            self._original = run.trained(self.settings, dataset, images, quiet=self.quiet)
            networks.save(path, *self._original, {"split": chosen.digest})
        return self._original

    def shadows(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`membership.lira`'s seen and unseen."""
        if not self.num_shadows:
            return None
        path = self.folder / "shadows" / f"seed-{self.settings.seed}.json"
        if not path.is_file():
            dataset, chosen = self.prepared()
            kinds: dict[str, list[list[float]]] = {"seen": [], "unseen": []}
            for i in range(self.num_shadows):
                other = replace(self.settings, seed=self.settings.seed + 2 * ANOTHER_SEED + i)
                for kind, without in (("seen", False), ("unseen", True)):
                    images = run.training_images(dataset, chosen, without)
                    model, _ = run.trained(other, dataset, images, quiet=self.quiet)
                    out = membership.outputs(model, split.parts(dataset, chosen)[0])
                    kinds[kind].append(membership.logit_confidence(out).tolist())
            files.write_json(path, {"num": self.num_shadows, **kinds})
        stored = files.read_json(path)
        try:
            seen, unseen = (np.array(stored[kind], dtype=float) for kind in ("seen", "unseen"))
        except (KeyError, TypeError, ValueError) as error:
            raise EraseError(f"{path} is damaged: it holds no confidences of shadow models; delete it") from error
        if seen.ndim != 2 or seen.shape != unseen.shape or not np.isfinite([seen, unseen]).all():
            raise EraseError(f"{path} is damaged: it holds no confidences of shadow models; delete it")
        return seen, unseen


def _cell(line: Row, bench: _Bench) -> dict[str, Any]:
    seed = bench.settings.seed
    settings = replace(line.settings, seed=seed).resolved()
    identity = run.identity(settings) | {"shadows": bench.num_shadows}
    path = bench.folder / "cells" / f"{_stem(line.label)}-{seed}.json"
    if path.is_file():
        cell = _read_cell(path)
        there = run.recorded(cell["settings"])
        if there != identity:
            changed = next((key for key in identity if there.get(key) != identity[key]), "version of this program")
            raise EraseError(f"{path} was made with another {changed}; choose another --output")
        return cell
    dataset, chosen = bench.prepared()
    cell = {"label": line.label, "seed": seed, "settings": identity, "split": chosen.digest}
    try:
        model, seconds = _model(line.label, settings, bench)
    except Diverged as error:
        cell["diverged"] = str(error)
    else:
        parts = split.parts(dataset, chosen)
        scores = membership.measure(model, *parts, seed=seed, shadows=bench.shadows())
        cell |= {"scores": {name: asdict(score) for name, score in scores.items()}, "seconds": seconds}
    files.write_json(path, cell)
    return cell


def _read_cell(path: Path) -> dict[str, Any]:
    """Raises EraseError: the file holds no cell."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)

    cell = files.read_json(path)
    scores = cell.get("scores")
    has_scores = (
        isinstance(scores, dict)
        and set(GAP_OVER) <= scores.keys()
        and all(isinstance(score, dict) and is_number(score.get("value")) for score in scores.values())
        and is_number(cell.get("seconds"))
    )
    is_known = isinstance(cell.get("label"), str) and isinstance(cell.get("settings"), dict)
    if not is_known or not (has_scores or isinstance(cell.get("diverged"), str)):
        raise EraseError(f"{path} is damaged: it holds no scores of a method on a seed; delete it, to run that again")
    return cell


def _model(label: str, settings: Settings, bench: _Bench) -> tuple[Classifier, float]:
    """The model of a cell, and the seconds that it took; the original's are not counted."""
    dataset, chosen = bench.prepared()
    original, shape = bench.original()
    if label == ORIGINAL:
        return original, 0.0
    if label == AGAIN:
        settings = replace(settings, seed=settings.seed + ANOTHER_SEED)
    done = run.unlearned(settings, dataset, chosen, original, shape, quiet=bench.quiet)
    return done.model, sum(done.seconds.values())


def summarise(cells: Sequence[dict[str, Any]], settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Means and intervals over seeds, for each line in the order of its first cell; plain JSON values.

    A line that diverged on some seed has no figures, only the number of those seeds: the others are a selection.

    gap: mean over seeds of the average gap to the retrained model of the same seed.
    gap_of_means: the same between the means, as papers compute it; noise of a single training hardly counts there.
    """
    labels = list(dict.fromkeys(cell["label"] for cell in cells))
    table: dict[str, dict[str, Any]] = {label: {} for label in labels}
    of_line = {label: [cell for cell in cells if cell["label"] == label] for label in labels}
    diverged = {label: sum("diverged" in cell for cell in of) for label, of in of_line.items()}
    values = {label: [_values(cell) for cell in of] for label, of in of_line.items() if not diverged[label]}
    if RETRAIN not in values:
        raise EraseError("retraining diverged, so there is nothing to compare with; lower --train-learning-rate")
    centre = _means(values[RETRAIN])
    for label in labels:
        if diverged[label]:
            table[label] = {"diverged": diverged[label]}
            continue
        of_seeds = values[label]
        figures = {name: over_seeds(name, [one[name] for one in of_seeds]) for name in of_seeds[0]}
        gaps = [membership.average_gap(*pair) for pair in zip(of_seeds, values[RETRAIN], strict=True)]
        figures["gap"] = over_seeds("gap", gaps, higher_is_better=False)
        table[label] = {name: asdict(score) for name, score in figures.items()}
        table[label]["gap_of_means"] = membership.average_gap(_means(of_seeds), centre)
    described = {name: value for name, value in asdict(settings.resolved()).items() if name not in ("method", "output")}
    described = {name: value for name, value in described.items() if name not in _NOT_SHARED}
    return {"settings": described, "seeds": list(seeds), "version": __version__, "rows": table}


_NOT_SHARED = {"seed", "device", "mask", "set", "allow_pickle"}


def over_seeds(name: str, values: Sequence[float], *, higher_is_better: bool = True) -> Score:
    """Mean and Student's interval over seeds; n is their number, and with one seed nothing is known of others."""
    from scipy.stats import t

    n, value = len(values), float(np.mean(values))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0
    kind = "t over seeds" if n > 1 else "none, one seed"
    return Score(name, value, n, value - reach, value + reach, higher_is_better, interval=kind)


def table(results: dict[str, Any]) -> str:
    """Markdown: per cent, mean and half the 95 % interval over seeds; seconds of the unlearning alone."""
    lines = results["rows"]
    optional = ["LiRA"] if "LiRA" in lines[RETRAIN] else []
    names = [*GAP_OVER, *optional, "gap"]
    head = ["", *names, "gap of means", "seconds"]
    text = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for label, line in lines.items():
        if "diverged" in line:
            text.append(
                f"| {label} | diverged on {line['diverged']} of {len(results['seeds'])} |" + " |" * (len(head) - 2)
            )
            continue
        figures = [_shown(line[name]) for name in names]
        gap = f"{100 * line['gap_of_means']:.1f}"
        text.append("| " + " | ".join([label, *figures, gap, f"{line['seconds']['value']:.2g}"]) + " |")
    what = results["settings"]
    seeds = f"{len(results['seeds'])} seeds" if len(results["seeds"]) > 1 else "one seed"
    return f"{what['network']} on {what['data']}, forget {what['forget']}, {seeds}\n\n" + "\n".join(text) + "\n"


def plot(path: str | Path, results: dict[str, Any]) -> None:
    """A PNG: the average gap of each line with its interval, the smallest on top."""
    from matplotlib.figure import Figure

    lines = {label: line["gap"] for label, line in results["rows"].items() if label != RETRAIN and "gap" in line}
    order = sorted(lines, key=lambda label: -lines[label]["value"])
    figure = Figure(figsize=(6, 0.9 + 0.28 * len(order)), layout="constrained")
    ax = figure.subplots()
    centre = [100 * lines[label]["value"] for label in order]
    reach = [100 * (lines[label]["high"] - lines[label]["value"]) for label in order]
    ax.errorbar(centre, order, xerr=reach, fmt="o", color="black", markersize=4, linewidth=1, capsize=2)
    ax.set_xlim(left=0)
    ax.grid(axis="x", linewidth=0.4)
    ax.set_xlabel("average gap to retraining, points; mean and 95 % interval over seeds")
    ax.set_title(f"{results['settings']['data']}, forget {results['settings']['forget']}", fontsize=10)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _values(cell: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in cell["scores"].items()} | {"seconds": cell["seconds"]}


def _means(of_seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in of_seeds])) for name in of_seeds[0]}


def _shown(score: dict[str, Any]) -> str:
    return f"{100 * score['value']:.1f}" + (f" ±{100 * (score['high'] - score['value']):.1f}" if score["n"] > 1 else "")


def _in_short(cell: dict[str, Any]) -> str:
    if "diverged" in cell:
        return cell["diverged"]
    return ", ".join(f"{name} {100 * cell['scores'][name]['value']:.1f}" for name in GAP_OVER)
