"""`eval-concept score`: the raw outputs of judges for images."""

from pathlib import Path

from erase import concepts
from erase.commandline import Parser, add_options
from erase.errors import EraseError
from erase.evaluation.flags import concept_options, judge_options, options_of, quiet_option
from erase.evaluation.judges import registry as judging
from erase.evaluation.options import Options
from erase.evaluation.parts import load_parts, part_options


def run(arguments: list[str]) -> None:
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
