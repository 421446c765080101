"""`eval-concept compare`: several reports in one table."""

from pathlib import Path
from typing import Any

from erase.commandline import Parser
from erase.evaluation.commands.ending import note


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept compare",
        "Put several reports into one table. Reports of different protocols are refused.",
        example="runs/evaluation/circle/mini runs/evaluation/esd/mini --output runs/compared",
    )
    parser.add_argument(
        "reports", nargs="+", help="report folders; several LABEL=DIR with one label are pooled over erasure seeds"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the comparison")
    given = parser.parse_args(arguments)
    from erase.evaluation.report import compare, pool

    runs: dict[str, list[Any]] = {}
    for text in given.reports:
        folder, label = _labelled(text)
        results = pool.read(folder, note)
        runs.setdefault(label or results[0]["name"], []).append(results)
    pooled = [pool.pool(found, label) for label, found in runs.items()]
    compared = compare.compare(pooled, [[outcomes for _, outcomes in found] for found in runs.values()])
    compare.write_comparison(compared, Path(given.output))
    for warning in compared["warnings"]:
        note(warning)
    print(compare.comparison_table(compared))
    print(f"{Path(given.output) / 'comparison.html'}: written")


def _labelled(text: str) -> tuple[Path, str | None]:
    label, equals, folder = text.partition("=")
    return (Path(folder), label) if equals and not Path(text).exists() else (Path(text), None)
