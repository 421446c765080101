"""Markdown of a report and of its parts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from erase.evaluation.report.words import as_json, columns_of


def report_markdown(view: Mapping[str, Any]) -> str:
    results = view["results"]
    titles = {"title": "", "base": "base", "erased": "erased", "difference": "difference", "n": "n", "p": "p"}
    columns = columns_of(results, titles)
    lines = [f"# {escaped(results['name'])}", escaped(view["subtitle"]), *map(escaped, view["verdict"])]
    lines += ["## Scores", markdown_table(columns, view["table"]), escaped(view["note"])]
    for group in view["groups"]:
        lines += [f"## {escaped(group['title'])}", markdown_table(columns, group["table"])]
    lines += ["## Protocol", markdown_facts(results["protocol"]), f"Protocol {escaped(results['protocol_hash'])}"]
    for arm, model in results["arms"].items():
        lines += [f"{arm.capitalize()} model: {escaped(model['name'])}", markdown_facts(model["hashes"])]
    lines += ["Versions", markdown_facts(results["versions"])]
    lines += ["## Command", "\n".join(f"    {line}" for line in results["command"].splitlines())]
    lines += ["## Not tested", "\n".join(f"- {escaped(limit)}" for limit in results["limits"]) or "Nothing stated."]
    return "\n\n".join(filter(None, lines)) + "\n"


def markdown_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    def cell(row: Mapping[str, str], key: str) -> str:
        more = {"title": row["arrow"], "n": row["clusters"], "p": row["discordant"]}.get(key, "")
        return escaped(f"{row[key]} {f'({more})' if more and key != 'title' else more}".strip())

    lines = [list(columns.values()), ["---"] * len(columns), *([cell(row, key) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_facts(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {escaped(key)}: {escaped(v if isinstance(v, str) else as_json(v))}" for key, v in values.items()
    )


def escaped(text: str) -> str:
    """One line that Markdown shows as it is: no markup, no link. Intervals and names_like_this need no escape."""
    return re.sub(r"([\\`*<>|]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
