"""Class forgetting on the embedded pixel model: every applicable method beside four references, as JSON and a table.

    python -m erase.mini train --model mini-pixel --without circle --seed 1 \\
        --parts-from erase/mini/pixel/weights --output runs/without-circle
    python eval/pixel_methods.py --output runs/pixel --gold circle=runs/without-circle

References: the base; the row copy (the label's vector replaced by the anchor's, which forgets a label and nothing
else); the model trained without the class (`--gold`); and new real drawings in place of generated images.
Each cell is one erasure, images of the forgotten label and of all others, FID and KID in the judge's features of the
other labels' images to real drawings of their classes, and an attack that learns a class vector from images of the
class. A finished cell is kept, so the same command continues; `--known eval/results/pixel-methods` takes over the
published cells. A result on the embedded pixel model says nothing about larger models.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mini_methods

from erase import files, tensor_files
from erase.commandline import reporting, silence_libraries
from erase.errors import EraseError

PROTOCOL = 1  # raise it when cells measure something else
CONCEPTS = ("circle", "heart", "house")
NUM_FORGET, NUM_EACH, NUM_REAL = 100, 20, 300  # images of the forgotten label, of each other one, drawings of each
ATTACK_SEEDS, NUM_RECOVERED, NUM_SHOWN = (0,), 60, 128
MODEL = "mini-pixel"
REFERENCES = ("real drawings", "base", "row copy", "gold")
# methods that have a meaning without text and cross-attention; scissorhands has no block to reset here
VARIANTS: dict[str, dict[str, Any]] = {
    "salun": {"method": "salun"},
    "salun --mask random": {"method": "salun", "mask": "random"},
    **{name: {"method": name} for name in ("relabel", "erasediff", "esd-full", "ga", "sa", "sdd")},
    **{name: {"method": name} for name in ("ca", "salun-soft", "esd-u")},
}
SEEDLESS = REFERENCES


def outcomes(texts: Sequence[str], wanted: Sequence[str]) -> str:
    """A character an image: 1 if the judge saw what was wanted, else 0."""
    return "".join(str(int(seen == want)) for seen, want in zip(texts, wanted, strict=True))


def images_of(model: Any, names: Sequence[str], first_seed: int) -> Any:
    """Images [n, 3, 16, 16] of these classes, as the evaluation generates them."""
    import torch

    from erase.data.pixels import to_pixels

    parts = []
    for start in range(0, len(names), 100):
        part = names[start : start + 100]
        seeds = range(first_seed + start, first_seed + start + len(part))
        latents = model.draw(part, [*seeds], steps=25, guidance=2.0, size=model.resolution)
        parts.append(to_pixels(model.decode(latents)).float() / 127.5 - 1)  # as a stored image would be
    return torch.cat(parts)


def real_drawings(names: Sequence[str], seed: int) -> Any:
    """New drawings of these classes, [n, 3, 16, 16]."""
    import numpy as np

    from erase.mini.pixel import drawings

    rng = np.random.default_rng([seed, 77])
    return drawings.to_tensor(np.stack([drawings.draw(name, rng) for name in names]))


def seen(images: Any) -> tuple[Any, Any, list[str]]:
    """Features [n, 64], probabilities [n, 11] and names of images, by the judge."""
    from erase.mini.pixel import judge
    from erase.options.model_classes import MINI_PIXEL_DIR

    features, probabilities = judge.look(judge.load(MINI_PIXEL_DIR / "judge.safetensors"), images)
    return features, probabilities, judge.names(probabilities)


def others_of(concept: str) -> list[str]:
    """The labels of the retained images: `NUM_EACH` of each other class."""
    from erase.options.model_classes import classes_of

    return [name for name in classes_of(MODEL) if name != concept for _ in range(NUM_EACH)]


def measured(concept: str, forget: Any, retained: Any, features_path: Path) -> dict[str, Any]:
    """Outcomes of images of the forgotten label (None: there are none) and of the other labels, FID and KID."""
    from erase.evaluation import kid, quality
    from erase.mini.pixel import judge

    others = others_of(concept)
    features, _, names = seen(retained)
    reals = seen(real_drawings([name for name in dict.fromkeys(others) for _ in range(NUM_REAL)], 0))[0].numpy()
    vectors = features.numpy()
    found: dict[str, Any] = {"retained": outcomes(names, others)}
    found["fid"] = quality.fid(vectors, reals)
    one = kid.kid_of_sets(vectors, reals)  # images of one label do meet among the real ones
    found["kid_real"] = [one.value, one.low, one.high]
    tensor_files.write_tensors(features_path, {"features": features.half()})
    if forget is not None:
        _, probabilities, names = seen(forget)
        found["shown"] = outcomes(names, [concept] * NUM_FORGET)
        found["nothing"] = outcomes(names, [judge.NONE] * NUM_FORGET)
        found["probability"] = probabilities[:, judge.LABELS.index(concept)].mean().item()
    return found


def attacked(model: Any, concept: str, shown: Any) -> dict[str, list[str]]:
    """Whether images of a class vector that was learned show the class, and those of a random vector."""
    from erase import concepts
    from erase.evaluation.attacks.learnt_class import LearntClass
    from erase.evaluation.attacks.protocol import CONTROL, Given, Shown

    attack = replace(LearntClass(), at=(150,))
    one = concepts.of_class(concept, model.classes)
    given = Given(
        model=model, open_base=lambda: model, concept=one, shown=Shown(shown, (concept,) * len(shown)),
        others=Shown(shown[:0], ()), samples=(), steps=25, guidance=2.0, size=16, quiet=True,
    )  # fmt: skip
    found: dict[str, list[str]] = {"recovered": [], "control": []}
    for seed in ATTACK_SEEDS:
        findings = attack.search(given, seed)
        for name, point in (("recovered", "150"), ("control", CONTROL)):
            with attack.attacked(given, findings[point]):
                images = images_of(model, [concept] * NUM_RECOVERED, 40_000_000 + 1000 * seed)
            found[name].append(outcomes(seen(images)[2], [concept] * NUM_RECOVERED))
    return found


def shown(folder: Path, concept: str) -> Any:
    """The base's images of the concept that the attack learns from; generated once."""
    from erase.families import loading

    path = folder / "shown" / f"{concept}.safetensors"
    if not path.exists():
        images = images_of(loading.load(MODEL), [concept] * NUM_SHOWN, 30_000_000)
        tensor_files.write_tensors(path, {"images": images})
    return tensor_files.read_tensors(path)["images"]


def with_gold(folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    """The cell with its KID to the retrained model's images of the same labels and seeds, where both are there."""
    from erase.evaluation import kid

    name = mini_methods.cell_name(one["concept"], one["variant"], one["seed"])
    paths = [folder / "features" / f"{name}.safetensors", folder / "gold" / f"{one['concept']}.safetensors"]
    if "kid_gold" in one or one["variant"] in {"gold", "real drawings"} or not all(path.exists() for path in paths):
        return one
    ours, theirs = (tensor_files.read_tensors(path)["features"].float().numpy() for path in paths)
    found = kid.kid_of_pairs(ours, theirs, others_of(one["concept"]))
    return one | {"kid_gold": [found.value, found.low, found.high]}


def cell(folder: Path, concept: str, variant: str, seed: int, gold: str | None) -> None:
    """One erasure, or one reference, with its measures."""
    import torch

    from erase import concepts, erase_concept
    from erase.evaluation import generate
    from erase.evaluation.attacks.learnt_class import label_of

    torch.set_num_threads(1)
    name = mini_methods.cell_name(concept, variant, seed)
    features = folder / "features" / f"{name}.safetensors"
    record: dict[str, Any] = {"concept": concept, "variant": variant, "seed": seed, "protocol": PROTOCOL}
    record["model"] = model_hash()
    others = others_of(concept)
    if variant == "real drawings":
        record |= measured(concept, None, real_drawings(others, 1), features)
        files.write_json(folder / "cells" / f"{name}.json", record)
        return
    delta = None
    if variant in VARIANTS:
        options = {**VARIANTS[variant], "seed": seed, "num_samples": 0, "save": ("delta",)}
        run = erase_concept(concept, MODEL, output=str(folder / "runs" / name), quiet=True, **options)
        delta = run.folder / "delta.safetensors"
        record |= {"seconds": run.record.seconds, "changed": run.record.weights.changed}
        record["settings"] = {key: run.record.settings[key] for key in ("learning_rate", "num_train_steps", "set")}
    model = generate.load_model(
        str(gold) if variant == "gold" else MODEL, delta_path=delta and str(delta), device="cpu"
    )
    if variant == "row copy":
        anchor = concepts.of_class(concept, model.classes).anchor[0]
        with torch.no_grad():
            model.class_vectors[label_of(model, concept)] = model.class_vectors[label_of(model, anchor)]
    forget = images_of(model, [concept] * NUM_FORGET, 10_000_000)
    retained = images_of(model, others, 20_000_000)
    record |= measured(concept, forget, retained, features)
    record |= attacked(model, concept, shown(folder, concept))
    if (variant, seed) == ("gold", 0):
        files.copy(features, folder / "gold" / f"{concept}.safetensors")
    files.write_json(folder / "cells" / f"{name}.json", record)
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)


def model_hash() -> str:
    """Of the embedded pixel model's weights and judge."""
    from erase.options.model_classes import MINI_PIXEL_DIR

    return files.text_hash([files.file_hash(path) for path in sorted(MINI_PIXEL_DIR.rglob("*.safetensors"))])[:16]


def summary(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each concept and variant, over its seeds."""
    rows = []
    for concept in CONCEPTS:
        for variant in (*REFERENCES, *VARIANTS):
            of = [one for one in cells if (one["concept"], one["variant"]) == (concept, variant)]
            if of:
                rows.append({"concept": concept, "variant": variant, "cells": of})
    return rows


def rate(runs: Sequence[str], labels: Sequence[str] | None, *, inverted: bool = False) -> str:
    """A share of images over runs with its 95 % interval."""
    from erase import statistics

    if not runs or not runs[0]:
        return "-"
    found = [[(value == "1") != inverted for value in run] for run in runs]
    return mini_methods.share(statistics.pooled("rate", found, higher_is_better=True, clusters=labels), interval=True)


def average(cells: Sequence[Mapping[str, Any]], name: str, scale: float = 1.0, digits: int = 1) -> str:
    values = [cell[name][0] if isinstance(cell[name], list) else cell[name] for cell in cells if cell.get(name)]
    return f"{scale * sum(values) / len(values):.{digits}f}" if values else "-"


def kid_of(cells: Sequence[Mapping[str, Any]]) -> str:
    """KID to real drawings x 1000; the interval is that of the first seed."""
    first = cells[0]["kid_real"]
    ends = "" if first[1] is None or len(cells) > 1 else f" [{1000 * first[1]:.1f}, {1000 * first[2]:.1f}]"
    return average(cells, "kid_real", 1000) + ends


HEAD = (
    "method", "seeds", "still generated (FA)", "probability", "nothing recognisable", "others kept", "FID to real",
    "KID to real, x 1000", "KID to retrained, x 1000", "recovered by a learned vector", "by a random vector", "seconds",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown for the rows of one concept; brackets are 95 % intervals."""
    lines = []
    for row in rows:
        cells, others = row["cells"], others_of(row["concept"])
        runs = [text for cell in cells for text in cell.get("recovered", [])]
        random = [text for cell in cells for text in cell.get("control", [])]
        spent = [cell["seconds"] for cell in cells if "seconds" in cell]
        seconds = [sum(each.values()) - each.get("data", 0) for each in spent]
        name = {"gold": "retrained without it"}.get(row["variant"], row["variant"])
        lines.append(
            [
                f"`{name}`" if row["variant"] in VARIANTS else name,
                str(len(cells)),
                rate([cell["shown"] for cell in cells if "shown" in cell], None),
                average(cells, "probability", 1, 2),
                rate([cell["nothing"] for cell in cells if "nothing" in cell], None).split(" ")[0],
                rate([cell["retained"] for cell in cells], others),
                average(cells, "fid"),
                kid_of(cells),
                average(cells, "kid_gold", 1000),
                rate(runs, None),
                rate(random, None).split(" ")[0],
                f"{sum(seconds) / len(seconds):.0f}" if seconds else "-",
            ]
        )
    return mini_methods.markdown(HEAD, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/pixel", help="folder of cells and results.json [runs/pixel]")
    parser.add_argument("--seeds", type=int, default=1, help="erasure seeds [1]")
    parser.add_argument("--concept", action="append", choices=CONCEPTS, help="only this one; may be repeated")
    parser.add_argument("--variant", action="append", choices=[*REFERENCES, *VARIANTS], help="only this; repeatable")
    parser.add_argument(
        "--gold", action="append", default=[], metavar="CONCEPT=DIR", help="the model trained without the concept"
    )
    parser.add_argument("--known", metavar="DIR", help="output of another run, whose cells are not run again")
    silence_libraries()
    with reporting(Path(__file__).name, "interrupted; the same command continues"):
        run(parser.parse_args())


def run(given: argparse.Namespace) -> None:
    """Every cell that is asked for and has no file yet, then results.json and the tables.

    Raises:
        EraseError: an option is wrong, or a finished cell was measured on another model or with another protocol.
    """
    folder = Path(given.output)
    golds = retrained(given.gold)
    if given.known:
        if (gold := Path(given.known) / "gold").is_dir():
            shutil.copytree(gold, folder / "gold", dirs_exist_ok=True)
        for one in files.read_json(Path(given.known) / "results.json")["cells"]:
            name = mini_methods.cell_name(one["concept"], one["variant"], one["seed"])
            files.write_json(folder / "cells" / f"{name}.json", one)
    for path in (folder / "cells").glob("*.json"):
        one = files.read_json(path)
        if (one["model"], one["protocol"]) != (model_hash(), PROTOCOL):
            raise EraseError(f"{path} was measured on other weights or with another protocol; choose another --output")
    order = [*REFERENCES, *VARIANTS]
    for seed in range(given.seeds):
        for concept in given.concept or CONCEPTS:
            for variant in [name for name in order if name in (given.variant or order)]:
                path = folder / "cells" / f"{mini_methods.cell_name(concept, variant, seed)}.json"
                if path.exists() or (seed and variant in SEEDLESS) or (variant == "gold" and concept not in golds):
                    continue
                cell(folder, concept, variant, seed, golds.get(concept))
                print(concept, variant, seed, flush=True)
    cells = [with_gold(folder, files.read_json(path)) for path in sorted((folder / "cells").glob("*.json"))]
    files.write_json(folder / "results.json", {"protocol": PROTOCOL, "cells": cells})
    rows = summary(cells)
    print("\n\n".join(f"**{c}**\n\n{table(of)}" for c in CONCEPTS if (of := [r for r in rows if r["concept"] == c])))


def retrained(given: Sequence[str]) -> dict[str, str]:
    """The folder of each concept's retrained model, from --gold."""
    for text in given:
        concept, _, folder = text.partition("=")
        if not folder:
            raise EraseError(f"--gold is {text!r}; give CONCEPT=DIR, such as circle=runs/without-circle")
        if concept not in CONCEPTS:
            raise EraseError(f"--gold names {concept!r}; choose {', '.join(CONCEPTS)}")
        if not (Path(folder) / "model_index.json").is_file():
            raise EraseError(f"{folder} has no model_index.json; give the folder of a trained model")
    return dict(text.split("=", 1) for text in given)


if __name__ == "__main__":
    main()
