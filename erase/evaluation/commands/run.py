"""`eval-concept run`: images, scores and reports of erased models and their base."""

from pathlib import Path

from erase.commandline import Parser
from erase.errors import EraseError
from erase.evaluation.commands.ending import require, typed
from erase.evaluation.flags import (
    judge_options,
    notes_of,
    options_of,
    quiet_option,
    report_options,
    task_options,
)
from erase.evaluation.options import Drawing, Options


def run(arguments: list[str]) -> None:
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
        command=typed(),
    )
    results = [evaluate.run_images(request, print)] if has_images else evaluate.run(request, print, notes_of(given))
    require(results, given.require)
