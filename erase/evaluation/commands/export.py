"""`eval-concept export`: outcomes as a table, and figures in a model card."""

from pathlib import Path

from erase.commandline import Parser
from erase.errors import EraseError
from erase.evaluation.commands.ending import note


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept export",
        "Write every outcome of a report as a table (one row per image and score), or its figures into a model card.",
        example="runs/evaluation/circle/mini --output circle.csv --card runs/circle/README.md",
    )
    parser.add_argument("report", help="report folder")
    parser.add_argument("--output", metavar="FILE", help="table to write, .csv or .parquet")
    parser.add_argument("--card", metavar="FILE", help="README.md to whose header the figures are added (model-index)")
    given = parser.parse_args(arguments)
    if not (given.output or given.card):
        raise EraseError("nothing to write: give --output FILE, --card README.md or both")
    from erase.evaluation.report import model_index, pool, table_file

    results, outcomes = pool.read(Path(given.report), note)
    if given.card:
        num = model_index.write_to_card(given.card, results)
        print(f"{given.card}: {num:,} scores in its header")
    if given.output:
        num = table_file.write_table(given.output, results, outcomes)
        print(f"{given.output}: {num:,} rows written")
