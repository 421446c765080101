"""Whether training images from 20 steps of DPM++ 2M Karras erase as well as those from the model's own DDIM steps.

    python eval/sampler_effect.py --output runs/samplers --known eval/results/mini-methods

For every concept, seed and sampler: one `erase_concept` run and its evaluation under the task mini. Besides, how far
latents of 20 steps of DPM++ and of 50 steps of DDIM are from the exact solution. A finished cell is kept, so the same
command continues; `--known` takes the cells of the model's own sampler from those that `mini_methods.py` published.
A result on the embedded model is no promise for SD v1.4.
"""

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from mini_effect import arm
from mini_methods import NUM_IMAGES, model_hash

from erase import files
from erase.commandline import reporting

OWN, FAST = "DDIM, 25 steps", "DPM++ 2M Karras, 20 steps"
SAMPLERS: dict[str, dict[str, Any]] = {
    OWN: {"sampler": "model", "num_inference_steps": 25},
    FAST: {"sampler": "dpm++", "num_inference_steps": 20},
}
MEASURED: dict[str, dict[str, Any]] = {
    "DDIM, 50 steps": {"sampler": "model", "num_inference_steps": 50},
    FAST: SAMPLERS[FAST],
}
FIGURES = {
    "mini.ua": "UA",
    "mini.ua_synonym": "UA, synonyms",
    "mini.ra": "RA",
    "mini.colour": "colours kept",
    "mini.style": "styles kept",
    "pixels.drift": "drift",
}
EXACT_STEPS, NUM_EXACT = 999, 16  # DDIM steps that stand for the exact solution; images that are compared with it


def cell(folder: Path, concept: str, sampler: str, seed: int) -> None:
    """One run and its measurement."""
    from erase import erase_concept
    from erase.evaluation import measure

    name = f"{concept}-{list(SAMPLERS).index(sampler)}-{seed}"
    path, base = folder / "cells" / f"{name}.json", folder / "arms" / f"{concept}-base"
    if path.exists():
        return
    options = {**SAMPLERS[sampler], "seed": seed, "num_samples": 0, "save": ("delta",)}
    run = erase_concept(
        concept, "mini", output=str(folder / "runs" / name), cache_dir=str(folder / "cache"), quiet=True, **options
    )
    arm(base, concept, None, num_images=NUM_IMAGES)
    erased = arm(folder / "arms" / name, concept, run.folder / "delta.safetensors", num_images=NUM_IMAGES)
    results, _ = measure.measure(erased, base, name=name, command="python eval/sampler_effect.py")
    figures = {one["name"]: one["erased"]["value"] for one in results["scores"] if one["name"] in FIGURES}
    record = {"concept": concept, "sampler": sampler, "seed": seed, "model": model_hash(), "figures": figures}
    files.write_json(path, {**record, "seconds": run.record.seconds})
    shutil.rmtree(erased)
    shutil.rmtree(run.folder)


def take_known(folder: Path, known: Path) -> None:
    """Cells of the model's own sampler out of the published ones, as long as they were measured on these weights."""
    for one in files.read_json(known / "results.json")["cells"]:
        if one["variant"] == "salun" and one["model"] == model_hash():
            figures = {name: one["figures"][name] for name in FIGURES if name in one["figures"]}
            record = {key: one[key] for key in ("concept", "seed", "model", "seconds")}
            path = folder / "cells" / f"{one['concept']}-0-{one['seed']}.json"
            files.write_json(path, {**record, "sampler": OWN, "figures": figures})


def distances(folder: Path, concept: str) -> dict[str, float]:
    """||x - exact|| / ||exact|| of each sampler's latents of the concept's prompts, same noise; mean over images."""
    from erase import concepts
    from erase.families import loading

    path = folder / "distances" / f"{concept}.json"
    if not path.exists():
        model, prompts = loading.load("mini"), concepts.load(concept, model_family="mini").forget
        texts, seeds = [prompts[i % len(prompts)] for i in range(NUM_EXACT)], list(range(NUM_EXACT))
        how: dict[str, Any] = {"guidance": float(model.defaults["guidance_scale"]), "size": model.resolution}
        exact = model.draw(texts, seeds, steps=EXACT_STEPS, **how)
        apart = {}
        for name, options in MEASURED.items():
            steps, sampler = options["num_inference_steps"], options["sampler"]
            difference = model.draw(texts, seeds, steps=steps, sampler=sampler, **how) - exact
            apart[name] = float((difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).mean())
        files.write_json(path, apart)
    return files.read_json(path)


def table(cells: list[dict[str, Any]], apart: dict[str, dict[str, float]]) -> str:
    """Markdown: means with the standard deviation over seeds, and the mean difference in units of the own one's."""
    lines = [
        f"| concept | figure | {OWN} | {FAST} | difference | in standard deviations |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for concept in apart:
        runs = {(c["sampler"], c["seed"]): c["figures"] for c in cells if c["concept"] == concept}
        seeds = sorted(seed for sampler, seed in runs if sampler == OWN and (FAST, seed) in runs)
        for name, title in FIGURES.items():
            if len(seeds) < 2 or name not in runs[OWN, seeds[0]]:
                continue
            own, fast = ([runs[sampler, seed][name] for seed in seeds] for sampler in SAMPLERS)
            shown = [f"{statistics.mean(of):.3f} ± {statistics.stdev(of):.3f}" for of in (own, fast)]
            change, spread = statistics.mean(fast) - statistics.mean(own), statistics.stdev(own)
            ratio = f"{change / spread:+.1f}" if spread else "-"
            lines.append(f"| {concept}, {len(seeds)} seeds | {title} | {' | '.join(shown)} | {change:+.3f} | {ratio} |")
    lines += ["", f"| distance from the exact solution, {NUM_EXACT} images | {' | '.join(MEASURED)} |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {concept} | {' | '.join(f'{value:.4f}' for value in of.values())} |" for concept, of in apart.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/samplers", help="folder of cells, results.json and table.md")
    parser.add_argument("--seeds", type=int, default=3, help="erasure seeds [3]")
    parser.add_argument("--concept", action="append", help="may be repeated [circle, striped]")
    parser.add_argument("--known", metavar="DIR", help="published cells of mini_methods.py for the own sampler")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    folder, chosen = Path(given.output), given.concept or ["circle", "striped"]
    if given.known:
        take_known(folder, Path(given.known))
    for concept in chosen:
        for seed in range(given.seeds):
            for sampler in SAMPLERS:
                cell(folder, concept, sampler, seed)
                print(concept, sampler, seed, flush=True)
    apart = {concept: distances(folder, concept) for concept in chosen}
    found = [files.read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    cells = [one for one in found if one["concept"] in chosen and one["seed"] < given.seeds]
    files.write_json(folder / "results.json", {"cells": cells, "distances": apart})
    files.write_text(folder / "table.md", table(cells, apart) + "\n")
    print(table(cells, apart))


if __name__ == "__main__":
    with reporting("sampler_effect.py", "interrupted; the same command continues"):
        main()
