"""`eval-concept`: pictures, scores, report; each stage a command of its own that goes on where it stopped."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from erase import __version__, concepts, files
from erase.cli import Parser, add_mixed_precision, reporting, silence_libraries
from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation.tasks import ABOUT, VERSIONS, Options, Task, build
from erase.settings import agreed_precision

if TYPE_CHECKING:
    from erase.guards import Guard

GUARDS = ("sld-weak", "sld-medium", "sld-strong", "sld-max", "negative")  # those of erase.guards, which needs torch
DESCRIPTION = "Evaluate concept erasure: the same prompts and seeds for the base and the erased model, with intervals."
EPILOG = """\
commands (each has its own --help):
  run       pictures, scores and report of erased models and their base
  generate  pictures of one model           score    a judge's raw outputs for them
  report    the figures, from the scores    compare  several reports in one table
  verify    hash and score again            list     the tasks

examples:
  eval-concept run --model runs/circle --task mini
  eval-concept run --model runs/nudity --task i2p --subset sexual
  eval-concept run --model runs/circle --task mini --require 'mini.ua>=0.95' --require 'mini.ra_drop<=0.03'
  eval-concept compare runs/evaluation/circle/mini runs/evaluation/esd/mini --output runs/compared
  eval-concept run --model mini --concept circle --task mini --guard sld-strong
  eval-concept score --images my_pictures --judge nudenet --output runs/my_scores
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 0 done, 2 for what the user can mend, 3 for a requirement not met, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    silence_libraries(quiet="--quiet" in arguments)
    with reporting("eval-concept", "interrupted; the same command continues"):
        if arguments and arguments[0] in COMMANDS:
            COMMANDS[arguments[0]](arguments[1:])
            return
        parser = Parser("eval-concept", DESCRIPTION, epilog=EPILOG, usage="eval-concept COMMAND [options]")
        parser.add_argument("--version", action="version", version=f"eval-concept {__version__}")
        parser.add_argument("command", nargs="?", metavar="COMMAND", help=", ".join(COMMANDS))
        given = parser.parse_args(arguments)
        parser.error(f"unknown command {given.command!r}; choose {', '.join(COMMANDS)}" if given.command else
                     f"no command given; choose {', '.join(COMMANDS)}")  # fmt: skip


# --- options that several commands share ----------------------------------------------------------------------------


def _task_options(parser: Parser, *, several: bool = False) -> None:
    group = parser.add_argument_group("what to draw")
    if several:
        group.add_argument(
            "--task", "--tasks", dest="tasks", nargs="+", required=True, help="tasks (eval-concept list)"
        )
    else:
        group.add_argument("--task", required=True, help="task (eval-concept list)")
    group.add_argument("--concept", help="preset, .toml, or free text with --kind [the run folder's own]")
    group.add_argument("--kind", choices=get_args(concepts.FreeKind), help="what a free-text concept is")
    group.add_argument("--subset", default="all", help="of i2p: all, sexual, nudity (> 50 %%) or a category [all]")
    group.add_argument(
        "--prompts", metavar="FILE", help="local copy of I2P, or captions for quality: .csv, .jsonl or .txt"
    )
    group.add_argument("--num-images", type=int, metavar="N", help="pictures a prompt, class or task [the task's own]")
    group.add_argument("--limit", type=int, metavar="N", help="only N samples, evenly from all: a quick look")
    group.add_argument("--features", default=Options.features, help="for quality: clip, inception2015, mini [clip]")


def _drawing_options(parser: Parser) -> None:
    group = parser.add_argument_group("how to draw")
    group.add_argument("--steps", type=int, metavar="N", help="sampler steps [the model's own, else 50]")
    group.add_argument("--guidance", type=float, metavar="X", help="for every sample [its own, else 7.5]")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures drawn together [8]")
    group.add_argument("--precision", help="fp32, bf16, fp16 [on a GPU bf16, or fp16 if the card lacks it; else fp32]")
    add_mixed_precision(group)
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (untested) [a GPU if there is one]")
    group.add_argument("--guard", help=f"stand beside the model: {', '.join(GUARDS)} [none]")
    group.add_argument("--guard-text", metavar="TEXT", help="what it steers away from [the concept and its synonyms]")
    group.add_argument("--allow-pickle", action="store_true", help="read weights that are not safetensors")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _judge_options(parser: Parser) -> None:
    parser.add_argument("--judge-model", action="append", default=[], metavar="[JUDGE=]PATH",
                        help="hub id, folder or weights of a judge; may be repeated [its own default]")  # fmt: skip


def _task(given: argparse.Namespace, name: str, model: str | None) -> Task:
    chosen = {key: getattr(given, key) for key in ("subset", "prompts", "num_images", "limit", "features")}
    concept = _concept(given, model)
    others = [one for one in _erased(model) if concept and one.name != concept.name]
    task = build(name, concept, Options(**chosen), others)
    if task.note and not given.quiet:
        print(task.note, file=sys.stderr)
    return task


def _erased(model: str | None) -> list[Concept]:
    """The concepts that a run folder says were erased."""
    record = _run_record(model)
    return [Concept(**part) for part in record.get("concepts", [record["concept"]] if "concept" in record else [])]


def _concept(given: argparse.Namespace, model: str | None) -> Concept | None:
    """The one that is named, else the one that the run folder says was erased."""
    record, erased = _run_record(model), _erased(model)
    if given.concept:
        named = [part for part in erased if part.name.lower() == given.concept.lower().replace("_", " ")]
        made_from = record.get("model", {})
        family = "mini" if "mini" in {model, made_from.get("name"), made_from.get("origin")} else None
        return named[0] if named else concepts.find(given.concept, given.kind, model_family=family)
    if len(erased) > 1:
        raise EraseError(f"{model} erased {', '.join(part.name for part in erased)}; choose one with --concept")
    return erased[0] if erased else None


def _guard(given: argparse.Namespace, model: str) -> "Guard | None":
    """The guard that is named, against the text that is given or else the concept's name and synonyms."""
    if given.guard is None:
        if given.guard_text:
            raise EraseError("--guard-text goes with --guard")
        return None
    text, concept = given.guard_text, _concept(given, model)
    if not text and concept:
        text = ", ".join([concept.name, *concept.synonyms])
    if not text:
        raise EraseError("a guard steers away from a concept; name it with --concept or say it with --guard-text")
    from erase import guards

    return guards.make(given.guard, text)


def _run_record(model: str | None) -> dict[str, Any]:
    path = Path(model or "") / "run.json"
    return files.read_json(path) if model and path.is_file() else {}


def _quiet(given: argparse.Namespace) -> bool:
    return given.quiet


def _place(given: argparse.Namespace) -> tuple[int, int]:
    """Rank and number of the processes that a launcher started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


# --- commands -------------------------------------------------------------------------------------------------------


def _generate(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept generate", "Draw a task's pictures; start it with accelerate launch for several GPUs."
    )
    parser.add_argument("--model", required=True, help="'mini', a diffusers or run folder, a hub id or a checkpoint")
    parser.add_argument("--delta", metavar="FILE", help="delta.safetensors to apply to the model first")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the pictures")
    _task_options(parser)
    _drawing_options(parser)
    given = parser.parse_args(arguments)
    task = _task(given, given.task, given.model)
    from erase.evaluation import generate

    model = generate.load_model(
        given.model,
        delta_path=given.delta,
        device=given.device,
        precision=agreed_precision(given.precision, given.mixed_precision),
        allow_pickle=given.allow_pickle,
        guard=_guard(given, given.model),
    )
    rank, world = _place(given)
    generate.generate(
        model,
        task,
        Path(given.output),
        steps=given.steps,
        guidance=given.guidance,
        batch_size=given.batch_size,
        rank=rank,
        world=world,
        quiet=_quiet(given) or rank > 0,
    )
    print(f"{given.output}: {task.id}, {len(task.samples)} samples, part {rank + 1} of {world} drawn")


def _score(arguments: list[str]) -> None:
    parser = Parser("eval-concept score", "Have judges look at pictures that were drawn, or at any folder of images.")
    parser.add_argument("folder", nargs="?", help="folder that generate wrote")
    parser.add_argument("--images", metavar="DIR", help="any folder of images instead; needs --judge and --output")
    parser.add_argument("--judge", action="append", help="judge; may be repeated [those of the task]")
    _judge_options(parser)
    parser.add_argument("--output", metavar="DIR", help="for --images: where the scores go")
    parser.add_argument("--device", default="cpu", help="for classifier, clip and features [cpu]")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    given = parser.parse_args(arguments)
    if bool(given.folder) == bool(given.images) or given.images and not (given.judge and given.output):
        raise EraseError("give a folder that generate wrote, or --images DIR with --judge and --output")
    from erase.evaluation import arm, score

    folder = Path(given.output or given.folder)
    if given.images:
        arm.adopt(Path(given.images), folder)
    task = arm.manifest(folder)["task"]
    for name in given.judge or task["judges"]:
        judge = score.make_judge(name, task, source=score.sources(given.judge_model).get(name), device=given.device)
        score.score(folder, judge, quiet=_quiet(given))
        print(f"{folder / 'scores' / name}.jsonl: {len(score.load(folder, name))} pictures scored")


def _report(arguments: list[str]) -> None:
    parser = Parser("eval-concept report", "Figures, tables and pictures from the scores; nothing is drawn or judged.")
    parser.add_argument("folder", help="scored folder of the erased model")
    parser.add_argument("--base", metavar="DIR", help="scored folder of the base model, same task")
    parser.add_argument(
        "--gold", metavar="PATH", help="scored folder, or features file, of the model trained without the concept"
    )
    parser.add_argument("--real", metavar="PATH", help="scored folder, or features file, of real pictures")
    parser.add_argument("--output", metavar="DIR", help="folder of the report [the erased model's folder]")
    parser.add_argument("--name", help="what the report calls the model [the folder's name]")
    _report_options(parser)
    given = parser.parse_args(arguments)
    folder = Path(given.folder)
    others = {role: Path(path) for role, path in vars(given).items() if role in {"base", "gold", "real"} and path}
    output, name = Path(given.output or folder), given.name or folder.resolve().name
    results = _write_report(folder, others, output, name, given)
    _gate([results], given.require)


def _report_options(parser: Parser) -> None:
    parser.add_argument("--require", action="append", default=[], metavar="RULE",
                        help="such as 'mini.ua>=0.95'; exit code 3 when it is not met; may be repeated")  # fmt: skip
    parser.add_argument("--show", action="store_true", help="do not blur flagged pictures")


def _write_report(
    erased: Path, others: dict[str, Path], output: Path, name: str, given: argparse.Namespace
) -> dict[str, Any]:
    from erase.evaluation import measure, report

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    results, outcomes = measure.measure(erased, **others, name=name, command=command)
    files.write_json(output / "outcomes.json", outcomes)
    report.write(results, output, images=measure.common_root(erased, others.get("base")), show=given.show)
    print(report.summary(results))
    print(f"{output / 'report.html'}: written")
    return results


def _gate(results: Sequence[dict[str, Any]], requirements: Sequence[str]) -> None:
    from erase.evaluation import measure

    failures = [line for one in results for line in measure.unmet(one, requirements)]
    for line in failures:
        print(f"eval-concept: {line}", file=sys.stderr)
    if failures:
        raise SystemExit(3)


def _run(arguments: list[str]) -> None:
    parser = Parser(
        "eval-concept run", "Draw, score and report erased models and their base; finished work is skipped."
    )
    parser.add_argument(
        "--model", "--models", dest="models", nargs="+", required=True, help="run folders or any models"
    )
    parser.add_argument("--base", help="model to compare with [the one that run.json names]")
    parser.add_argument("--gold", help="model trained without the concept, for the distance to it")
    parser.add_argument("--real", metavar="PATH", help="for quality: folder of real pictures, or a features file")
    parser.add_argument("--delta", metavar="FILE", help="delta.safetensors to apply to the (one) model first")
    parser.add_argument(
        "--output", default="runs/evaluation", metavar="DIR", help="folder of all arms and reports [%(default)s]"
    )
    _judge_options(parser)
    _task_options(parser, several=True)
    _drawing_options(parser)
    _report_options(parser)
    given = parser.parse_args(arguments)
    if _place(given)[1] > 1:
        raise EraseError("run is for one process; draw with several by eval-concept generate, then score and report")
    if given.delta and len(given.models) > 1:
        raise EraseError("--delta goes with one --model")
    root, results = Path(given.output), []
    for model in given.models:
        for name in given.tasks:
            task = _task(given, name, model)
            made_from = _run_record(model).get("model", {})
            guard = _guard(given, model)
            base = str(
                given.base
                or made_from.get("origin")
                or made_from.get("name")
                or (model if given.delta or guard else "")
            )
            if not base:
                raise EraseError(f"{model} has no run.json that names its base; give --base MODEL")
            label = _label(Path(given.delta).resolve().parent.name if given.delta else model)
            label += f"-{given.guard}" if guard else ""
            label += f"-{concepts.slug(given.concept)}" if len(_erased(model)) > 1 else ""
            folder = root / label / task.id
            others = {"base": _arm(given, root, base, task)}
            if given.gold:
                others["gold"] = _arm(given, root, given.gold, task)
            if given.real:
                others["real"] = _real(given, root, task)
            _arm(given, root, model, task, folder, delta=given.delta, guard=guard)
            if not given.delta and not given.base:
                _check_origin(model, made_from, others["base"], folder)
            results.append(_write_report(folder, others, folder, label, given))
    _gate(results, given.require)


def _check_origin(model: str, made_from: dict[str, Any], base: Path, erased: Path) -> None:
    """The weights that drew are those that run.json says: with a mixed-up base any figure would look real."""
    from erase.evaluation import arm

    for role, folder in (("base", base), ("result", erased)):
        hashes = {
            "base": made_from.get("origin_hash", made_from.get("base_hash")),
            "result": made_from.get("result_hash"),
        }
        said, drawn = hashes[role], arm.manifest(folder)["model"]["unet"]
        if said and said != drawn:
            raise EraseError(
                f"{model}/run.json says that the {role}'s UNet is {said[:12]}, but {folder} was drawn with "
                f"{drawn[:12]}; give the right model with --base, or erase again"
            )


def _label(model: str) -> str:
    return concepts.slug(Path(model).resolve().name if os.path.exists(model) else model)


def _arm(
    given: argparse.Namespace,
    root: Path,
    source: str,
    task: Task,
    folder: Path | None = None,
    *,
    delta: str | None = None,
    guard: "Guard | None" = None,
) -> Path:
    """A drawn and scored arm; without a folder, one named by all that its pictures depend on, for all to share."""
    from erase.evaluation import arm, generate, score

    quiet = _quiet(given)
    model = generate.load_model(
        source,
        delta_path=delta,
        device=given.device,
        precision=agreed_precision(given.precision, given.mixed_precision),
        allow_pickle=given.allow_pickle,
        guard=guard,
    )
    if folder is None:
        settings = generate.effective_settings(model, task, given.steps, given.guidance)
        key = files.text_hash(generate.identity(model, task, settings, given.batch_size))
        folder = root / "shared" / f"{_label(source)}-{task.id}-{key[:12]}"
    drawing = {"steps": given.steps, "guidance": given.guidance, "batch_size": given.batch_size}
    device = model.device.type
    with arm.alone(folder):  # many runs may share one base
        generate.generate(model, task, folder, **drawing, quiet=quiet)
        del model
        for name in task.judges:
            weights = score.sources(given.judge_model).get(name)
            score.score(folder, score.make_judge(name, task.identity(), source=weights, device=device), quiet=quiet)
    return folder


def _real(given: argparse.Namespace, root: Path, task: Task) -> Path:
    """Real pictures with the features of the task's network, looked at once."""
    from erase.evaluation import arm, score

    pictures = Path(given.real)
    if not pictures.is_dir():
        return pictures
    folder = root / "shared" / f"real-{_label(given.real)}"
    arm.adopt(pictures, folder)
    judge = score.make_judge("features", task.identity(), source=score.sources(given.judge_model).get("features"))
    score.score(folder, judge, quiet=_quiet(given))
    return folder


def _compare(arguments: list[str]) -> None:
    parser = Parser("eval-concept compare", "Several reports in one table; different protocols are refused.")
    parser.add_argument("reports", nargs="+", help="folders of reports; LABEL=DIR several times is one row over runs")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the comparison")
    given = parser.parse_args(arguments)
    from erase.evaluation import measure, report

    runs: dict[str, list[Any]] = {}
    for text in given.reports:
        folder, label = _labelled(text)
        results = measure.read(folder)
        runs.setdefault(label or results[0]["name"], []).append(results)
    compared = report.compare([measure.pool(found, label) for label, found in runs.items()])
    report.write_comparison(compared, Path(given.output))
    print(report.comparison_table(compared))
    print(f"{Path(given.output) / 'comparison.html'}: written")


def _labelled(text: str) -> tuple[Path, str | None]:
    label, equals, folder = text.partition("=")
    return (Path(folder), label) if equals and not Path(text).exists() else (Path(text), None)


def _verify(arguments: list[str]) -> None:
    parser = Parser("eval-concept verify", "Read and hash every picture again, and score a part of them again.")
    parser.add_argument("folder", help="folder that generate wrote")
    parser.add_argument("--num", type=int, default=32, help="pictures to score again [32]")
    _judge_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    given = parser.parse_args(arguments)
    from erase.evaluation import arm, score

    folder = Path(given.folder)
    task = arm.manifest(folder)["task"]
    names = sorted(path.stem for path in (folder / "scores").glob("*.json"))
    sources = score.sources(given.judge_model)
    judges = [score.make_judge(name, task, source=sources.get(name)) for name in names]
    problems = score.verify(folder, judges, given.num, quiet=_quiet(given))
    for problem in problems[:20]:
        print(problem)
    num = len(arm.complete_records(folder))
    if problems:
        raise EraseError(f"{folder}: {len(problems)} problems in {num} pictures")
    again = f"{min(given.num, num)} scored again the same by {', '.join(names)}" if names else "no scores yet"
    print(f"{folder}: {num} pictures are what was drawn; {again}")


def _list(arguments: list[str]) -> None:
    Parser("eval-concept list", "Show the tasks.").parse_args(arguments)
    for name, about in ABOUT.items():
        print(f"{name}@{VERSIONS[name]:<3} {about}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "generate": _generate,
    "score": _score,
    "report": _report,
    "compare": _compare,
    "verify": _verify,
    "list": _list,
}

if __name__ == "__main__":
    main()
