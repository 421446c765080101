"""`eval-concept generate`: the images of one model."""

from pathlib import Path

from erase.commandline import Parser
from erase.evaluation.flags import notes_of, options_of, quiet_option, task_options
from erase.evaluation.options import Drawing, Options
from erase.processes import rank_and_world, refuse_sharding


def run(arguments: list[str]) -> None:
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
    refuse_sharding()
    rank, world = rank_and_world()
    given.quiet = given.quiet or rank > 0
    from erase.evaluation import generate, sources

    concept = sources.concept_of(given.concept, given.kind, given.model, drawing.config)
    task = sources.make_task(given.task, options, concept, given.model)
    notes_of(given)(task.note)
    model = sources.source_of(given.model, drawing, sources.make_guard(drawing, concept)).load(
        drawing, only_generates=True
    )
    for line in model.notes:
        notes_of(given)(line)
    generate.generate(
        model,
        task,
        Path(given.output),
        steps=drawing.num_inference_steps,
        guidance=drawing.guidance_scale,
        resolution=drawing.resolution,
        batch_size=generate.together(drawing.generation_batch_size, model, Path(given.output), world=world),
        rank=rank,
        world=world,
        quiet=given.quiet,
    )
    print(f"{given.output}: {task.id}, {len(task.samples)} samples, part {rank + 1} of {world} generated")
