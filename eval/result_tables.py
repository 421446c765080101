"""Fill the tables in README.md and docs/: results from eval/results/*.json, supported models from the registry.

    python eval/result_tables.py            # every block from <!-- table NAME --> to <!-- /table -->, and methods.png
    python eval/result_tables.py --list     # names of the tables, and the pages that show them

The text around a table is written by hand; the table never is. `tests/test_docs.py` compares.
"""

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attacked_methods
import cifar10
import interval_coverage
import mini_methods
import pixel_methods
import sampler_effect

from erase import files
from erase.classification import compare
from erase.classification.membership import GAP_OVER
from erase.classification.summary import over_seeds, shown
from erase.commandline import reporting
from erase.families.architecture import refused_kinds
from erase.families.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
BLOCK = re.compile(r"(<!-- table (.+?) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
# Headings as readers know them; the scripts that measure have shorter ones.
CELLS = {
    "drawn": "still generated",
    "less that of": "minus",
    "recovered by a word": "recovered by a learned word",
    "KID to base x 1000": "KID to base, x 1000",
    "KID to retrained x 1000": "KID to retrained, x 1000",
    "s": "seconds",
}
SUMMARY = ("base", "gold", "salun", "esd-x", "ca", "uce", "speed")  # README shows these


def pages() -> list[Path]:
    """All pages that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """The page with every wanted table as the JSON files have it.

    Raises:
        KeyError: the page names a table that is unknown.
    """

    def replaced(block: re.Match[str]) -> str:
        start, name, old, end = block.groups()
        return f"{start}{TABLES[name]()}\n{end}" if wanted(name) else f"{start}{old}{end}"

    return BLOCK.sub(replaced, text)


def stored(name: str) -> dict[str, Any]:
    return files.read_json(RESULTS / name)


def renamed(table: str) -> str:
    """The table with the headings of CELLS."""
    return re.sub(r"(?<=\| )[^|]+?(?= \|)", lambda cell: CELLS.get(cell[0], cell[0]), table)


@functools.cache
def measured(name: str) -> dict[str, Any]:
    """The cells of the methods or of SalUn's masks, which were measured with protocols of their own."""
    return stored(f"mini-{name}/results.json")


@functools.cache
def rows_of(name: str) -> tuple[dict[str, Any], ...]:
    """Takes half a minute: the intervals are over seeds and prompts."""
    return tuple(mini_methods.summary(measured(name)))


@functools.cache
def method_rows() -> tuple[dict[str, Any], ...]:
    """The cells have no seconds, since other work kept the machine busy meanwhile."""
    return tuple(row | {"seconds": []} for row in rows_of("methods-protocol-2"))


def of_concept(rows: Sequence[dict[str, Any]], concept: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["concept"] == concept]


def only(concept: str) -> dict[str, Any]:
    """The masks' results with the cells of one concept."""
    found = measured("masks")
    return found | {"cells": of_concept(found["cells"], concept)}


def without_title(text: str) -> str:
    """The table of one concept, whose page has its own heading."""
    return text.split("\n\n", 1)[1]


def methods(concept: str) -> str:
    """Every method, guard, the base and the model that was trained without the concept."""
    return renamed(without_title(mini_methods.table(of_concept(method_rows(), concept))))


def scores(concept: str) -> str:
    rows = [row for row in of_concept(rows_of("masks"), concept) if row["variant"] in mini_methods.SCORED]
    return renamed(without_title(mini_methods.table(rows)))


def masks(concept: str) -> str:
    return renamed(without_title(mini_methods.densities(of_concept(rows_of("masks"), concept))))


def differences(concept: str) -> str:
    return renamed(without_title(mini_methods.differences(only(concept))))


def summary() -> str:
    """README's few rows: how often the concept is still generated, and how often a learned word recovers it."""
    rows = {(row["concept"], row["variant"]): row for row in method_rows()}
    columns = ("drawn", "objects kept", "recovered by a word")

    def line(variant: str) -> list[str]:
        name = {"base": "base model", "gold": "trained without the concept"}.get(variant, f"`{variant}`")
        of = [rows[concept, variant] for concept in mini_methods.CONCEPTS]
        return [name, *(" / ".join(said(row, column) for row in of) for column in columns)]

    def said(row: dict[str, Any], column: str) -> str:
        return mini_methods.COLUMNS[column](row).split(" ")[0]

    return mini_methods.markdown(["", *(CELLS.get(name, name) for name in columns)], [line(name) for name in SUMMARY])


def samplers() -> str:
    results = stored("sampler-effect/results.json")
    return sampler_effect.table(results["cells"], results["distances"])


def classifier(name: str, forget: str) -> str:
    """The table of `unlearn-classifier compare`."""
    return compare.table(stored(f"classification-{name}.json")[forget]).split("\n\n", 1)[1].rstrip()


def without_mia(name: str, forget: str) -> str:
    """Average gap to retraining with and without the membership attack; mean and half the interval over seeds."""
    results = stored(f"classification-{name}.json")[forget]
    retrained = {cell["seed"]: cell for cell in results["cells"] if cell["label"] == compare.RETRAIN}
    lines = []
    for label, row in results["rows"].items():
        if "diverged" in row:
            lines.append([label, f"diverged on {row['diverged']} of {len(results['seeds'])}", ""])
            continue
        cells = [cell for cell in results["cells"] if cell["label"] == label]
        found: list[str] = []
        for names in (GAP_OVER, [figure for figure in GAP_OVER if figure != "MIA"]):
            gaps = [sum(abs(c[n] - retrained[c["seed"]][n]) for n in names) / len(names) for c in cells]
            found.append(shown(vars(over_seeds("gap", gaps, higher_is_better=False))))
        lines.append([label, *found])
    return mini_methods.markdown(["", "gap over UA, RA, TA, MIA", "gap over UA, RA, TA"], lines)


def cifar10_gaps(results: str, name: str) -> str:
    """Every method's figures and their gaps to retraining, of the seeds that are finished."""
    return cifar10.gaps(stored(f"classification-cifar10-{results}.json"), name)


def pixel(concept: str) -> str:
    """Class forgetting on the embedded pixel model: all references and methods that were measured for the class."""
    rows = pixel_methods.summary(stored("pixel-methods/results.json")["cells"])
    return pixel_methods.table(of_concept(rows, concept))


def intervals() -> str:
    """How often 95 % intervals hold the truth of simulated worlds."""
    return interval_coverage.table(stored("coverage.json")["rows"])


def speed(name: str) -> str:
    """Medians of a bench, side by side with plain implementations of the same job."""
    results = stored(f"bench-{name}.json")
    lines = []
    for item in results["items"].values():
        plain, ours = item.get("plain"), item["ours"]
        if "note" in item:  # the plain steps are dense, so they were measured once
            plain = results["items"]["steps-50"]["plain"]
        sides = [
            f"{one['cpu_seconds']:.3g} s, {one['peak_bytes'] / 1e9:.1f} GB" if one else "-" for one in (plain, ours)
        ]
        ratio = f"{plain['cpu_seconds'] / ours['cpu_seconds']:.3g}x" if plain else "-"
        lines.append([item["title"].replace("images", "images"), *sides, ratio, str(item["rounds"])])
    return mini_methods.markdown(["job", "plain", "this project", "times faster", "rounds"], lines)


def growth() -> str:
    """CPU seconds of each sweep at its smallest and largest x, and all between."""
    lines = []
    for row in stored("growth.json")["rows"]:
        memory = f"{row['bytes_per_weight']:.3g} bytes a weight" if "bytes_per_weight" in row else ""
        if not memory:
            memory = f"{row.get('extra_bytes', row.get('peak_bytes')) / 1e9:.3g} GB"
            memory += " more" if "extra_bytes" in row else " at the peak"
        side = "this project" if row["side"] == "ours" else row["side"]
        lines.append([row["sweep"], f"{row['x']:,}", side, f"{row['cpu_seconds']:.3g}", memory])
    return mini_methods.markdown(["sweep", "x", "side", "CPU seconds", "memory"], lines)


def sdxl_memory() -> str:
    """Gigabytes of each phase, and the smallest card whose 12, 16 or 24 GiB hold the largest and 1 GB more."""
    found, lines = stored("sdxl-memory.json"), []
    for name, row in found["rows"].items():
        phases = row["phases"]
        trained = phases.get("training", phases.get("solving"))
        largest = max(phases["generating"], phases.get("mask", 0), trained) + 1e9
        card = next((f"{size} GB" for size in (12, 16, 24) if largest <= size * 2**30), "above 24 GB")
        main = max(found["loading"], phases["writing"])
        figures = [
            f"{number / 1e9:.1f}" if number else "-" for number in (phases["generating"], phases.get("mask"), trained)
        ]
        lines.append([f"`{name}`", *figures, card, f"{main / 1e9:.1f}"])
    return mini_methods.markdown(["options", "images", "mask", "training", "smallest card", "main memory"], lines)


def sdxl_step() -> str:
    """Seconds and gigabytes of each phase of a run with one step, on a CPU."""
    rows = stored("sdxl-step.json")["phases"].items()
    lines = [[name, f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}"] for name, row in rows]
    return mini_methods.markdown(["phase", "seconds", "memory, GB"], lines)


def models() -> str:
    """The kinds of models that the registered families are tested on."""
    lines = ["| model | pipeline class | single file | guards | needs |", "| --- | --- | --- | --- | --- |"]
    for family in dict.fromkeys(map(FAMILIES.load, FAMILIES.names())):
        for model in family.models:
            files = ", ".join([*["read"] * model.read, *["written"] * model.written]) or "no"
            needs = f"`{model.options}`" if model.options else "-"
            guards = ("all" if model.guided else "`nag`") if family.takes_guards else "no"
            lines.append(f"| {model.name} | `{family.pipelines[0]}` | {files} | {guards} | {needs} |")
    return "\n".join(lines)


def refused_models() -> str:
    """The kinds of models that are refused by name."""
    return f"Refused by name: {'; '.join(refused_kinds())}."


@functools.cache
def attacked_rows() -> list[dict[str, Any]]:
    return attacked_methods.summary(stored("attacked-methods/results.json")["cells"])


def attacked(attack: str) -> str:
    """How often each attack brings the concept back; without `attack`, what the erasures changed."""
    return attacked_methods.table(attacked_rows(), attack) if attack else attacked_methods.changes(attacked_rows())


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "refused models": refused_models,
    "sdxl memory": sdxl_memory,
    "sdxl step": sdxl_step,
    "summary": summary,
    "samplers": samplers,
    "growth": growth,
    "coverage": intervals,
}
for _concept in mini_methods.CONCEPTS:
    for _kind in (methods, masks, differences, scores):
        TABLES[f"{_kind.__name__} {_concept}"] = functools.partial(_kind, _concept)
for _name, _shares in {
    "digits": ("10%", "50%", "class:3"),
    "digits-densities": ("10%", "class:3"),
    "drawings": ("10%", "50%", "class:3"),
}.items():
    for _share in _shares:
        TABLES[f"{_name} {_share}"] = functools.partial(classifier, _name, _share)
        if _name == "drawings":
            TABLES[f"{_name} {_share} without MIA"] = functools.partial(without_mia, _name, _share)
for _path in sorted(RESULTS.glob("classification-cifar10-*.json")):
    _name = _path.stem.removeprefix("classification-cifar10-")
    for _table in stored(_path.name)["tables"]:
        TABLES[f"cifar10-{_name} {_table}"] = functools.partial(cifar10_gaps, _name, _table)
for _concept in dict.fromkeys(cell["concept"] for cell in stored("pixel-methods/results.json")["cells"]):
    TABLES[f"pixel {_concept}"] = functools.partial(pixel, _concept)
for _attack in ("", *attacked_methods.ATTACKS):
    TABLES[f"attacked {_attack or 'changes'}"] = functools.partial(attacked, _attack)
for _name in ("full", "classification"):
    TABLES[f"speed {_name}"] = functools.partial(speed, _name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the tables and their pages")
    given = parser.parse_args()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if given.list:
            for block in BLOCK.finditer(text):
                print(f"{page.relative_to(ROOT)}: {block[2]}")
            continue
        new = filled(text)
        if new != text:
            files.write_text(page, new)
            print(f"rewrote {page.relative_to(ROOT)}")
    if not given.list:
        mini_methods.plot(list(method_rows()), ROOT / "docs" / "results" / "methods.png")


if __name__ == "__main__":
    with reporting("result_tables.py"):
        main()
