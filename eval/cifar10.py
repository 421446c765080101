"""SalUn's CIFAR-10 tables: every unlearning method for classifiers against retraining, beside the published figures.

    python eval/cifar10.py --data data/cifar10 --output runs/cifar10                          # the paper's, on a GPU
    python eval/cifar10.py --data data/cifar10 --protocol small --output runs/cifar10-small   # reduced, on a CPU
    python eval/cifar10.py --data data/cifar10 --protocol small --tune --output runs/tuning   # step sizes, on seed 0

`data/cifar10` holds train/CLASS/image and test/CLASS/image, or CIFAR-10's own files. Every cell is one method on one
seed, and is kept in a file. It needs no other cell, so cells may be run in any order, and by several processes of
different --seeds. An interrupted command, also one that is killed, continues when it is given again: finished cells are
not run again, and a long training continues from its state of a minute before. Cells that are published in eval/results
with the same settings are taken over.

Each figure's gap is its difference from the model retrained with the same seed, stated one by one. The average of
their absolute values hides that a method can be far off in opposite directions.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from erase import files
from erase.classification import data, records
from erase.classification.cells import AGAIN, ORIGINAL, RETRAIN, Bench, Row, cell
from erase.classification.compare import rows
from erase.classification.membership import GAP_OVER, average_gap
from erase.classification.presets import PRESETS
from erase.classification.settings import Settings
from erase.classification.summary import over_seeds, shown
from erase.commandline import reporting
from erase.files import default_cache_dir
from erase.tensor_files import content_hash

RESULTS = Path(__file__).resolve().parent / "results"
TRAINED = (ORIGINAL, RETRAIN, AGAIN)
TUNING_SEED = 0  # no table uses it
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
STEP_SIZE = {"iu": "alpha", "fisher": "alpha"} | dict.fromkeys(
    ("salun-do", "scrub-do", "sfron-do"), "forget_learning_rate"
)  # methods whose step size is not the learning rate


@dataclass(frozen=True)
class Table:
    """Settings of one table, beside those of its protocol.

    like: name of the table whose original and retrained models are this table's too.
    """

    name: str
    settings: Mapping[str, Any]
    like: str | None = None


@dataclass(frozen=True)
class Protocol:
    settings: Mapping[str, Any]
    tables: tuple[Table, ...]
    seeds: tuple[int, ...]


PAPER = (Table("10%", {"forget": "10%"}), Table("50%", {"forget": "50%"}), Table("class", {"forget": "class:0"}))
_STATISTICS = (
    Table("moving", {"tuned_for": "cifar10-small"}),
    Table("frozen", {"tuned_for": "cifar10-small-frozen"}, like="moving"),
)
_SMALL = {"forget": "10%", "precision": "bf16", "device": "cpu"}
PROTOCOLS = {
    # ResNet-18, 182 epochs of 45,000 images; the split of SalUn's code, for base and unlearning the same
    "full": Protocol({"tuned_for": "cifar10", "split": "reference"}, PAPER, tuple(range(1, 11))),
    # 0.46 million weights, 24 epochs; batch normalisation with moving and with frozen statistics
    "small": Protocol({"num_train": 20_000, **_SMALL}, _STATISTICS, tuple(range(1, 6))),
    "tiny": Protocol({"num_train": 5_000, "batch_size": 128, **_SMALL}, _STATISTICS, tuple(range(1, 6))),
    # shows that the script runs
    "toy": Protocol(
        {"network": "small", "train_epochs": 1, "epochs": 1, "batch_size": 16}, (Table("10%", {"forget": "10%"}),), (1,)
    ),
}


@dataclass(frozen=True)
class Work:
    """What is to be run. shadows: pairs of shadow models for LiRA per seed and table."""

    protocol: Protocol
    data: str
    output: Path
    methods: Sequence[str]
    shadows: int = 0
    quiet: bool = True

    @cached_property
    def images(self) -> str:
        """A hash of all pixels and labels, whatever their folder and format."""
        dataset = data.load(self.data, default_cache_dir(), quiet=self.quiet)
        train, test = dataset.train, dataset.test
        return content_hash({"train.x": train.x, "train.y": train.y, "test.x": test.x, "test.y": test.y})

    def settings(self, table: Table, seed: int) -> Settings:
        options = {"data": self.data, **self.protocol.settings, **table.settings}
        return Settings(**options, seed=seed, output=str(self.output))

    def lines(self, table: Table, seed: int) -> list[Row]:
        """The lines of a table; its original and retrained models only where no other table has them."""
        found = rows(self.settings(table, seed), self.methods)
        return [row for row in found if row.label not in TRAINED or table.like is None]

    def bench(self, table: Table, seed: int) -> Bench:
        folder = self.output / table.name
        originals = self.output / "originals"
        settings = self.settings(table, seed).resolved()
        return Bench(settings, folder, default_cache_dir(), self.shadows, originals, quiet=self.quiet)


def run(work: Work, seeds: Sequence[int], tables: Sequence[str], known: Mapping[str, Any]) -> None:
    """Every cell of the tables that has no file yet, second retrainings last; results.json is written after each."""
    for seed in seeds:
        take_over(work, seed, tables, known)
        for table in work.protocol.tables:
            if table.name not in tables:
                continue
            bench = work.bench(table, seed)
            for row in sorted(work.lines(table, seed), key=lambda row: row.label == AGAIN):
                found = cell(row, bench)
                print(f"seed {seed}, {table.name}: {row.label:16} {in_short(found)}", flush=True)
                write(work, work.output / "results.json")


def in_short(found: Mapping[str, Any]) -> str:
    if "diverged" in found:
        return found["diverged"]
    return ", ".join(
        f"{name} {100 * score['value']:.1f}" for name, score in found["scores"].items() if "MIA " not in name
    )


def _path(work: Work, table: Table, row: Row, seed: int) -> Path:
    return work.output / table.name / "cells" / f"{row.stem}-{seed}.json"


def _identity(work: Work, row: Row, seed: int) -> dict[str, Any]:
    return records.identity(replace(row.settings, seed=seed).resolved()) | {"shadows": work.shadows}


def settings_hash(identity: Mapping[str, Any]) -> str:
    """Of a cell's settings, without the folder of its images."""
    return files.text_hash({name: value for name, value in identity.items() if name != "data"})


def take_over(work: Work, seed: int, tables: Sequence[str], known: Mapping[str, Any]) -> None:
    """Write the files of published cells of a seed that were measured with the same settings on the same images.

    If not all cells of the seed are published, the original model is trained here first, since the other cells begin
    with it. Another processor can train another one; then the published cells do not fit and are not used.
    """
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    wanted = [(table, row) for table in work.protocol.tables if table.name in tables for row in work.lines(table, seed)]
    for table, row in wanted:
        path, identity = _path(work, table, row, seed), _identity(work, row, seed)
        for one in known.get("tables", {}).get(table.name, {}).get("cells", []):
            same = (one["label"], one["seed"]) == (row.label, seed) and one["settings"] == settings_hash(identity)
            if same:
                found[table.name, row.label] = path, {**one, "settings": identity}
    missing = {name: pair for name, pair in found.items() if not pair[0].is_file()}
    if missing and known.get("images") != work.images:
        print(f"seed {seed}: the published cells are of other images and are not used", flush=True)
        return
    originals = [(table, row) for table, row in wanted if (table.name, row.label) in found and row.label == ORIGINAL]
    if missing and len(found) < len(wanted) and originals:
        table, row = originals[0]
        _, published = found[table.name, ORIGINAL]
        if values(cell(row, work.bench(table, seed))) != values(published):
            print(
                f"seed {seed}: another original model was trained here, so the published cells are not used", flush=True
            )
            return
    for path, one in missing.values():
        if not path.is_file():  # the original's is there by now
            files.write_json(path, one)


def finished(work: Work) -> dict[str, list[dict[str, Any]]]:
    """The cells that have files, by table."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table in work.protocol.tables:
        for seed in work.protocol.seeds:
            for row in work.lines(table, seed):
                path = _path(work, table, row, seed)
                if path.is_file():
                    found.setdefault(table.name, []).append(cell(row, work.bench(table, seed)))
    return found


def write(work: Work, path: Path) -> None:
    """The finished cells as JSON: label, seed, hash of the settings, scores, seconds."""

    def short(one: dict[str, Any]) -> dict[str, Any]:
        scores = {name: {"value": s["value"], "n": s["n"]} for name, s in one.get("scores", {}).items()}
        kept = {name: one[name] for name in ("label", "seed", "split", "seconds", "diverged") if name in one}
        return {**kept, "settings": settings_hash(one["settings"]), **({"scores": scores} if scores else {})}

    tables = {name: {"cells": [short(one) for one in cells]} for name, cells in finished(work).items()}
    files.write_json(path, {"settings": dict(work.protocol.settings), "images": work.images, "tables": tables})


# --- tables -----------------------------------------------------------------------------------------------------------


def with_trained(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The cells of a table with those of its original and retrained models."""
    cells = results["tables"].get(name, {}).get("cells", [])
    if any(one["label"] == RETRAIN for one in cells):
        return cells
    trained = [one for table in results["tables"].values() for one in table["cells"] if one["label"] in TRAINED]
    return [*trained, *cells]


def values(one: Mapping[str, Any]) -> dict[str, float]:
    return {name: score["value"] for name, score in one["scores"].items()}


def lines_of(
    cells: Sequence[dict[str, Any]],
) -> Iterator[tuple[str, list[dict[str, float]], list[dict[str, float]], float]]:
    """Of each line: label, figures of each seed, figures of the retrained model of the same seed, mean seconds.

    A cell without a retrained model of its seed is left out, and so is a line that diverged.
    """
    retrained = {one["seed"]: values(one) for one in cells if one["label"] == RETRAIN and "scores" in one}
    for label in dict.fromkeys(one["label"] for one in cells):
        of = [one for one in cells if one["label"] == label and one["seed"] in retrained]
        if of and all("scores" in one for one in of):
            seconds = sum(one["seconds"] for one in of) / len(of)
            yield label, [values(one) for one in of], [retrained[one["seed"]] for one in of], seconds


def gaps(results: Mapping[str, Any], name: str) -> str:
    """Every figure and its gap to retraining, in per cent and points: mean and half the 95 % interval over seeds."""
    cells = with_trained(results, name)
    figures = [*GAP_OVER, *(["LiRA"] if any("LiRA" in one.get("scores", {}) for one in cells) else [])]
    head = [
        "",
        "seeds",
        *(title for figure in figures for title in (figure, f"gap {figure}")),
        "average gap",
        "seconds",
    ]
    lines = [head, ["---"] * len(head)]
    for label, ours, theirs, seconds in lines_of(cells):
        line = [label, str(len(ours))]
        for figure in figures:
            differences = [one[figure] - other[figure] for one, other in zip(ours, theirs, strict=True)]
            line += [_shown([one[figure] for one in ours]), _shown(differences, signed=True)]
        averages = [average_gap(*pair) for pair in zip(ours, theirs, strict=True)]
        lines.append([*line, _shown(averages), f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"])
    for label in dict.fromkeys(one["label"] for one in cells if "diverged" in one):
        lines.append([label, "diverged", *[""] * (len(head) - 2)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(of_seeds: Sequence[float], *, signed: bool = False) -> str:
    text = shown(vars(over_seeds("", of_seeds)))
    text = text.removeprefix("-") if text.startswith("-0.0") else text
    return f"+{text}" if signed and not text.startswith(("-", "0.0")) else text


def beside(results: Mapping[str, Any], name: str, published: Mapping[str, Any]) -> str:
    """Our figures and published ones, each with its gap to the retrained model of its own source in brackets."""
    figures = [*GAP_OVER, "average gap"]
    head = ["", *(title for figure in figures for title in (figure, "published")), "source"]
    lines, ours = [head, ["---"] * len(head)], {label: rest for label, *rest in lines_of(with_trained(results, name))}
    for source, rows_of in published["tables"][name].items():
        retrained = rows_of[RETRAIN]
        for label, theirs in rows_of.items():
            line = [label]
            for figure in figures:
                line += [_ours(ours.get(label), figure), _published(theirs, retrained, figure)]
            lines.append([*line, source])
    notes = [f"{source}: {text}" for source, text in published["sources"].items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n".join(notes)


def _ours(line: list[Any] | None, figure: str) -> str:
    if line is None:
        return "-"
    found, retrained, _ = line
    if figure == "average gap":
        return f"{100 * sum(average_gap(*pair) for pair in zip(found, retrained, strict=True)) / len(found):.2f}"
    value, centre = (100 * sum(one[figure] for one in of) / len(of) for of in (found, retrained))
    return f"{value:.2f} ({value - centre:+.2f})"


def _published(row: Mapping[str, float], retrained: Mapping[str, float], figure: str) -> str:
    if figure not in row:
        return "-"
    if figure == "average gap" or figure not in retrained:
        return f"{row[figure]:.2f}"
    return f"{row[figure]:.2f} ({row[figure] - retrained[figure]:+.2f})"


# --- step sizes -------------------------------------------------------------------------------------------------------


def tune(work: Work, tables: Sequence[str]) -> None:
    """Every method at multiples of its step size on TUNING_SEED; prints all gaps, the smallest average first."""
    for table in work.protocol.tables:
        if table.name not in tables:
            continue
        bench, cells = work.bench(table, TUNING_SEED), []
        lines = [row for row in rows(work.settings(table, TUNING_SEED), work.methods) if row.label != AGAIN]
        for row in lines:
            for scaled in [row] if row.label in TRAINED else [_scaled(row, factor) for factor in FACTORS]:
                cells.append(cell(scaled, bench))
                print(f"{table.name}: {scaled.label:24} {in_short(cells[-1])}", flush=True)
        print(f"\n{table.name}\n\n{gaps({'tables': {table.name: {'cells': cells}}}, table.name)}\n")


def _scaled(row: Row, factor: float) -> Row:
    preset, name = row.settings.preset, STEP_SIZE.get(row.label)
    if name is None:
        size = preset.learning_rate * factor
        return Row(f"{row.label} lr {size:g}", replace(row.settings, learning_rate=size))
    from erase.classification import methods

    default: float = getattr(methods.find(row.label), name)
    size = factor * dict(preset.options).get(name, default)
    return Row(f"{row.label} {name} {size:g}", replace(row.settings, set=(f"{name}={size:g}",)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="CIFAR-10's images or files")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="full", help="what is run [%(default)s]")
    parser.add_argument("--output", metavar="DIR", help="folder of cells and models [runs/cifar10-PROTOCOL]")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="some of the protocol's seeds [all]")
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="some of the protocol's tables [all]")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], choices=["all", *PRESETS], metavar="METHOD", help="[all]"
    )
    parser.add_argument("--shadows", type=int, default=0, metavar="N", help="pairs of shadow models for LiRA [0]")
    parser.add_argument(
        "--known", metavar="JSON", help="take over cells of these results, if their settings are the same"
    )
    parser.add_argument("--tune", action="store_true", help="try step sizes on a seed that no table uses")
    parser.add_argument("--print", action="store_true", help="print the tables of the finished cells and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    given = parser.parse_args(argv)
    protocol = PROTOCOLS[given.protocol]
    seeds, tables = given.seeds or protocol.seeds, given.tables or [table.name for table in protocol.tables]
    for name in tables:
        if name not in {table.name for table in protocol.tables}:
            parser.error(f"--tables has {name!r}; choose {', '.join(table.name for table in protocol.tables)}")
    for seed in seeds:
        if seed not in protocol.seeds:
            parser.error(f"--seeds has {seed}; choose {', '.join(map(str, protocol.seeds))}")
    output = Path(given.output or f"runs/cifar10-{given.protocol}")
    work = Work(protocol, given.data, output, given.methods, given.shadows, given.quiet)
    stored = Path(given.known or RESULTS / f"classification-cifar10-{given.protocol}.json")
    known = files.read_json(stored) if given.known or stored.is_file() else {}
    if given.tune:
        tune(work, tables)
        return
    if not given.print:
        run(work, seeds, tables, known)
    results = {"tables": {name: {"cells": cells} for name, cells in finished(work).items()}}
    published = files.read_json(RESULTS / "published-cifar10.json")
    for name in tables:
        print(f"\n{name}\n\n{gaps(results, name)}\n")
        if given.protocol == "full" and name in published["tables"]:
            print(beside(results, name, published))


if __name__ == "__main__":
    with reporting("cifar10.py", "interrupted; the same command continues"):
        main()
