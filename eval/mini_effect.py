"""What erasure does to the embedded model: concepts x variants x seeds under the task mini, as JSON and a table.

    python eval/mini_effect.py --output runs/effect --jobs 2

Each cell is one `erase_concept` run and its evaluation; a finished cell is kept, so the same command continues.
A result on the embedded model says nothing about SD v1.4.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from erase import files
from erase.commandline import reporting

STEPS = 15  # of the images that are judged; the embedded model's own 25 show the judge no more
CONCEPTS = ("circle", "moon", "striped", "nudity")
# new ones at the end: finished cells are named by a variant's place
VARIANTS: dict[str, dict[str, Any]] = {
    "salun": {},
    "--mask none": {"mask": "none"},
    "--mask random": {"mask": "random"},
    "--mask inverse": {"mask": "inverse"},
    "--recipe reference": {"recipe": "reference"},
    "--sampler dpm++ --num-inference-steps 10": {"sampler": "dpm++", "num_inference_steps": 10},
}


def arm(
    folder: Path,
    concept: str,
    delta: Path | None,
    *,
    model: str = "mini",
    guard: str | None = None,
    num_images: int | None = None,
    device: str = "cpu",
) -> Path:
    """The mini task's images of the base (None) or of the base with a delta, drawn and scored.

    guard: stands beside the model and steers away from the concept's name and synonyms.
    num_images: of the concept; None for the task's.
    """
    from erase import concepts, guards
    from erase.evaluation import generate, score
    from erase.evaluation.judges import registry as judging
    from erase.evaluation.options import Options
    from erase.evaluation.tasks import registry

    wanted = concepts.load(concept, model_family="mini")
    task = registry.build("mini", wanted, Options(num_images=num_images))
    watching = guard and guards.make(guard, ", ".join([wanted.name, *wanted.synonyms]))
    how: dict[str, Any] = {"device": device, "precision": "fp32", "guard": watching or None}
    loaded = generate.load_model(model, delta_path=delta and str(delta), **how)
    generate.generate(loaded, task, folder, steps=STEPS, batch_size=32, quiet=True)
    for name in task.judges:
        score.score(folder, judging.make(name, task.identity()), quiet=True)
    return folder


def cell(folder: Path, concept: str, variant: str | None, seed: int) -> None:
    """One run and its measurement; variant None draws the base, with which all others are compared."""
    import torch

    from erase import erase_concept
    from erase.evaluation import measure

    torch.set_num_threads(1)
    base = folder / "arms" / f"{concept}-base"
    if variant is None:
        arm(base, concept, None)
        return
    name = f"{concept}-{list(VARIANTS).index(variant)}-{seed}"
    path = folder / "cells" / f"{name}.json"
    if path.exists():
        return
    options = {**VARIANTS[variant], "seed": seed, "num_samples": 0, "save": ("delta",)}
    run = erase_concept(concept, "mini", output=str(folder / "runs" / name), quiet=True, **options)
    erased = arm(folder / "arms" / name, concept, run.folder / "delta.safetensors")
    results, outcomes = measure.measure(erased, base, name=variant, command="python eval/mini_effect.py")
    record = {"seconds": sum(run.record.seconds.values()), "changed": run.record.weights.changed}
    files.write_json(path, {"concept": concept, "seed": seed, **record, "results": results, "outcomes": outcomes})
    shutil.rmtree(erased)
    shutil.rmtree(run.folder)


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: every figure over all seeds with its interval, and the concept's rate for each seed."""
    from erase import statistics

    columns = {"mini.ua_synonym": False, "mini.ra": True, "mini.colour": True, "mini.style": True}
    lines = [
        "| concept | variant | concept drawn [95 %] (each seed) | by synonym | objects kept [95 %] | colours | styles "
        "| drift | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def outcomes(rows: list[dict[str, Any]], column: str, role: str) -> list[list[bool]]:
        found = [row["outcomes"]["columns"].get(column, {}).get(role, []) for row in rows]
        return [[bool(value) for value in run if value is not None] for run in found]

    def prompts(row: dict[str, Any], column: str, role: str) -> list[str]:
        values = row["outcomes"]["columns"][column][role]
        return [prompt for prompt, value in zip(row["outcomes"]["clusters"], values, strict=True) if value is not None]

    def figure(rows: list[dict[str, Any]], column: str, role: str, share: bool, interval: bool = False) -> str:
        runs = outcomes(rows, column, role)
        if not runs[0]:
            return "-"
        labels = prompts(rows[0], column, role)
        score = statistics.pooled(column, runs, higher_is_better=True, clusters=labels)
        low, high = score.low or 0.0, 1.0 if score.high is None else score.high
        ends = (low, high) if share else (1 - high, 1 - low)
        text = f"{score.value if share else 1 - score.value:.1%}"
        return f"{text} [{ends[0]:.1%}, {ends[1]:.1%}]" if interval else text

    def line(concept: str, variant: str, rows: list[dict[str, Any]], role: str) -> str:
        rates = ", ".join(f"{1 - sum(run) / len(run):.0%}" for run in outcomes(rows, "mini.ua", role))
        kept = [figure(rows, c, role, share, c == "mini.ra") for c, share in columns.items()]
        named = {one["name"]: one for one in rows[0]["results"]["scores"]}
        drift = "-"
        if role == "erased" and "pixels.drift" in named:
            values = [next(s for s in r["results"]["scores"] if s["name"] == "pixels.drift") for r in rows]
            drift = f"{sum(v['erased']['value'] for v in values) / len(values):.3f}"
        seconds = f"{sum(r['seconds'] for r in rows) / len(rows):.0f}" if role == "erased" else "-"
        drawn = figure(rows, "mini.ua", role, False, True)
        return f"| {concept} | {variant} | {drawn} ({rates}) | {' | '.join(kept)} | {drift} | {seconds} |"

    for concept in CONCEPTS:
        for variant in VARIANTS:
            rows = sorted(
                (c for c in cells if c["concept"] == concept and c["results"]["name"] == variant),
                key=lambda c: c["seed"],
            )
            if rows and variant == "salun":
                lines.append(line(concept, "base", rows[:1], "base"))
            if rows:
                lines.append(line(concept, f"`{variant}`" if "-" in variant else variant, rows, "erased"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/effect", help="folder of cells, results.json and table.md")
    parser.add_argument("--seeds", type=int, default=3, help="erasure seeds")
    parser.add_argument("--concept", action="append", choices=CONCEPTS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    given = parser.parse_args()
    folder = Path(given.output)
    chosen = given.concept or CONCEPTS
    first = [(concept, None, 0) for concept in chosen]
    rest = [(c, v, s) for v in given.variant or VARIANTS for s in range(given.seeds) for c in chosen]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for work in (first, rest):
            futures = [pool.submit(cell, folder, *one) for one in work]
            for one, future in zip(work, futures, strict=True):
                future.result()
                print(*one, flush=True)
    cells = [files.read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    files.write_json(folder / "results.json", {"cells": [{k: c[k] for k in c if k != "outcomes"} for c in cells]})
    files.write_text(folder / "table.md", table(cells) + "\n")
    print(table(cells))


if __name__ == "__main__":
    with reporting("mini_effect.py", "interrupted; the same command continues"):
        main()
