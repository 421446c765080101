"""How often the 95 % intervals of `erase.statistics` hold the truth, in simulated worlds whose truth is known.

    python eval/interval_coverage.py                    # every world, as JSON into eval/results/coverage.json
    python eval/interval_coverage.py --worlds 100       # fewer worlds, a rougher figure

A prompt's own rate comes from a beta distribution with the stated correlation (ICC) between its images, or, in "two
kinds", is either that of a prompt that never fails or of one that mostly fails. Pooled runs differ by a standard
deviation of 2 points. No data is read and no model is loaded; it takes 20 seconds on one core.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from erase import files, statistics
from erase.commandline import reporting

World = tuple[str, Callable[[np.random.Generator], tuple[Any, float]]]


def prompt_rates(rng: np.random.Generator, num: int, rate: float, icc: float) -> np.ndarray:
    """Rates of prompts, [num], whose mean is `rate` and whose images correlate by `icc`."""
    if rate in {0.0, 1.0} or icc == 0:
        return np.full(num, rate)
    size = 1 / icc - 1
    return rng.beta(rate * size, (1 - rate) * size, num)


def two_kinds(rng: np.random.Generator, num: int, rate: float) -> np.ndarray:
    """Most prompts never fail, the rest fail in 80 % of their images."""
    return np.where(rng.random(num) < rate / 0.8, 0.8, 0.0)


def rate(num: int, images: int, p: float, icc: float | None) -> World:
    """icc: None for prompts of two kinds."""

    def world(rng: np.random.Generator) -> tuple[Any, float]:
        of_prompts = two_kinds(rng, num, p) if icc is None else prompt_rates(rng, num, p, icc)
        outcomes = rng.random((num, images)) < of_prompts[:, None]
        labels = [str(i // images) for i in range(num * images)]
        return statistics.rate("r", outcomes.ravel().tolist(), higher_is_better=True, clusters=labels), p

    return f"rate {p:.0%}, {num} x {images}, {'two kinds' if icc is None else f'ICC {icc}'}", world


def pairs(num: int, images: int, loss: float, icc: float) -> World:
    def world(rng: np.random.Generator) -> tuple[Any, float]:
        lost = rng.random((num, images)) < prompt_rates(rng, num, loss, icc)[:, None]
        labels = [str(i // images) for i in range(num * images)]
        base = [True] * (num * images)
        return statistics.paired_rate("r", base, (~lost).ravel().tolist(), clusters=labels), -loss

    return f"loss of {100 * loss:g} points, {num} x {images}, ICC {icc}", world


def pooled(num: int, images: int, loss: float, runs: int) -> World:
    def world(rng: np.random.Generator) -> tuple[Any, float]:
        of_prompts, shape = prompt_rates(rng, num, loss, 0.3), (loss / 0.02) ** 2
        of_runs = rng.gamma(shape, 1 / shape, runs)  # mean 1, so that the loss of a run varies by 2 points
        chance = np.clip(of_prompts[None] * of_runs[:, None], 0, 1)
        kept = rng.random((runs, num, images)) >= chance[:, :, None]
        labels = [str(i // images) for i in range(num * images)]
        erased = [run.ravel().tolist() for run in kept]
        found = statistics.paired_pooled("r", [[True] * (num * images)] * runs, erased, clusters=labels)
        return found, -loss

    return f"{runs} runs, loss of {100 * loss:g} points, {num} x {images}, ICC 0.3", world


def means(num: int, kind: str) -> World:
    def world(rng: np.random.Generator) -> tuple[Any, float]:
        values = {"normal": rng.normal(1, 1, num), "exponential": rng.exponential(1, num),
                  "lognormal": rng.lognormal(-0.5, 1, num)}[kind]  # fmt: skip
        return statistics.mean("m", values.tolist(), higher_is_better=True), 1.0

    return f"mean, {kind}, {num} prompts", world


WORLDS: tuple[World, ...] = (
    *(rate(24, 10, p, icc) for p in (0.03, 0.5) for icc in (0.0, 0.3)),
    rate(66, 5, 0.03, 0.3),
    rate(66, 5, 0.1, 0.6),
    rate(66, 10, 0.05, None),
    rate(66, 1, 0.03, 0.0),
    *(pairs(192, 1, loss, 0.0) for loss in (0.003, 0.01, 0.03)),
    *(pairs(24, 8, loss, 0.3) for loss in (0.003, 0.03, 0.1)),
    *(pairs(66, 5, loss, 0.3) for loss in (0.003, 0.03)),
    *(pooled(24, 5, 0.03, runs) for runs in (3, 5)),
    pooled(66, 5, 0.1, 3),
    *(means(10, kind) for kind in ("normal", "exponential", "lognormal")),
    means(66, "lognormal"),
)


def cover(world: World, num_worlds: int) -> dict[str, Any]:
    """How often the interval holds the truth, and how wide it is. The seed is the world's name and number."""
    title, make = world
    held, widths = 0, []
    for number in range(num_worlds):
        seed = int(files.text_hash([title, number])[:12], 16)
        figure, truth = make(np.random.default_rng(seed))
        low, high = (-np.inf, np.inf) if figure.low is None else (figure.low, figure.high)
        held += bool(low <= truth <= high)
        widths.append(high - low)
    return {"world": title, "worlds": num_worlds, "coverage": held / num_worlds, "width": float(np.mean(widths))}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| world | 95 % interval holds the truth | mean width |", "| --- | --- | --- |"]
    for row in rows:
        lines.append(f"| {row['world']} | {100 * row['coverage']:.1f} % | {row['width']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=2000, help="simulated worlds of each kind [2000]")
    parser.add_argument("--output", default="eval/results/coverage.json", help="JSON file [%(default)s]")
    given = parser.parse_args()
    rows = [cover(world, given.worlds) for world in WORLDS]
    files.write_json(given.output, {"rows": rows})
    print(table(rows))


if __name__ == "__main__":
    with reporting("interval_coverage.py"):
        main()
