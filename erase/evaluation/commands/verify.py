"""`eval-concept verify`: whether images and scores are what was made."""

from pathlib import Path

from erase.commandline import Parser
from erase.errors import EraseError
from erase.evaluation.flags import judge_options, quiet_option
from erase.evaluation.judges import registry as judging
from erase.evaluation.parts import REGISTRIES, load_parts, part_options


def run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept verify",
        "Hash every image again, score some of them again, and compare with what is stored.",
        example="runs/images/circle --num 8",
    )
    parser.add_argument("folder", help="output folder of generate")
    parser.add_argument("--num", type=int, default=32, metavar="N", help="images to score again [default: %(default)s]")
    judge_options(parser)
    part_options(parser, *REGISTRIES)
    quiet_option(parser)
    given = parser.parse_args(arguments)
    if given.num < 1:
        raise EraseError(f"--num is {given.num}; it must be at least 1")
    from erase.evaluation import arm, score

    folder = Path(given.folder)
    load_parts(folder, given, *REGISTRIES)
    task, names = arm.manifest(folder)["task"], score.scored_by(folder)
    for name in names:
        score.identity(folder, name)  # before a module is imported because a file has its name
    sources = judging.sources(given.judge_model)
    judges = [judging.make(name, task, source=sources.get(name)) for name in names]
    problems = score.verify(folder, judges, given.num, quiet=given.quiet)
    for problem in problems[:20]:
        print(problem)
    num = len(arm.complete_records(folder))
    if problems:
        raise EraseError(f"{folder}: {len(problems)} problems in {num} images")
    again = f"{min(given.num, num)} got the same scores again from {', '.join(names)}" if names else "no scores yet"
    print(f"{folder}: {num} images are unchanged; {again}")
