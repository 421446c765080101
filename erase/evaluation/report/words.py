"""Figures, differences and verdicts as texts, the same in Markdown, in HTML and on a terminal."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from erase.evaluation.report import plots
from erase.statistics import FEW_VALUES, ONE_PROMPT

NO_BREAK = "\N{NO-BREAK SPACE}"


def aligned(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(columns.values()), *([row[key].replace(NO_BREAK, " ") for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(text.rstrip() for text in texts)


# Words and figures, the same in Markdown and HTML
def task_line(results: Mapping[str, Any]) -> str:
    task = results["task"]
    return f"{task['id']}@{task['version']} · {task['num_samples']:,} images"


def subtitle(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    models = " → ".join(arms[arm]["name"] for arm in ("base", "erased") if arm in arms)
    return f"{task_line(results)} · {models}"


def verdict_sentences(results: Mapping[str, Any]) -> list[str]:
    """Sentences: whether it worked, on the primary and the retention score, and on invalid images."""
    named = {score["name"]: score for score in results["scores"]}
    sentences = [f"{results['verdict']['text']}."] if results.get("verdict") else []
    for name in dict.fromkeys([results["primary"], results.get("retention")]):
        if name is None:
            continue
        score = named[name]
        base = f", where the base model has {figure_text(score['base'])}" if score["base"] else ""
        gold = f" and the model trained without the concept {figure_text(score['gold'])}" if score.get("gold") else ""
        sentences.append(f"{score['title']}: {figure_text(score['erased'])}{base}{gold}. {_meaning(score)}")
    return [*sentences, *_validity(results["invalid"])]


def _meaning(score: Mapping[str, Any]) -> str:
    comparison = score["comparison"]
    if comparison is None:
        return "There is no base model on the same seeds, so this does not show what the erasure changed."
    difference = _difference(comparison)
    if comparison["low"] is None:
        return f"The difference is {difference}: without an interval it may be chance."
    if comparison["low"] <= 0 <= comparison["high"]:
        return f"The difference, {difference}, is not statistically significant."
    is_gain = (comparison["difference"] > 0) == score["higher_is_better"]
    return (
        f"The difference, {difference}, is statistically significant: {'better' if is_gain else 'worse'} than the base."
    )


def _validity(invalid: Mapping[str, Any]) -> list[str]:
    sentences = []
    for arm, count in invalid.items():
        if count["k"]:
            share = f"{100 * count['k'] / count['n']:.1f}{NO_BREAK}%"
            sentences.append(
                f"{count['k']:,} of {count['n']:,} images of the {arm} model ({share}) are invalid: "
                "black, flat or unreadable. They stay in n and never count as success."
            )
    if not sentences:
        total = sum(count["n"] for count in invalid.values())
        sentences.append(f"All {total:,} images are valid: none is black, flat or unreadable.")
    return sentences


def table_note(results: Mapping[str, Any]) -> str:
    """How the table's intervals and p-values were made; names only what occurs in it."""
    scores = [row for row in [*results["scores"], *(row for group in results["groups"] for row in group["rows"])]]
    tests = sorted({row["comparison"]["test"] for row in scores if row["comparison"]})
    notes = ["Brackets hold 95 % intervals; pp are percentage points."]
    if any(row["erased"]["clusters"] for row in scores):
        notes.append(
            "Where a prompt has several images, intervals are over prompts; ICC is the observed intraclass correlation "
            "of the images of a prompt, for which the intervals use at least 0.3."
        )
    intervals = [figure["interval"] for row in scores for figure in (row["erased"], row["comparison"]) if figure]
    if any(ONE_PROMPT in interval for interval in intervals):
        notes.append('"This prompt only": the interval says nothing about other prompts.')
    if any(FEW_VALUES in interval for interval in intervals):
        notes.append("A mean that is 0 for all but a few prompts has no reliable interval; see the rates.")
    if tests:
        notes.append(f"Differences are paired by prompt and seed; p: {', '.join(tests)}.")
    if any(row["comparison"]["only_base"] is not None for row in scores if row["comparison"]):
        notes.append("Below p: number of pairs that count for the base only : for the erased model only.")
    return " ".join(notes)


def table_row(score: Mapping[str, Any], title: str) -> dict[str, str]:
    """A table row as texts."""
    comparison, some = score["comparison"], score["erased"] or {}
    clusters = (comparison or some).get("clusters")
    discordant = comparison and comparison["only_base"] is not None
    return {
        "title": title,
        "arrow": arrow(score),
        "about": score.get("about", ""),
        "base": figure_text(score["base"]),
        "erased": figure_text(score["erased"]),
        "gold": figure_text(score.get("gold")),
        "difference": _difference(comparison) if comparison else "–",
        "n": f"{some['n']:,}" if some else "–",
        "clusters": _prompts(clusters, some.get("icc")) if clusters else "",
        "p": _p(comparison["p"]) if comparison else "–",
        "p_holm": _p(comparison["p_holm"]) if comparison else "–",
        "discordant": f"{comparison['only_base']:,} : {comparison['only_erased']:,}"
        if comparison and discordant
        else "",
    }


def pair_row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table of method against method as texts."""
    found = table_row({"base": None, "erased": None, "comparison": row["comparison"]}, row["title"])
    return found | {"first": row["first"], "second": row["second"], "n": f"{row['comparison']['n']:,}"}


def columns_of(results: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Columns of a table with one for the model trained without the concept, behind the erased one, if there is one."""
    titles = {"erased": {"erased": columns["erased"], "gold": "retrained"}} if "gold" in results["arms"] else {}
    found: dict[str, str] = {}
    for key, title in columns.items():
        found |= titles.get(key, {key: title})
    return found


def row_label(row: Mapping[str, Any]) -> str:
    return f"{row['label']} ({row['role']})" if row["role"] else row["label"]


def arrow(score: Mapping[str, Any]) -> str:
    return {True: "↑", False: "↓", None: ""}[score.get("higher_is_better")]


def _prompts(number: int, icc: float | None) -> str:
    """24 prompts, ICC 0.31."""
    return f"{number:,} prompt{'s' * (number > 1)}" + ("" if icc is None else f", ICC {icc:.2f}")


def interval_of(score: Mapping[str, Any]) -> plots.Interval:
    """The value and its interval, if it has one."""
    return plots.Interval(score["value"], score["low"], score["high"])


def figure_text(score: Mapping[str, Any] | None) -> str:
    """97.1 % [94.2, 98.5], or 0.312 [0.301, 0.323], or a dash; with spaces that do not break."""
    if score is None:
        return "–"
    is_rate = score["k"] is not None
    value, low, high = (
        None if figure is None else f"{100 * figure:.1f}" if is_rate else _number(figure)
        for figure in (score["value"], score["low"], score["high"])
    )
    return f"{value}{' %' * is_rate} {_brackets(low, high, score['interval'])}".replace(" ", NO_BREAK)


def _brackets(low: str | None, high: str | None, interval: str) -> str:
    """[94.2, 98.5], with what limits the interval; [cannot tell] where there is none."""
    if low is None or high is None:
        return "[cannot tell]"
    limits = (f" ({text.split(':')[0]})" for text in (ONE_PROMPT, FEW_VALUES) if text in interval)
    return f"[{low}, {high}]{''.join(limits)}"


def _difference(comparison: Mapping[str, Any]) -> str:
    """+93.9 pp [+91.0, +96.1], or a plain number for what is no rate."""
    is_rate = comparison["only_base"] is not None
    value, low, high = (
        None if figure is None else _signed(f"{100 * figure:.1f}" if is_rate else _number(figure))
        for figure in (comparison[key] for key in ("difference", "low", "high"))
    )
    return f"{value}{' pp' * is_rate} {_brackets(low, high, comparison['interval'])}".replace(" ", NO_BREAK)


def _number(value: float) -> str:
    """Three digits that count."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return "0" if value == 0 else text


def _signed(number: str) -> str:
    """With a plus or a typographic minus; nothing before a zero."""
    if not re.search("[1-9]", number):
        return number.lstrip("-")
    return number.replace("-", "−", 1) if number.startswith("-") else f"+{number}"


def _p(p: float | None) -> str:
    if p is None:
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 0.9995 else "1"


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
