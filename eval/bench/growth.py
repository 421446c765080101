"""How cost grows with the number of weights, with the share that may change, and with the number of images: a plot.

python eval/growth.py --output growth.png
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import compare
from bench.jobs import Job
from erase import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHTS = {"small": (100_000, 1_000_000), "full": (100_000, 1_000_000, 10_000_000, 100_000_000)}
DENSITIES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
NUM_IMAGES = {"small": (8, 16), "full": (8, 16, 32, 64)}


@dataclass(frozen=True)
class Sweep:
    """One row of the plot: ours and the plain implementation, or ours alone, at growing values of x."""

    title: str
    x: str
    values: Sequence[float]
    ours: Callable[[float], Job]
    plain: Callable[[float], Job] | None
    size: Callable[[float], str]
    memory: str  # which measure stands in the right panel
    scale: float = 1.0  # of that measure
    unit: str = "GB"


def sweeps(size: str) -> list[Sweep]:
    fixed = str(WEIGHTS[size][-1])
    several = f"{int(fixed):,}"
    return [
        Sweep(
            "exact selection of half of the scores",
            "weights",
            WEIGHTS[size],
            lambda n: Job("our_selection"),
            lambda n: Job("plain_selection"),
            lambda n: str(int(n)),
            "extra_bytes",
            1e-9,
        ),
        Sweep(
            "optimizer step, half may change",
            "weights",
            WEIGHTS[size],
            lambda n: Job("our_optimizer", (0.5,)),
            lambda n: Job("plain_optimizer", (0.5,)),
            lambda n: str(int(n)),
            "peak_bytes",
            1e-9,
        ),
        Sweep(
            f"optimizer step, {several} weights",
            "share that may change",
            DENSITIES,
            lambda d: Job("our_optimizer", (d,)),
            lambda d: Job("plain_optimizer", (d,)),
            lambda d: fixed,
            "bytes_per_weight",
            unit="bytes per weight",
        ),
        Sweep(
            "mask pass, small UNet",
            "images",
            NUM_IMAGES[size],
            lambda n: Job("our_mask_pass", (int(n),)),
            None,
            lambda n: "small",
            "peak_bytes",
            1e-9,
        ),
    ]


def report(path: str | Path, size: str, rounds: int, show: Callable[[str], None]) -> None:
    """Measure every sweep, write the plot to `path` and the figures to a JSON of the same name."""
    path, rows = Path(path), []
    for sweep in sweeps(size):
        for value in sweep.values:
            sides = {"plain": sweep.plain(value)} if sweep.plain else {}
            turns = compare.take_turns({**sides, "ours": sweep.ours(value)}, sweep.size(value), rounds, is_alone=False)
            for side, measured in turns.items():
                row: dict[str, Any] = {"sweep": sweep.title, "x": value, "side": side}
                for measure in ("cpu_seconds", sweep.memory):
                    row[measure] = statistics.median(turn[measure] for turn in measured)
                rows.append(row)
                memory = f"{row[sweep.memory] * sweep.scale:.3g} {sweep.unit}"
                show(f"{sweep.title:40} {value:>12g} {side:6} {row['cpu_seconds']:9.4f} s  {memory}")
    files.write_json(path.with_suffix(".json"), {"machine": compare.machine(), "size": size, "rows": rows})
    _plot(path, sweeps(size), rows)


def _plot(path: Path, drawn: Sequence[Sweep], rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9, 2.7 * len(drawn)), layout="constrained")
    for (left, right), sweep in zip(sheet.subplots(len(drawn), 2), drawn, strict=True):
        for side, colour in (("plain", "0.55"), ("ours", "tab:red")):
            here = [row for row in rows if row["sweep"] == sweep.title and row["side"] == side]
            _line(left, here, "cpu_seconds", 1.0, side, colour)
            _line(right, here, sweep.memory, sweep.scale, side, colour)
        left.set(title=sweep.title, xlabel=sweep.x, ylabel="CPU seconds", xscale="log", yscale="log")
        right.set(title=sweep.memory.replace("_", " "), xlabel=sweep.x, ylabel=sweep.unit, xscale="log")
        right.set_ylim(0, 1.1 * right.get_ylim()[1])
        left.legend()
    sheet.savefig(path, dpi=110)


def _line(ax: "Axes", rows: Sequence[dict[str, Any]], measure: str, scale: float, label: str, colour: str) -> None:
    if rows:
        ax.plot(
            [r["x"] for r in rows], [r[measure] * scale for r in rows], "o-", color=colour, label=label, markersize=4
        )


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        prog="python eval/growth.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=["small", "full"], default="small", help="up to a million or 1e8 weights")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side; default: 3")
    parser.add_argument("--output", default="growth.png", help="plot to write, with a JSON beside it")
    given = parser.parse_args(arguments)
    report(given.output, given.size, given.rounds, show)
