"""`eval-concept report`: figures from the scores."""

from pathlib import Path

from erase.commandline import Parser
from erase.evaluation.commands.ending import require, typed
from erase.evaluation.flags import report_options
from erase.evaluation.parts import REGISTRIES, load_parts, part_options


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept report",
        "Compute figures and tables from stored scores. Nothing is generated or judged.",
        example="runs/images/circle --base runs/images/mini",
    )
    parser.add_argument("folder", help="scored folder of the erased model")
    parser.add_argument("--base", metavar="DIR", help="scored folder of the base model, same task")
    parser.add_argument(
        "--gold", metavar="PATH", help="scored folder, or features file, of the model trained without the concept"
    )
    parser.add_argument("--real", metavar="PATH", help="scored folder, or features file, of real images")
    parser.add_argument("--output", metavar="DIR", help="folder of the report [default: folder]")
    parser.add_argument("--name", help="name of the erased model in the report [default: the folder's name]")
    part_options(parser, *REGISTRIES)
    report_options(parser)
    given = parser.parse_args(arguments)
    from erase.evaluation import arm, between, evaluate, expected, gate, score

    folder = Path(given.folder)
    load_parts(folder, given, *REGISTRIES)
    others = {role: Path(path) for role, path in vars(given).items() if role in {"base", "gold", "real"} and path}
    if given.require:
        roles = {role: role in others for role in ("base", "gold", "real")}
        task, judges = arm.manifest(folder)["task"], score.judges(folder)
        dimension = between.dimension(folder) if "features" in judges else None
        known = expected.scores(task, arm.samples(folder), judges, **roles, dimension=dimension)
        gate.check_rules(given.require, [known], has_base=roles["base"])
    output, name = Path(given.output or folder), given.name or folder.resolve().name
    results = evaluate.write_report(folder, others, output, name, typed(), show=given.show)
    require([results], given.require)
