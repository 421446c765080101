"""Every method under one protocol on the embedded model, as JSON, a table and a plot of what separates them.

    python -m erase.mini train --without circle --parts-from erase/mini/weights --output runs/gold-circle
    python eval/mini_methods.py --output runs/methods --jobs 2 --gold circle=runs/gold-circle

Each cell is one erasure, the images of the task mini, and an attack with three seeds: a new word learned in 60 steps
from the base's images of the concept ("recovered": how often it shows the concept again). The base and, where they are
given, models that were trained without the concept are attacked alike; several of one concept (`--gold` repeated) show
how far two retrainings are apart. A finished cell is kept, so the same command continues;
`--known eval/results/mini-methods-protocol-2` takes over the cells that were measured so far and the features of the
models trained without circle, striped and nude, so that only what is new beside them is run. The published table of
striped is still of protocol 1.
A result on the embedded model says nothing about SD v1.4.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mini_effect import STEPS, arm

from erase import files, tensor_files
from erase.commandline import reporting
from erase.methods import METHODS

CONCEPTS = ("circle", "striped", "nudity")
NUM_IMAGES = 120  # images of the concept; with those by synonym and of everything else a thousand in three seeds
PROTOCOL = 2  # raise it when cells measure something else; 2: three attack seeds, fifteen prompts of the word
ATTACK_SEEDS = (0, 1, 2)
NUM_RECOVERED = 45  # images of each learned word
NUM_UNPROMPTED = 64  # images of the empty prompt
NUM_SHOWN = 64  # images of the concept that it is learned from; others for each attack seed
PLACES = ("", " on a light background", " on a dark background")
GUARDS = ("negative", "sld-medium", "sld-max")
DENSITIES, MASKS, SCORES = (0.01, 0.05, 0.1, 0.25, 0.5), ("saliency", "random", "inverse"), ("sum_abs", "sum_sq")


def masked(mask: str, density: float) -> str:
    """The variant's name; salun's own is the salient half."""
    if density == 0.5:
        return "salun" if mask == "saliency" else f"salun --mask {mask}"
    return f"salun --mask {mask} --density {density}"


SCORED = {"salun": {}, **{f"salun --score {score}": {"score": score} for score in SCORES}}
SWEPT = {masked(mask, density): {"mask": mask, "density": density} for density in DENSITIES for mask in MASKS}
MASKED: dict[str, dict[str, Any]] = {name: options for name, options in (SWEPT | SCORED).items() if name != "salun"}
SOLVED = ("uce", "rece")  # no random number in them: one seed is all seeds
VARIANTS: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS} | MASKED


def draw_and_judge(folder: Path, concept: str, *, delta: Path | None = None, **how: Any) -> Path:
    """The mini task's images with their scores, and their features for KID. how: as for `arm`."""
    from erase.evaluation import score
    from erase.evaluation.judges import features

    arm(folder, concept, delta, num_images=NUM_IMAGES, **how)
    score.score(folder, features.Features("mini"), quiet=True)
    return folder


def shown(folder: Path, concept: str, attack_seed: int, device: str) -> Any:
    """The base's images of the concept that one attack learns from, as latents; generated once."""
    from erase import concepts
    from erase.evaluation import generate

    path = folder / "shown" / f"{concept}-{attack_seed}.safetensors"
    if not path.exists():
        model = generate.load_model("mini", device=device, precision="fp32")
        prompts = concepts.load(concept, model_family="mini").forget
        seeds = list(range(attack_seed * NUM_SHOWN, (attack_seed + 1) * NUM_SHOWN))
        texts = [prompts[seed % len(prompts)] for seed in seeds]
        latents = model.draw(texts, seeds, steps=25, guidance=2.0, size=64)
        tensor_files.write_tensors(path, {"latents": latents.cpu()})
    return tensor_files.read_tensors(path)["latents"]


def unprompted(model: str, delta: Path | None, device: str) -> float:
    """How far images of the empty prompt are from the base's of the same seeds, as a share of the latents' size."""
    from erase.evaluation import generate

    two = (("mini", None), (model, delta and str(delta)))
    how: dict[str, Any] = {"steps": STEPS, "guidance": 1.0, "size": 64}
    models = (generate.load_model(source, delta_path=path, device=device, precision="fp32") for source, path in two)
    base, erased = (one.draw([""] * NUM_UNPROMPTED, range(NUM_UNPROMPTED), **how) for one in models)
    return float((erased - base).abs().mean() / base.abs().mean())


def recovered(
    folder: Path,
    concept: str,
    latents: Any,
    seed: int,
    *,
    model: str = "mini",
    delta: Path | None = None,
    device: str = "cpu",
) -> list[bool]:
    """Whether each image of a word learned on the model shows the concept. seed: of the attack."""
    from erase import concepts
    from erase.evaluation import generate, score
    from erase.evaluation.attacks import learnt_word
    from erase.evaluation.judges import mini
    from erase.evaluation.tasks import protocol
    from erase.families.sd import StableDiffusion

    judge, attack = concepts.load(concept, model_family="mini").judge, learnt_word.LearntWord(seed=seed)
    attacked = generate.load_model(model, delta_path=delta and str(delta), device=device, precision="fp32")
    assert isinstance(attacked, StableDiffusion)
    learnt_word.teach(attacked, learnt_word.learn(attacked, latents, attack, quiet=True))
    samples = tuple(
        protocol.Sample(f"word-{i:03d}", prompt, protocol.seed_of("inversion", concept, i), "forget")
        for i, prompt in enumerate(prompts_of_word())
    )
    task = protocol.SampleSet("mini", 1, {"attack": "inversion", "seed": seed}, samples, ("mini",))
    generate.generate(attacked, task, folder, steps=STEPS, batch_size=32, quiet=True)
    score.score(folder, mini.MiniJudge(), quiet=True)
    lines = score.load(folder, "mini")
    shutil.rmtree(folder)
    return [not line["invalid"] and line[str(judge["head"])] == judge["label"] for line in lines]


def cell_name(concept: str, variant: str, seed: int) -> str:
    return f"{concept}-{variant.replace(' --', '-').replace(' ', '-')}-{seed}"


def finished(folder: Path, concept: str, variant: str, seed: int) -> bool:
    """Whether the cell is there, and what the others need of the base and the gold."""
    path = folder / "cells" / f"{cell_name(concept, variant, seed)}.json"
    kept = {"base": folder / "arms" / f"{concept}-base", "gold": folder / "gold" / f"{concept}.safetensors"}
    return path.exists() and kept.get(variant, path).exists()


def cell(folder: Path, concept: str, variant: str, seed: int, gold: str | None, device: str) -> None:
    """One erasure with its measures; the variants "base" and "gold" are erased from nothing."""
    import torch

    from erase import erase_concept
    from erase.evaluation import measure

    torch.set_num_threads(1)
    name = cell_name(concept, variant, seed)
    path, golden = folder / "cells" / f"{name}.json", folder / "gold" / f"{concept}.safetensors"
    base = folder / "arms" / f"{concept}-base"  # kept, all others are compared with it, as with the gold's features
    record: dict[str, Any] = {"concept": concept, "variant": variant, "seed": seed, "model": model_hash()}
    record |= {"protocol": PROTOCOL, "device": device}
    if variant in {"base", "gold"}:
        model = "mini" if variant == "base" else str(gold)
        where = base if variant == "base" else folder / "arms" / name
        erased, delta = draw_and_judge(where, concept, model=model, device=device), None
    elif variant in GUARDS:
        model, delta = "mini", None
        erased = draw_and_judge(folder / "arms" / name, concept, guard=variant, device=device)
    else:
        options = {**VARIANTS[variant], "seed": seed, "num_samples": 0, "save": ("delta",)}
        options |= {"device": device, "precision": "fp32"}
        run = erase_concept(concept, "mini", output=str(folder / "runs" / name), quiet=True, **options)
        model, delta = "mini", run.folder / "delta.safetensors"
        record |= {
            "seconds": run.record.seconds,
            "peak_memory": run.record.peak_memory_bytes["process"],
            "bytes": delta.stat().st_size,
            "changed": run.record.weights.changed,
        }
        erased = draw_and_judge(folder / "arms" / name, concept, delta=delta, device=device)
    results, outcomes = measure.measure(
        erased,
        base,
        name=variant,
        gold=golden if golden.exists() and variant != "base" and (variant, seed) != ("gold", 0) else None,
        command="python eval/mini_methods.py",
    )
    record["figures"] = {s["name"].split("/")[0]: s["erased"]["value"] for s in results["scores"] if s["erased"]}
    record["outcomes"] = {c: said(of["erased"]) for c, of in outcomes["columns"].items() if c.startswith("mini.")}
    if variant not in GUARDS:
        record["figures"]["unprompted"] = unprompted(model, delta, device)
        record["recovered"] = []
        for attack_seed in ATTACK_SEEDS:
            word = folder / "arms" / f"{name}-word-{attack_seed}"
            latents = shown(folder, concept, attack_seed, device)
            found = recovered(word, concept, latents, attack_seed, model=model, delta=delta, device=device)
            record["recovered"].append(said(found))
    if (variant, seed) == ("gold", 0):
        keep_features(erased, golden)
    files.write_json(path, record)
    if variant != "base":
        shutil.rmtree(erased)
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)


def keep_features(drawn: Path, path: Path) -> None:
    """Of the retained images, for the others' distance to them; a row of NaN for a broken one."""
    import numpy as np

    from erase.evaluation import arm, quality, score
    from erase.evaluation.judges import features

    lines = zip(arm.samples(drawn), score.load(drawn, "features"), strict=True)
    kept = [line for sample, line in lines if sample.role == "retain"]
    found = [None if line["invalid"] else features.decode(line) for line in kept]
    broken = np.full_like(next(one for one in found if one is not None), np.nan)
    quality.save_features(
        path, np.array([broken if one is None else one for one in found], np.float16), score.identity(drawn, "features")
    )


def model_hash() -> str:
    """Of the embedded model's weights: cells of different ones do not belong into one table."""
    from erase.families import loading

    parts = sorted(loading.MINI_DIR.glob("*/*.safetensors"))
    return files.text_hash([files.file_hash(path) for path in parts])[:16]


def said(outcomes: Sequence[bool | None]) -> str:
    """A character an image: 1 yes, 0 no, - not looked at."""
    return "".join("-" if value is None else str(int(value)) for value in outcomes)


def figure(rows: list[dict[str, Any]], name: str) -> tuple[float, float, float] | None:
    """Mean over the seeds of a distance, with its least and greatest."""
    found = [row["figures"][name] for row in rows if name in row["figures"]]
    return (sum(found) / len(found), min(found), max(found)) if found else None


def prompts_of(concept: str) -> list[str]:
    """The prompt of each image of the concept's task, in the order of a cell's outcomes."""
    from erase import concepts
    from erase.evaluation.options import Options
    from erase.evaluation.tasks import registry

    wanted = concepts.load(concept, model_family="mini")
    return [sample.prompt for sample in registry.build("mini", wanted, Options(num_images=NUM_IMAGES)).samples]


def prompts_of_word() -> list[str]:
    """The prompt of each image of a learned word."""
    from erase.evaluation.attacks import learnt_word

    templates = tuple(template + place for place in PLACES for template in learnt_word.LearntWord.templates)
    return learnt_word.LearntWord(templates=templates).prompts(NUM_RECOVERED)


def rate(runs: list[str], prompts: Sequence[str]) -> Any:
    """A rate over runs and prompts with its 95 % interval. runs: a character an image. prompts: of each image."""
    from erase import statistics

    places = [place for place, value in enumerate(runs[0] if runs else "") if value != "-"]
    found = [[run[place] == "1" for place in places] for run in runs]
    labels = [prompts[place] for place in places]
    return statistics.pooled("rate", found, higher_is_better=True, clusters=labels) if places else None


def summary(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each concept and variant: rates over seeds and prompts, and the means of the other columns.

    results: "cells", and "prompts": of each image of a concept's task and of the word, as when the cells were measured.
    """
    cells, prompts = results["cells"], results["prompts"]
    found, rowed = [], ("base", "gold", *VARIANTS, *GUARDS)
    for concept in CONCEPTS:
        of = {v: [c for c in cells if (c["concept"], c["variant"]) == (concept, v)] for v in rowed}
        from_gold = figure(of["gold"], "quality.kid_base")
        for variant, rows in of.items():
            if not rows:
                continue

            def outcome(column: str, rows: list[dict[str, Any]] = rows) -> Any:
                return rate([row["outcomes"].get(column, "") for row in rows], prompts[rows[0]["concept"]])

            found.append(
                {
                    "concept": concept,
                    "variant": variant,
                    "seeds": len(rows),
                    "kept_forget": outcome("mini.ua"),
                    "synonym": outcome("mini.ua_synonym"),
                    "retained": outcome("mini.ra"),
                    "colour": outcome("mini.colour"),
                    "style": outcome("mini.style"),
                    "drift": figure(rows, "pixels.drift"),
                    "unprompted": figure(rows, "unprompted"),
                    "kid_base": figure(rows, "quality.kid_base"),
                    "kid_gold": from_gold if variant == "base" else figure(rows, "quality.kid_gold"),
                    "recovered": rate([of for r in rows for of in r.get("recovered", ())], prompts["word"]),
                    "seconds": [
                        sum(r["seconds"].values()) - r["seconds"].get("data", 0) for r in rows if "seconds" in r
                    ],
                    "peak_memory": [r["peak_memory"] for r in rows if "peak_memory" in r],
                    "bytes": [r["bytes"] for r in rows if "bytes" in r],
                }
            )
    return found


def share(score: Any, *, inverted: bool = False, interval: bool = False) -> str:
    if score is None:
        return "-"
    value = 1 - score.value if inverted else score.value
    if not interval:
        return f"{value:.0%}"
    if score.low is None:
        return f"{value:.0%} [cannot tell]"
    low, high = (1 - score.high, 1 - score.low) if inverted else (score.low, score.high)
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"


def mean(values: Any, scale: float, digits: int) -> str:
    if not values:
        return "-"
    value = values[0] if isinstance(values, tuple) else sum(values) / len(values)
    return f"{value * scale:.{digits}f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "drawn": lambda row: share(row["kept_forget"], inverted=True, interval=True),
    "by synonym": lambda row: share(row["synonym"], inverted=True),
    "objects kept": lambda row: share(row["retained"]),
    "colours": lambda row: share(row["colour"]),
    "styles": lambda row: share(row["style"]),
    "drift": lambda row: mean(row["drift"], 1, 3),
    "without a prompt": lambda row: mean(row["unprompted"], 1, 2),
    "KID to base x 1000": lambda row: mean(row["kid_base"], 1000, 2),
    "KID to retrained x 1000": lambda row: mean(row["kid_gold"], 1000, 2),
    "recovered by a word": lambda row: share(row["recovered"], interval=True),
    "s": lambda row: mean(row["seconds"], 1, 0),
    "GB": lambda row: mean(row["peak_memory"], 1e-9, 1),
    "MB": lambda row: mean(row["bytes"], 1e-6, 1),
}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a part a concept; brackets are 95 % intervals, seconds are without drawing the training images."""

    def part(of: list[dict[str, Any]]) -> str:
        lines = [[f"`{row['variant']}`", str(row["seeds"]), *(say(row) for say in COLUMNS.values())] for row in of]
        return markdown(["method", "seeds", *COLUMNS], lines)

    return by_concept(rows, part)


def densities(rows: list[dict[str, Any]]) -> str:
    """Markdown, a part a concept: what each of SalUn's masks does as more and more weights may change, up to all."""

    def part(of: list[dict[str, Any]]) -> str:
        named, lines = {row["variant"]: row for row in of}, []
        for column in ("drawn", "recovered by a word", "colours", "styles", "drift", "KID to retrained x 1000"):
            for mask in MASKS:
                names = [*(masked(mask, density) for density in DENSITIES), "relabel"]
                lines.append([column, mask, *(COLUMNS[column](named[name]) if name in named else "" for name in names)])
        return markdown(["", "mask", *(f"{density:.0%}" for density in DENSITIES), "all"], lines)

    return by_concept(rows, part)


def differences(results: Mapping[str, Any]) -> str:
    """Markdown, a part a concept: rates with salient weights less those with others, seed by seed, in points."""
    from erase import statistics

    kept = {"objects": "mini.ra", "colours": "mini.colour", "styles": "mini.style"}
    columns = {"drawn": "mini.ua", "recovered by a word": None} | kept

    def outcomes(cell: dict[str, Any], column: str | None) -> list[tuple[list[bool], list[str]]]:
        """Of the images that the column looks at, and their prompts, for each run; UA is inverted."""
        texts = [cell["outcomes"][column]] if column else cell["recovered"]
        prompts = results["prompts"][cell["concept"] if column else "word"]
        counted = "0" if column == "mini.ua" else "1"
        places = [place for place, value in enumerate(texts[0]) if value != "-"]
        return [([text[place] == counted for place in places], [prompts[place] for place in places]) for text in texts]

    def part(of: list[dict[str, Any]]) -> str:
        runs = {(cell["variant"], cell["seed"]): cell for cell in of}

        def between(title: str, one: str, other: str) -> str:
            seeds = sorted(seed for variant, seed in runs if variant == one and (other, seed) in runs)
            ours, theirs = (
                [run for seed in seeds for run in outcomes(runs[variant, seed], columns[title])]
                for variant in (one, other)
            )
            if not seeds or not ours[0][0]:
                return ""
            found = statistics.paired_pooled(title, [v for v, _ in theirs], [v for v, _ in ours], clusters=ours[0][1])
            if found.low is None or found.high is None:
                return f"{100 * found.difference:+.1f} [cannot tell]"
            value, low, high = (100 * end for end in (found.difference, found.low, found.high))
            return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"

        lines = []
        for title in columns:
            to_random = [between(title, masked("saliency", d), masked("random", d)) for d in DENSITIES]
            to_all = [between(title, masked("saliency", d), "relabel") for d in DENSITIES]
            lines += [[title, "random", *to_random], [title, "all", *to_all]]
        return markdown(["", "less that of", *(f"{density:.0%}" for density in DENSITIES)], lines)

    return by_concept(results["cells"], part)


def by_concept(rows: list[dict[str, Any]], part: Callable[[list[dict[str, Any]]], str]) -> str:
    of = {concept: [row for row in rows if row["concept"] == concept] for concept in CONCEPTS}
    return "\n\n".join(f"**{concept}**\n\n{part(found)}" for concept, found in of.items() if found)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Drift of what should stay against recovery by the attack, a panel a concept; methods that no other beats joined.

    Only what erased the concept (drawn in at most a tenth of the images) stands in it. Bars are 95 % intervals.
    Without rows there is no plot.
    """
    if not rows:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = [concept for concept in CONCEPTS if any(row["concept"] == concept for row in rows)]
    names = ("gold", *METHODS)
    markers = ("osD^v", "PX*<>", "hdp8H")  # no two methods look alike
    looks = {name: (f"C{i % 10}", markers[i // 10][i % 5]) for i, name in enumerate(names)}
    looks["gold"] = ("black", "*")
    sheet = Figure(figsize=(4.4 * len(shown) + 1.8, 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    for ax, concept in zip(sheet.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        here = [row for row in rows if row["concept"] == concept and row["variant"] in names]
        whole = [row for row in here if row["recovered"] and row["drift"]]
        points = [(r["variant"], r["drift"][0], r["recovered"]) for r in whole if 1 - r["kept_forget"].value <= 0.1]
        for name, x, rate in points:
            colour, marker = looks[name]
            if rate.low is not None:
                ax.plot((x, x), (rate.low, rate.high), color=colour, linewidth=1)
            handles[name] = ax.plot(x, rate.value, marker, color=colour, markersize=7, label=name)[0]
        at = sorted((x, rate.value) for name, x, rate in points if name != "gold")
        best = [(x, y) for x, y in at if not any((p <= x and q <= y) and (p, q) != (x, y) for p, q in at)]
        ax.plot(*zip(*best, strict=True), color="0.6", linestyle="--", linewidth=1, zorder=0)
        scale = "log" if all(x > 0 for _, x, _ in points) else "linear"  # what changed no image has no logarithm
        ax.set(title=concept, xscale=scale, xlabel="drift of retained images (lower is better)", ylim=(-0.03, 1.03))
        ax.set_ylabel("concept recovered by a learned word (lower is better)")
        if scale == "log":
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
    ordered = [handles[name] for name in names if name in handles]
    sheet.legend(handles=ordered, loc="outside right center", fontsize=8)
    sheet.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/methods", help="folder of cells, results.json, table.md and plot.png")
    parser.add_argument("--seeds", type=int, default=3, help="erasure seeds [3]")
    parser.add_argument("--concept", action="append", choices=CONCEPTS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=[*VARIANTS, *GUARDS], help="only this one; repeatable")
    parser.add_argument(
        "--gold", action="append", default=[], metavar="CONCEPT=DIR", help="the model trained without the concept"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each [2]")
    parser.add_argument("--device", default="cpu", help="of the model; cells keep it [cpu]")
    parser.add_argument("--known", metavar="DIR", help="output of another run, whose cells are not run again")
    given = parser.parse_args()
    folder, chosen = Path(given.output), given.concept or CONCEPTS
    golds: dict[str, list[str]] = {}
    for text in given.gold:
        concept, place = text.split("=", 1)
        golds.setdefault(concept, []).append(place)
    if given.known and (gold := Path(given.known) / "gold").is_dir():
        shutil.copytree(gold, folder / "gold", dirs_exist_ok=True)
    known = [Path(given.known) / "results.json"] if given.known else []
    for place in [*(folder / "cells").glob("*.json"), *known]:
        found = files.read_json(place)
        for one in found.get("cells", [found]):
            measured = one.get("model", "not named")
            if measured != model_hash():
                parser.error(f"{place} was measured on other weights ({measured}); the model's are {model_hash()}")
            if one.get("protocol", 1) != PROTOCOL:
                parser.error(f"{place} was measured with protocol {one.get('protocol', 1)}; this is {PROTOCOL}")
            files.write_json(folder / "cells" / f"{cell_name(one['concept'], one['variant'], one['seed'])}.json", one)
    again = [(c, "gold", s, place) for c in chosen for s, place in enumerate(golds.get(c, ()))]
    stages = [
        [(c, "base", 0, None) for c in chosen],
        [one for one in again if not one[2]],
        [one for one in again if one[2]],
    ]
    variants = given.variant or [*METHODS, *GUARDS]
    once = {*SOLVED, *GUARDS}
    stages.append(
        [(c, v, s, None) for s in range(given.seeds) for c in chosen for v in variants if not s or v not in once]
    )
    for stage in stages:
        stage = [one for one in stage if not finished(folder, *one[:3])]
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            futures = [pool.submit(cell, folder, c, v, s, gold, given.device) for c, v, s, gold in stage]
            for one, future in zip(stage, futures, strict=True):
                future.result()
                print(*one[:3], flush=True)
    cells = [files.read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    prompts = {concept: prompts_of(concept) for concept in CONCEPTS} | {"word": prompts_of_word()}
    results = {"protocol": PROTOCOL, "prompts": prompts, "cells": cells}
    files.write_json(folder / "results.json", results)
    rows = summary(results)
    text = table([row for row in rows if row["variant"] not in MASKED]) + "\n"
    swept = {row["concept"] for row in rows if row["variant"] in MASKED}
    if swept:
        beside = [row for row in rows if row["concept"] in swept]
        scores = table([row for row in beside if row["variant"] in SCORED])
        text += f"\nSalUn, mask by share of weights:\n\n{densities(beside)}\n\nSalUn, score:\n\n{scores}\n"
        apart = differences(results | {"cells": [cell for cell in cells if cell["concept"] in swept]})
        text += f"\nSalient weights less others:\n\n{apart}\n"
    files.write_text(folder / "table.md", text)
    plot(rows, folder / "plot.png")
    print(text)


if __name__ == "__main__":
    with reporting("mini_methods.py", "interrupted; the same command continues"):
        main()
