"""The result of a comparison: means and intervals over seeds, as JSON, as a Markdown table and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from erase import files
from erase.classification import membership
from erase.classification.cells import RETRAIN
from erase.classification.membership import GAP_OVER
from erase.classification.settings import Settings
from erase.errors import EraseError
from erase.statistics.figures import CONFIDENCE, Score, values_of
from erase.statistics.intervals import quantile
from erase.statistics.means import CANNOT_TELL
from erase.version import __version__

_NOT_SHARED = {"method", "output", "seed", "device", "mask", "set", "allow_pickle"}  # settings that lines may differ in


def summarise(cells: Sequence[dict[str, Any]], settings: Settings, seeds: Sequence[int]) -> dict[str, Any]:
    """Means and intervals over seeds for each line, in the order of the lines' first cells; plain JSON values.

    A line that diverged on some seeds has no figures, only the number of those seeds, because the remaining seeds
    would be a selection.
    "gap": mean over seeds of the average gap to the retrained model of the same seed.
    "gap_of_means": average gap between the means over seeds, as papers report it; noise of single trainings averages
        out there.

    Raises:
        EraseError: retraining diverged.
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
    described = {name: value for name, value in asdict(settings.resolved()).items() if name not in _NOT_SHARED}
    return {"settings": described, "seeds": list(seeds), "version": __version__, "rows": table}


def over_seeds(name: str, values: Sequence[float], *, higher_is_better: bool = True) -> Score:
    """Mean and Student's t interval over seeds; n is their number.

    One seed says nothing of others, and nor do seeds with equal values: low and high are None. There is no correction
    for skewness, unlike in `statistics.mean`: the skewness cannot be estimated from five seeds.
    """
    array = values_of(name, values)
    n, value, deviation = len(array), float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0
    if deviation <= 1e-12 * max(abs(value), 1e-300):
        return Score(name, value, n, None, None, higher_is_better, interval=CANNOT_TELL)
    reach = quantile(CONFIDENCE, n - 1) * deviation / n**0.5
    return Score(name, value, n, value - reach, value + reach, higher_is_better, interval="t over seeds")


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and half the 95 % interval over seeds, in per cent.

    Without the interval if all seeds have the same value. Seconds are those of the unlearning alone.
    """
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
        figures = [shown(line[name]) for name in names]
        gap = f"{100 * line['gap_of_means']:.1f}"
        text.append("| " + " | ".join([label, *figures, gap, f"{line['seconds']['value']:.2g}"]) + " |")
    what = results["settings"]
    seeds = f"{len(results['seeds'])} seeds" if len(results["seeds"]) > 1 else "one seed"
    return f"{what['network']} on {what['data']}, forget {what['forget']}, {seeds}\n\n" + "\n".join(text) + "\n"


def plot(path: str | Path, results: dict[str, Any]) -> None:
    """A PNG: the average gap of each line with its interval if it has one, sorted, the smallest on top."""
    from matplotlib.figure import Figure

    lines = {label: line["gap"] for label, line in results["rows"].items() if label != RETRAIN and "gap" in line}
    order = sorted(lines, key=lambda label: -lines[label]["value"])
    figure = Figure(figsize=(6, 0.9 + 0.28 * len(order)), layout="constrained")
    ax = figure.subplots()
    ax.plot([100 * lines[label]["value"] for label in order], order, "o", color="black", markersize=4)
    for label in order:
        value, low, high = (lines[label][end] for end in ("value", "low", "high"))
        if low is not None:
            reach = [[100 * (value - low)], [100 * (high - value)]]
            ax.errorbar(100 * value, label, xerr=reach, color="black", linewidth=1, capsize=2)
    ax.set_xlim(left=0)
    ax.grid(axis="x", linewidth=0.4)
    num = len(results["seeds"])
    over = f"mean and 95 % interval over {num} seeds" if num > 1 else "one seed"
    ax.set_xlabel(f"average gap to retraining, points; {over}")
    ax.set_title(f"{results['settings']['data']}, forget {results['settings']['forget']}", fontsize=10)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _values(cell: dict[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in cell["scores"].items()} | {"seconds": cell["seconds"]}


def _means(of_seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in of_seeds])) for name in of_seeds[0]}


def shown(score: Mapping[str, Any]) -> str:
    """Per cent, and half the interval; alone if there is none.

    Records of 0.1.0 have intervals of no width, which are not shown either.
    """
    value, low, high = score["value"], score["low"], score["high"]
    if low is None or low == high:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} ±{100 * (high - value):.1f}"
