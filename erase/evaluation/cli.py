"""`eval-concept`: images, scores, reports; every stage is also a command of its own and continues where it stopped."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erase import __version__, concepts
from erase.commandline import Command, Parser, add_options, serve, silence_libraries
from erase.errors import EraseError
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.flags import (
    DRAWING,
    concept_options,
    judge_options,
    notes_of,
    options_of,
    quiet_option,
    rank_and_world,
    report_options,
    task_options,
)
from erase.evaluation.judges import registry as judging
from erase.evaluation.options import AttackOptions, Drawing, Options
from erase.evaluation.parts import REGISTRIES, load_parts, part_options
from erase.evaluation.tasks.registry import TASKS

DESCRIPTION = """\
Evaluate concept erasure: generate images with the base and the erased model for the same prompts and seeds, judge
them, and report the figures with intervals."""
EPILOG = """\
commands (each has its own --help):
  run       generate, score and report: an erased model and its base
  attack    attack a model and report how often the concept comes back
  generate  generate the images of one model
  score     store the judges' raw outputs for generated images
  report    compute the figures from the scores
  compare   put several reports into one table
  export    write outcomes as a table, or figures into a model card
  verify    hash all images and score some of them again
  list      show all tasks, judges and attacks

examples:
  eval-concept run --model runs/circle --task mini
  eval-concept run --model runs/nudity --task i2p --subset sexual
  eval-concept run --model runs/circle --task mini --require 'mini.ua>=0.95' --require 'mini.ra_drop<=0.03'
  eval-concept compare runs/evaluation/circle/mini runs/evaluation/esd/mini --output runs/compared
  eval-concept run --model mini --concept circle --task mini --guard sld-strong
  eval-concept run --model runs/nudity --task prompts --prompts my_prompts.csv --judge nudenet
  eval-concept attack --model runs/circle --attack learnt-word --require 'attack.learnt-word<=0.1'
  eval-concept run --task images --images my_images --judge nudenet
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exit code 0: done; 2: an error that the user can mend; 3: a rule not met; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    silence_libraries(quiet="--quiet" in arguments)
    serve("eval-concept", COMMANDS, _no_command, arguments, interrupted="interrupted; the same command continues")


def _no_command(arguments: list[str]) -> None:
    """--help, --version, or an error that names the commands."""
    parser = Parser("eval-concept", DESCRIPTION, epilog=EPILOG, usage="eval-concept COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"eval-concept {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
    given = parser.parse_args(arguments)
    problem = f"unknown command {given.command!r}" if given.command else "no command given"
    parser.error(f"{problem}; choose {', '.join(COMMANDS)}")


def _generate(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept generate",
        "Generate the images of a task with one model. For several GPUs start it with accelerate launch.",
        example="--model runs/circle --task mini --num-images 2 --output runs/images/circle",
    )
    parser.add_argument("--model", required=True, help="'mini', a diffusers or run folder, a hub id or a checkpoint")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the images")
    task_options(parser)
    quiet_option(parser)
    given = parser.parse_args(arguments)
    options, drawing = options_of(Options, given), options_of(Drawing, given)
    from erase.evaluation import generate, sources

    concept = sources.concept_of(given.concept, given.kind, given.model)
    task = sources.make_task(given.task, options, concept, given.model)
    notes_of(given)(task.note)
    model = sources.source_of(given.model, drawing, sources.make_guard(drawing, concept)).load(drawing)
    for line in model.notes:
        notes_of(given)(line)
    rank, world = rank_and_world(given)
    generate.generate(
        model,
        task,
        Path(given.output),
        steps=drawing.num_inference_steps,
        guidance=drawing.guidance_scale,
        resolution=drawing.resolution,
        batch_size=drawing.generation_batch_size,
        rank=rank,
        world=world,
        quiet=given.quiet or rank > 0,
    )
    print(f"{given.output}: {task.id}, {len(task.samples)} samples, part {rank + 1} of {world} generated")


def _score(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept score",
        "Judge generated images, or any folder of images, and store the raw outputs.",
        example="runs/images/circle",
    )
    parser.add_argument("folder", nargs="?", help="output folder of generate")
    parser.add_argument("--images", metavar="DIR", help="any folder of images instead; needs --judge and --output")
    judge_options(parser, "those of the task")
    part_options(parser, "task")
    concept_options(parser)
    add_options(parser, Options, {"features": "KID and FID of --images"})
    parser.add_argument("--output", metavar="DIR", help="folder for the scores of --images")
    parser.add_argument(
        "--device", default="cpu", help="device of the judges classifier, clip, clip-score and features [default: cpu]"
    )
    quiet_option(parser)
    given = parser.parse_args(arguments)
    if bool(given.folder) == bool(given.images) or given.images and not (given.judge and given.output):
        raise EraseError("give an output folder of eval-concept generate, or --images DIR with --judge and --output")
    from erase.device import choose
    from erase.evaluation import arm, own_images, score

    where = str(choose(given.device, "fp32").device)
    folder = Path(given.output or given.folder)
    if given.images:
        wanted = concepts.find(given.concept, given.kind) if given.concept else None
        options = own_images.judged(wanted, options_of(Options, given).features)
        task = {"id": "images", "options": options}
    else:
        load_parts(folder, given, "task")
        options, task = {}, arm.manifest(folder)["task"]
    names = list(dict.fromkeys(given.judge or task.get("judges", [])))
    if not names:
        raise EraseError(f"the task {task['id']} has no judges of its own; choose some with --judge")
    sources = judging.sources(given.judge_model)
    judges = [judging.make(name, task, source=sources.get(name), device=where) for name in names]
    if given.images:
        arm.adopt(Path(given.images), folder, options)
    for judge in judges:
        score.score(folder, judge, quiet=given.quiet)
        print(f"{score.score_file(folder, judge.name, '.jsonl')}: {len(score.load(folder, judge.name))} images scored")


def _report(arguments: list[str]) -> None:
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
    results = evaluate.write_report(folder, others, output, name, _command(), show=given.show)
    _gate([results], given.require)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _gate(results: Sequence[dict[str, Any]], requirements: Sequence[str]) -> None:
    from erase.evaluation import gate

    failures = gate.unmet_of_all(results, requirements)
    for line in failures:
        print(f"eval-concept: {line}", file=sys.stderr)
    if failures:
        raise SystemExit(3)


def _run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept run",
        "Generate, score and report: erased models and their base. Finished work is skipped.",
        example="--model runs/circle --task mini --num-images 2",
    )
    parser.add_argument("--model", "--models", dest="models", nargs="+", default=[], help="run folders or any models")
    parser.add_argument("--base", help="base model [default: the one in run.json]")
    parser.add_argument("--gold", help="model trained without the concept; the report adds the distance to it")
    parser.add_argument("--real", metavar="PATH", help="folder of real images, or a features file, for KID and FID")
    parser.add_argument(
        "--base-images", metavar="DIR", help="for the task images: the base model's images, with the same file names"
    )
    parser.add_argument(
        "--output", default="runs/evaluation", metavar="DIR", help="folder of images and reports [default: %(default)s]"
    )
    judge_options(parser, "those of the task; the tasks prompts and images have none")
    task_options(parser, several=True)
    report_options(parser)
    quiet_option(parser)
    given = parser.parse_args(arguments)
    options, drawing = options_of(Options, given), options_of(Drawing, given)
    if rank_and_world(given)[1] > 1:
        raise EraseError(
            "eval-concept run takes one process; for several use eval-concept generate, then score and report"
        )
    has_images = given.tasks == ["images"]
    if has_images == bool(given.models):
        raise EraseError("give --model MODEL, or --task images with --images DIR and no other task")
    if has_images != bool(options.images):
        raise EraseError("--images DIR and --task images need each other, without any other task")
    if (drawing.delta or drawing.unet) and len(given.models) > 1:
        raise EraseError(f"--{'delta' if drawing.delta else 'unet'} takes one --model, not several")
    from erase.evaluation import evaluate

    request = evaluate.Request(
        models=given.models,
        tasks=given.tasks,
        output=Path(given.output),
        options=options,
        drawing=drawing,
        concept=given.concept,
        kind=given.kind,
        base=given.base,
        gold=given.gold,
        real=given.real,
        base_images=given.base_images,
        judges=list(dict.fromkeys(given.judge)),
        judge_models=given.judge_model,
        require=given.require,
        show=given.show,
        quiet=given.quiet,
        command=_command(),
    )
    results = [evaluate.run_images(request, print)] if has_images else evaluate.run(request, print, notes_of(given))
    _gate(results, given.require)


def _compare(arguments: list[str]) -> None:
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
        results = pool.read(folder, _note)
        runs.setdefault(label or results[0]["name"], []).append(results)
    pooled = [pool.pool(found, label) for label, found in runs.items()]
    compared = compare.compare(pooled, [[outcomes for _, outcomes in found] for found in runs.values()])
    compare.write_comparison(compared, Path(given.output))
    for warning in compared["warnings"]:
        _note(warning)
    print(compare.comparison_table(compared))
    print(f"{Path(given.output) / 'comparison.html'}: written")


def _export(arguments: list[str]) -> None:
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

    results, outcomes = pool.read(Path(given.report), _note)
    if given.card:
        num = model_index.write_to_card(given.card, results)
        print(f"{given.card}: {num:,} scores in its header")
    if given.output:
        num = table_file.write_table(given.output, results, outcomes)
        print(f"{given.output}: {num:,} rows written")


def _note(text: str) -> None:
    print(f"eval-concept: {text}", file=sys.stderr)


def _labelled(text: str) -> tuple[Path, str | None]:
    label, equals, folder = text.partition("=")
    return (Path(folder), label) if equals and not Path(text).exists() else (Path(text), None)


def _verify(arguments: list[str]) -> None:
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


def _list(arguments: list[str]) -> None:
    Parser("eval-concept list", "Show all tasks, judges and attacks, also those of other packages.").parse_args(
        arguments
    )
    parts = {
        "tasks": {f"{name}@{TASKS.load(name).version}": TASKS.load(name).about for name in TASKS.names()},
        "judges": {name: judging.JUDGES.load(name).about for name in judging.JUDGES.names()},
        "attacks": {name: ATTACKS.load(name).about for name in ATTACKS.names()},
    }
    for kind, lines in parts.items():
        print(f"{kind}:")
        for name, about in lines.items():
            print(f"  {name:16} {about}")


def _attack(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept attack",
        "Attack an erased model, its base and optionally a retrained model; report how often the concept comes back.",
        example="--model runs/circle --attack learnt-word --quick",
    )
    parser.add_argument("--model", required=True, help="run folder, or any model with --base")
    parser.add_argument(
        "--attack", "--attacks", dest="attacks", nargs="+", required=True, help=f"attacks: {', '.join(ATTACKS.names())}"
    )
    parser.add_argument("--base", help="base model [default: the one in run.json]")
    parser.add_argument(
        "--retrained", "--gold", dest="gold", metavar="MODEL", help="model trained without the concept, also attacked"
    )
    parser.add_argument(
        "--budget", type=int, nargs="+", default=[], metavar="N",
        help="budgets, in steps, after which images are generated; one number N means 0, 25, 50 and 100 %% of N "
             "[default: the attack's own]",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="runs/attacks", metavar="DIR", help="folder of images and reports [default: %(default)s]"
    )
    parser.add_argument("--judge", metavar="JUDGE", help="judge of the images [default: the concept's own]")
    judge_options(parser)
    concept_options(parser)
    add_options(parser, AttackOptions, {"attack": "the attack"})
    add_options(parser, Drawing, DRAWING)
    report_options(parser)
    quiet_option(parser)
    given = parser.parse_args(arguments)
    options, drawing = options_of(AttackOptions, given), options_of(Drawing, given)
    if rank_and_world(given)[1] > 1:
        raise EraseError("eval-concept attack takes one process")
    from erase.evaluation import attacking

    request = attacking.Request(
        model=given.model,
        attacks=list(dict.fromkeys(given.attacks)),
        output=Path(given.output),
        options=options,
        drawing=drawing,
        budget=given.budget,
        concept=given.concept,
        kind=given.kind,
        base=given.base,
        gold=given.gold,
        judge=given.judge,
        judge_models=given.judge_model,
        require=given.require,
        show=given.show,
        quiet=given.quiet,
        command=_command(),
        given=[name for name, value in vars(given).items() if value is not None],
    )
    _gate(attacking.run(request, print, notes_of(given)), given.require)


COMMANDS: dict[str, Command] = {
    "run": _run,
    "attack": _attack,
    "generate": _generate,
    "score": _score,
    "report": _report,
    "compare": _compare,
    "export": _export,
    "verify": _verify,
    "list": _list,
}
if __name__ == "__main__":
    main()
