"""Several methods side by side, in one table and one plot."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.errors import EraseError
from erase.evaluation.report import plots
from erase.evaluation.report.against import against
from erase.evaluation.report.html import render
from erase.evaluation.report.markdown import escaped, markdown_facts, markdown_table
from erase.evaluation.report.results import check, is_of_machine, machine_differences
from erase.evaluation.report.words import (
    aligned,
    arrow,
    as_json,
    figure_text,
    interval_of,
    pair_row,
    table_row,
    task_line,
)
from erase.files import write_json, write_text
from erase.statistics import holm


def compare(
    results: Sequence[Mapping[str, Any]], outcomes: Sequence[Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """Methods side by side: every score of every result, p-values Holm-corrected over the whole table.

    A score has its `base` where all results have the same base model. `front` names the methods that no other one
    beats in both the primary and the retention score. Distances to different images are different scores.

    outcomes: of each result's erasures, for paired tests of method against method (`pairs`).

    Raises:
        EraseError: there are fewer than two results, or they were measured differently.
    """
    if len(results) < 2:
        raise EraseError(f"a comparison needs at least two results, not {len(results)}")
    for result in results:
        check(result)
        _refuse_other_protocol(results[0], result)
    first = results[0]
    methods = _distinct([result["name"] for result in results])
    has_same_base = all(result["arms"].get("base") == first["arms"].get("base") for result in results)
    by_name = [{_key(score, results): score for score in result["scores"]} for result in results]
    found: dict[str, Any] = {}
    for named in by_name:
        found = found | {name: score for name, score in named.items() if name not in found}
    scores = []
    for name, score in found.items():
        cells = zip(methods, (named.get(name, {}) for named in by_name), strict=True)
        scores.append(
            {key: score.get(key) for key in ("title", "about", "higher_is_better", "copy_of")}
            | {
                "name": name,
                "base": score["base"] if has_same_base else None,
                "rows": [
                    {"method": method, "erased": cell.get("erased"), "comparison": cell.get("comparison")}
                    for method, cell in cells
                ],
            }
        )
    rows = [(score, row) for score in scores for row in score["rows"] if row["comparison"]]
    tests = [(score["copy_of"] or score["name"], row["method"]) for score, row in rows]
    for (_, row), p in zip(rows, holm([row["comparison"]["p"] for _, row in rows], tests), strict=True):
        row["comparison"] = row["comparison"] | {"p_holm": p}
    compared = {
        "format": 2,
        "task": first["task"],
        "protocol": first["protocol"],
        "protocol_hash": first["protocol_hash"],
        "methods": methods,
        "arms": {method: result["arms"] for method, result in zip(methods, results, strict=True)},
        "primary": first["primary"],
        "retention": first.get("retention"),
        "scores": scores,
        "pairs": against(methods, outcomes, _verdict_scores(first, scores)) if outcomes else [],
        "warnings": list(dict.fromkeys(_warnings(results))),
    }
    placed = _placed(compared)
    is_on_front = front([(x, y) for _, x, y in placed])
    return compared | {"front": [method for (method, _, _), on in zip(placed, is_on_front, strict=True) if on]}


def _key(score: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The score's name; with the images that a distance is to, if results have different ones."""
    target = score.get("target")
    others = {s.get("target") for result in results for s in result["scores"] if s["name"] == score["name"]}
    return f"{score['name']} to {target[:8]}" if target and len(others) > 1 else score["name"]


def _verdict_scores(first: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The primary and the retention score."""
    wanted = {first["primary"], first.get("retention")}
    return [score for score in scores if score["name"] in wanted]


def _warnings(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What differs between results without making them incomparable."""
    first = results[0]
    for other in results[1:]:
        different = machine_differences(first["protocol"], other["protocol"])
        if different:
            yield (
                f"'{first['name']}' and '{other['name']}' are of different machines ({'; '.join(different)}), "
                "which changes images slightly"
            )


def write_comparison(compared: Mapping[str, Any], folder: str | Path) -> None:
    """Write comparison.json, comparison.md and comparison.html into `folder`."""
    view = {
        "compared": compared,
        "subtitle": f"{task_line(compared)} · {len(compared['methods'])} methods",
        "tables": [
            {
                "title": f"{score['title']} {arrow(score)}",
                "about": score["about"],
                "base": figure_text(score["base"]),
                "rows": [
                    table_row(
                        row | {"base": None}, row["method"] + (" *" if row["method"] in compared["front"] else "")
                    )
                    for row in score["rows"]
                ],
            }
            for score in compared["scores"]
        ],
        "pairs": [pair_row(row) for row in compared["pairs"]],
    }
    text = _comparison_markdown(view)
    page = render("comparison.html.jinja", **view, svg=_pareto(compared))
    folder = Path(folder)
    write_text(folder / "comparison.md", text)
    write_text(folder / "comparison.html", page)
    write_json(folder / "comparison.json", compared)


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Method by score, erased values with their intervals, for a terminal."""
    cells = [{"title": method} for method in compared["methods"]]
    for score in compared["scores"]:
        for cell, row in zip(cells, score["rows"], strict=True):
            cell[score["name"]] = figure_text(row["erased"])
    return aligned({"title": "method", **{score["name"]: score["name"] for score in compared["scores"]}}, cells)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: at least as good on both axes (more is better) and better on one."""
    return [not any(o[0] >= p[0] and o[1] >= p[1] and o != p for o in points) for p in points]


def _refuse_other_protocol(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """The whole task and protocol must agree, since a figure means nothing without them."""
    ours, theirs = (
        {f"task.{k}": v for k, v in r["task"].items()}
        | {k: v for k, v in r["protocol"].items() if not is_of_machine(k)}
        for r in (first, other)
    )
    fields = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not fields and first["protocol_hash"] != other["protocol_hash"]:
        ours, theirs, fields = first, other, ["protocol_hash"]
    if fields:
        shown = "; ".join(f"{key} is {as_json(ours.get(key))} or {as_json(theirs.get(key))}" for key in fields)
        raise EraseError(
            f"'{first['name']}' and '{other['name']}' were measured differently: {shown}; "
            "evaluate both with one protocol"
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those that come again with a number."""
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


def _axes(compared: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The primary and the retention score, or nothing when results name no second one."""
    named = {score["name"]: score for score in compared["scores"]}
    names = {compared["primary"], compared["retention"]}
    return [named[compared["primary"]], named[compared["retention"]]] if len(names - {None}) == 2 else []


def _placed(compared: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(method, erasure, retention), turned so that more is better; methods that lack either are left out."""
    axes = _axes(compared)
    if not axes:
        return []
    signs = [1 if score["higher_is_better"] else -1 for score in axes]
    cells = zip(compared["methods"], *(score["rows"] for score in axes), strict=True)
    return [
        (method, signs[0] * x["erased"]["value"], signs[1] * y["erased"]["value"])
        for method, x, y in cells
        if x["erased"] and y["erased"]
    ]


def _pareto(compared: Mapping[str, Any]) -> str:
    axes = _axes(compared)
    if not axes:
        return ""
    x, y = axes
    points = [
        (method, interval_of(a["erased"]), interval_of(b["erased"]), method in compared["front"])
        for method, a, b in zip(compared["methods"], x["rows"], y["rows"], strict=True)
        if a["erased"] and b["erased"]
    ]
    return plots.pareto(
        points,
        (interval_of(x["base"]), interval_of(y["base"])) if x["base"] and y["base"] else None,
        titles=(x["title"], y["title"]),
        higher_is_better=(x["higher_is_better"], y["higher_is_better"]),
        are_rates=(_is_rate(x), _is_rate(y)),
    )


def _is_rate(score: Mapping[str, Any]) -> bool:
    return all(row["erased"]["k"] is not None for row in score["rows"] if row["erased"])


def _comparison_markdown(view: Mapping[str, Any]) -> str:
    columns = {
        "title": "method",
        "erased": "value",
        "difference": "against base",
        "n": "n",
        "p": "p",
        "p_holm": "p (Holm)",
    }
    lines = ["# Methods compared", escaped(view["subtitle"])]
    for table in view["tables"]:
        lines += [f"## {escaped(table['title'])}", escaped(f"{table['about']} Base model: {table['base']}.")]
        lines += [markdown_table(columns, table["rows"])]
    if view["pairs"]:
        titles = {"title": "score", "first": "first", "second": "second", "difference": "first minus second"}
        columns = titles | {key: columns[key] for key in ("n", "p", "p_holm")}
        lines += ["## Method against method", markdown_table(columns, view["pairs"])]
    lines += [escaped(f"Note: {warning}.") for warning in view["compared"]["warnings"]]
    if view["compared"]["front"]:
        lines.append(escaped("* no other method is better in both erasure and retention"))
    lines += ["## Protocol", markdown_facts(view["compared"]["protocol"])]
    return "\n\n".join(lines) + "\n"
