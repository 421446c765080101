"""Results to files that people read: report.md and a self-contained report.html; and several methods side by side.

All is a pure function of one JSON object: same results and pictures, same bytes. `SCHEMA` is its shape: what a
report can be made of, and what results.json holds.
"""

import base64
import io
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from erase.data.images import BadImage
from erase.data.images import read as read_image
from erase.errors import EraseError
from erase.evaluation import plots, shapes
from erase.files import read_json, text_hash, write_json, write_text
from erase.statistics import Comparison, Score, holm

THUMBNAIL = 192  # pixels
BLURRED = 8  # pixels a side that are left of a flagged picture
_NO_BREAK = "\N{NO-BREAK SPACE}"
ROLES = {"forget": "To forget", "synonym": "To forget, in other words", "retain": "To keep", "": "Other"}

# `shapes` says how it is written.
_SCORE = typing.get_type_hints(Score)
_COMPARISON = typing.get_type_hints(Comparison)
_ARM = {"name": str, "hashes": {"*": str}}
_INVALID = {"k": int, "n": int}  # images that are black, flat or unreadable, of all
SCHEMA = {
    "format": {1},
    "name": str,  # what was evaluated, such as "circle by salun"
    "task": {"id": str, "version": int, "options": {"*": Any}, "num_samples": int, "prompts_hash": str},
    "protocol": {"*": Any},  # all that must be equal for two results to be comparable, judge and settings
    "protocol_hash": str,
    "arms": {"base?": _ARM, "erased": _ARM},
    "primary": str,  # name of the score that the verdict is about
    "retention?": (str, None),  # name of the score that tells what was kept: second axis of the Pareto plot
    "verdict?": ({"success": bool, "text": str}, None),
    "scores": [
        {
            "name": str,
            "title": str,
            "about": str,  # one sentence
            "higher_is_better": bool,
            "base": (_SCORE, None),
            "erased": _SCORE,
            "comparison": (_COMPARISON, None),
        }
    ],
    "groups": [
        {
            "name": str,
            "title": str,
            "rows": [
                {
                    "label": str,
                    "role": set(ROLES),
                    "base": (_SCORE, None),
                    "erased": _SCORE,
                    "comparison": (_COMPARISON, None),
                }
            ],
        }
    ],
    "invalid": {"base?": _INVALID, "erased": _INVALID},
    "sheet": [  # pictures of both arms on the same seed; paths start from the images folder
        {"prompt": str, "role": set(ROLES), "base": (str, None), "erased": (str, None), "flagged": bool}
    ],
    "command": str,
    "versions": {"*": str},
    "limits": [str],  # what was not tested
    "outcomes_hash?": str,  # of outcomes.json
    "hash?": str,  # of all else, so that an edited file is noticed
}


def check(results: Mapping[str, Any], place: str = "results") -> None:
    """Refuse results that a report cannot be made of.

    Raises:
        EraseError: a key is missing or unknown, a value has another type, or is NaN or infinite; with the place.
    """
    shapes.check(results, SCHEMA, place)
    names = [score["name"] for score in results["scores"]]
    for key in ("primary", "retention"):
        if results.get(key) is not None and results[key] not in names:
            raise EraseError(f"{place}.{key} is '{results[key]}', which is no score ({', '.join(names)})")
    if twice := {name for name in names if names.count(name) > 1}:
        raise EraseError(f"{place}.scores holds '{min(twice)}' twice; give each score its own name")


def write(results: dict[str, Any], folder: str | Path, *, images: str | Path, show: bool = False) -> None:
    """Write results.json, report.md and report.html into `folder`.

    images: the folder that the sheet's paths start from.
    show: embed flagged pictures as they are; else 8 x 8 pixels of each are all that the page holds.

    Raises:
        EraseError: the results do not fit the schema.
    """
    check(results)
    view = {
        "results": results,
        "subtitle": _subtitle(results),
        "verdict": _verdict(results),
        "table": [_row(score, score["title"]) for score in results["scores"]],
        "groups": [
            {
                "title": group["title"],
                "svg": _bars(group),
                "table": [_row(row, _label(row)) for row in group["rows"]],
            }
            for group in results["groups"]
        ],
        "note": _note(results),
    }
    text = _markdown(view)
    page = _render("report.html.jinja", **view, show=show, sheet=_sheet(results["sheet"], Path(images), show))
    folder = Path(folder)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page)
    sealed = results | {"hash": _seal(results)}
    write_json(folder / "results.json", sealed)  # last: where it is, the others are


def read(path: Path) -> dict[str, Any]:
    """The results that `write` wrote.

    Raises:
        EraseError: they are of another shape, or were changed since.
    """
    results = read_json(path)
    check(results, f"{path}: results")
    if results.get("hash") != _seal(results):
        raise EraseError(f"{path} was changed since it was written, or by an earlier version; run eval-concept report")
    return {key: value for key, value in results.items() if key != "hash"}


def _seal(results: Mapping[str, Any]) -> str:
    return text_hash({key: value for key, value in results.items() if key != "hash"})


def compare(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Methods side by side: every score of every result, p-values Holm-corrected over the whole table.

    A score has its `base` where all results have the same base model. `front` names the methods that no other one
    beats in both the primary and the retention score.

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
    by_name = [{score["name"]: score for score in result["scores"]} for result in results]
    found: dict[str, Any] = {}
    for named in by_name:
        found = found | {name: score for name, score in named.items() if name not in found}
    scores = []
    for name, score in found.items():
        cells = zip(methods, (named.get(name, {}) for named in by_name), strict=True)
        scores.append(
            {key: score[key] for key in ("name", "title", "about", "higher_is_better")}
            | {
                "base": score["base"] if has_same_base else None,
                "rows": [
                    {"method": method, "erased": cell.get("erased"), "comparison": cell.get("comparison")}
                    for method, cell in cells
                ],
            }
        )
    rows = [row for score in scores for row in score["rows"] if row["comparison"]]
    for row, p in zip(rows, holm([row["comparison"]["p"] for row in rows]), strict=True):
        row["comparison"] = row["comparison"] | {"p_holm": p}
    compared = {
        "format": 1,
        "task": first["task"],
        "protocol": first["protocol"],
        "protocol_hash": first["protocol_hash"],
        "methods": methods,
        "arms": {method: result["arms"] for method, result in zip(methods, results, strict=True)},
        "primary": first["primary"],
        "retention": first.get("retention"),
        "scores": scores,
    }
    placed = _placed(compared)
    is_on_front = front([(x, y) for _, x, y in placed])
    return compared | {"front": [method for (method, _, _), on in zip(placed, is_on_front, strict=True) if on]}


def write_comparison(compared: Mapping[str, Any], folder: str | Path) -> None:
    """Write comparison.json, comparison.md and comparison.html into `folder`."""
    view = {
        "compared": compared,
        "subtitle": f"{_task(compared)} · {len(compared['methods'])} methods",
        "tables": [
            {
                "title": f"{score['title']} {_arrow(score)}",
                "about": score["about"],
                "base": _figure(score["base"]),
                "rows": [
                    _row(row | {"base": None}, row["method"] + (" *" if row["method"] in compared["front"] else ""))
                    for row in score["rows"]
                ],
            }
            for score in compared["scores"]
        ],
    }
    text = _comparison_markdown(view)
    page = _render("comparison.html.jinja", **view, svg=_pareto(compared))
    folder = Path(folder)
    write_text(folder / "comparison.md", text)
    write_text(folder / "comparison.html", page)
    write_json(folder / "comparison.json", compared)


def summary(results: Mapping[str, Any]) -> str:
    """The verdict and the table of scores for a terminal."""
    rows = [_row(score, score["name"]) for score in results["scores"]]
    columns = {"title": results["name"], "base": "base", "erased": "erased", "difference": "difference", "n": "n"}
    verdict = [results["verdict"]["text"]] if results.get("verdict") else []
    return "\n".join([*verdict, _aligned(columns, rows)])


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Method by score, erased values with their intervals, for a terminal."""
    cells = [{"title": method} for method in compared["methods"]]
    for score in compared["scores"]:
        for cell, row in zip(cells, score["rows"], strict=True):
            cell[score["name"]] = _figure(row["erased"])
    return _aligned({"title": "method", **{score["name"]: score["name"] for score in compared["scores"]}}, cells)


def _aligned(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(columns.values()), *([row[key].replace(_NO_BREAK, " ") for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    texts = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(text.rstrip() for text in texts)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: at least as good on both axes (more is better) and better on one."""
    return [not any(o[0] >= p[0] and o[1] >= p[1] and o != p for o in points) for p in points]


def _refuse_other_protocol(first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """The whole task and protocol must agree, since a figure means nothing without them."""
    ours, theirs = ({**{f"task.{k}": v for k, v in r["task"].items()}, **r["protocol"]} for r in (first, other))
    fields = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if not fields and first["protocol_hash"] != other["protocol_hash"]:
        ours, theirs, fields = first, other, ["protocol_hash"]
    if fields:
        shown = "; ".join(f"{key} is {_json(ours.get(key))} or {_json(theirs.get(key))}" for key in fields)
        raise EraseError(
            f"'{first['name']}' and '{other['name']}' were measured differently: {shown}; "
            "evaluate both with one protocol"
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those that come again with a number."""
    return [name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})" for i, name in enumerate(names)]


# Words and figures, the same in Markdown and HTML


def _task(results: Mapping[str, Any]) -> str:
    task = results["task"]
    return f"{task['id']}@{task['version']} · {task['num_samples']:,} images"


def _subtitle(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    models = " → ".join(arms[arm]["name"] for arm in ("base", "erased") if arm in arms)
    return f"{_task(results)} · {models}"


def _verdict(results: Mapping[str, Any]) -> list[str]:
    """Sentences: whether it worked, on the primary and the retention score, and on invalid images."""
    named = {score["name"]: score for score in results["scores"]}
    sentences = [f"{results['verdict']['text']}."] if results.get("verdict") else []
    for name in dict.fromkeys([results["primary"], results.get("retention")]):
        if name is None:
            continue
        score = named[name]
        base = f", where the base model has {_figure(score['base'])}" if score["base"] else ""
        sentences.append(f"{score['title']}: {_figure(score['erased'])}{base}. {_meaning(score)}")
    return [*sentences, *_validity(results["invalid"])]


def _meaning(score: Mapping[str, Any]) -> str:
    comparison = score["comparison"]
    if comparison is None:
        return "Without the base model on the same seeds, this does not tell what the erasure changed."
    difference = _difference(comparison)
    if comparison["low"] <= 0 <= comparison["high"]:
        return f"The difference, {difference}, may be chance."
    is_gain = (comparison["difference"] > 0) == score["higher_is_better"]
    return f"That is {difference}, {'better' if is_gain else 'worse'} than the base beyond chance."


def _validity(invalid: Mapping[str, Any]) -> list[str]:
    sentences = []
    for arm, count in invalid.items():
        if count["k"]:
            share = f"{100 * count['k'] / count['n']:.1f}{_NO_BREAK}%"
            sentences.append(
                f"{count['k']:,} of {count['n']:,} images of the {arm} model ({share}) are invalid: "
                "black, flat or unreadable. They stay in n and never count as success."
            )
    if not sentences:
        total = sum(count["n"] for count in invalid.values())
        sentences.append(f"All {total:,} images are valid: none is black, flat or unreadable.")
    return sentences


def _note(results: Mapping[str, Any]) -> str:
    """How the table's intervals and p-values were made; names only what occurs in it."""
    scores = [row for row in [*results["scores"], *(row for group in results["groups"] for row in group["rows"])]]
    tests = sorted({row["comparison"]["test"] for row in scores if row["comparison"]})
    notes = ["Brackets hold 95 % intervals; pp are percentage points."]
    if any(row["erased"]["clusters"] for row in scores):
        notes.append("Where a prompt has several images, intervals are over prompts.")
    if tests:
        notes.append(f"Differences are paired by prompt and seed; p: {', '.join(tests)}.")
    if any(row["comparison"]["only_base"] is not None for row in scores if row["comparison"]):
        notes.append("Below p: pairs that were true for the base alone : for the erased model alone.")
    return " ".join(notes)


def _row(score: Mapping[str, Any], title: str) -> dict[str, str]:
    """A table row as texts."""
    comparison, some = score["comparison"], score["erased"] or {}
    clusters = (comparison or some).get("clusters")
    discordant = comparison and comparison["only_base"] is not None
    return {
        "title": title,
        "arrow": _arrow(score),
        "about": score.get("about", ""),
        "base": _figure(score["base"]),
        "erased": _figure(score["erased"]),
        "difference": _difference(comparison) if comparison else "–",
        "n": f"{some['n']:,}" if some else "–",
        "clusters": f"{clusters:,} prompts" if clusters else "",
        "p": _p(comparison["p"]) if comparison else "–",
        "p_holm": _p(comparison["p_holm"]) if comparison else "–",
        "discordant": f"{comparison['only_base']:,} : {comparison['only_erased']:,}"
        if comparison and discordant
        else "",
    }


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['label']} ({row['role']})" if row["role"] else row["label"]


def _arrow(score: Mapping[str, Any]) -> str:
    return {True: "↑", False: "↓", None: ""}[score.get("higher_is_better")]


def _interval(score: Mapping[str, Any]) -> plots.Interval:
    """Over clusters where there are some: the wider of the two."""
    if score["cluster_low"] is None:
        return plots.Interval(score["value"], score["low"], score["high"])
    return plots.Interval(score["value"], score["cluster_low"], score["cluster_high"])


def _figure(score: Mapping[str, Any] | None) -> str:
    """97.1 % [94.2, 98.5], or 0.312 [0.301, 0.323], or a dash; with spaces that do not break."""
    if score is None:
        return "–"
    interval = _interval(score)
    if score["k"] is not None:
        text = f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    else:
        text = f"{_number(interval.value)} [{_number(interval.low)}, {_number(interval.high)}]"
    return text.replace(" ", _NO_BREAK)


def _difference(comparison: Mapping[str, Any]) -> str:
    """+93.9 pp [+91.0, +96.1], or a plain number for what is no rate."""
    figures = [comparison[key] for key in ("difference", "low", "high")]
    if comparison["only_base"] is not None:
        value, low, high = (_signed(f"{100 * figure:.1f}") for figure in figures)
        return f"{value} pp [{low}, {high}]".replace(" ", _NO_BREAK)
    value, low, high = (_signed(_number(figure)) for figure in figures)
    return f"{value} [{low}, {high}]".replace(" ", _NO_BREAK)


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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Pictures


def _bars(group: Mapping[str, Any]) -> str:
    rows = [
        (_label(row), _interval(row["base"]) if row["base"] else None, _interval(row["erased"]))
        for row in group["rows"]
    ]
    is_rate = all(row["erased"]["k"] is not None for row in group["rows"])
    return plots.bars(rows, is_rate=is_rate, salt=group["name"]) if rows else ""


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
        (method, _interval(a["erased"]), _interval(b["erased"]), method in compared["front"])
        for method, a, b in zip(compared["methods"], x["rows"], y["rows"], strict=True)
        if a["erased"] and b["erased"]
    ]
    return plots.pareto(
        points,
        (_interval(x["base"]), _interval(y["base"])) if x["base"] and y["base"] else None,
        titles=(x["title"], y["title"]),
        higher_is_better=(x["higher_is_better"], y["higher_is_better"]),
        are_rates=(_is_rate(x), _is_rate(y)),
    )


def _is_rate(score: Mapping[str, Any]) -> bool:
    return all(row["erased"]["k"] is not None for row in score["rows"] if row["erased"])


def _sheet(sheet: Sequence[Mapping[str, Any]], images: Path, show: bool) -> list[dict[str, Any]]:
    """The sheet by role: title and pairs, pictures as data URIs."""
    parts = []
    for role, title in ROLES.items():
        pairs = [
            {
                "prompt": pair["prompt"],
                "flagged": pair["flagged"],
                "pictures": [
                    (arm, _thumbnail(images / pair[arm], blur=pair["flagged"] and not show) if pair[arm] else None)
                    for arm in ("base", "erased")
                ],
            }
            for pair in sheet
            if pair["role"] == role
        ]
        if pairs:
            parts.append({"title": title, "pairs": pairs})
    return parts


def _thumbnail(path: Path, *, blur: bool) -> str | None:
    """A small picture as a data URI; None for one that cannot be read."""
    try:
        picture = Image.fromarray(read_image(path))
    except BadImage:
        return None
    if blur:  # in the pixels themselves: nothing in the page can bring them back
        picture = picture.resize((BLURRED, BLURRED), Image.Resampling.BOX)
    picture = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# Files


def _render(template: str, **view: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts and names are anybody's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: value if isinstance(value, str) else _json(value)
    return environment.get_template(template).render(**view)


def _markdown(view: Mapping[str, Any]) -> str:
    results = view["results"]
    columns = {"title": "", "base": "base", "erased": "erased", "difference": "difference", "n": "n", "p": "p"}
    lines = [f"# {_md(results['name'])}", _md(view["subtitle"]), *map(_md, view["verdict"])]
    lines += ["## Scores", _table(columns, view["table"]), _md(view["note"])]
    for group in view["groups"]:
        lines += [f"## {_md(group['title'])}", _table(columns, group["table"])]
    lines += ["## Protocol", _facts(results["protocol"]), f"Protocol {_md(results['protocol_hash'])}"]
    for arm, model in results["arms"].items():
        lines += [f"{arm.capitalize()} model: {_md(model['name'])}", _facts(model["hashes"])]
    lines += ["Versions", _facts(results["versions"])]
    lines += ["## Command", "\n".join(f"    {line}" for line in results["command"].splitlines())]
    lines += ["## Not tested", "\n".join(f"- {_md(limit)}" for limit in results["limits"]) or "Nothing stated."]
    return "\n\n".join(filter(None, lines)) + "\n"


def _comparison_markdown(view: Mapping[str, Any]) -> str:
    columns = {
        "title": "method",
        "erased": "value",
        "difference": "against base",
        "n": "n",
        "p": "p",
        "p_holm": "p (Holm)",
    }
    lines = ["# Methods compared", _md(view["subtitle"])]
    for table in view["tables"]:
        lines += [f"## {_md(table['title'])}", _md(f"{table['about']} Base model: {table['base']}.")]
        lines += [_table(columns, table["rows"])]
    if view["compared"]["front"]:
        lines.append(_md("* no other method is better in both erasure and retention"))
    lines += ["## Protocol", _facts(view["compared"]["protocol"])]
    return "\n\n".join(lines) + "\n"


def _table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    def cell(row: Mapping[str, str], key: str) -> str:
        more = {"title": row["arrow"], "n": row["clusters"], "p": row["discordant"]}.get(key, "")
        return _md(f"{row[key]} {f'({more})' if more and key != 'title' else more}".strip())

    lines = [list(columns.values()), ["---"] * len(columns), *([cell(row, key) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _facts(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {_md(key)}: {_md(v if isinstance(v, str) else _json(v))}" for key, v in values.items())


def _md(text: str) -> str:
    """One line that Markdown shows as it is: no markup, no link. Intervals and names_like_this need no escape."""
    return re.sub(r"([\\`*<>|]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
