"""Erased models beside their base, from images to reports; all is checked before the first image is generated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase import concepts, files
from erase.device import choose
from erase.errors import EraseError
from erase.evaluation import arm, expected, generate, jsonl, measure, quality, score, sheet
from erase.evaluation.beside import Early
from erase.evaluation.gate import check_rules
from erase.evaluation.judges import registry as judging
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.options import Drawing, Options
from erase.evaluation.own_images import judged
from erase.evaluation.report import page
from erase.evaluation.sources import (
    Compared,
    Source,
    check_origin,
    compared,
    concept_of,
    label_of,
    make_guard,
    make_task,
)
from erase.evaluation.tasks import registry as tasks
from erase.evaluation.tasks.protocol import SampleSet
from erase.registry import file_name


@dataclass(frozen=True)
class Request:
    """What `eval-concept run` is asked.

    judge_models: sources of judges, see `judges.registry.sources`. show: do not blur flagged images.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    output: Path
    options: Options = field(default_factory=Options)
    drawing: Drawing = field(default_factory=Drawing)
    concept: str | None = None
    kind: Any = None
    base: str | None = None
    gold: str | None = None
    real: str | None = None
    base_images: str | None = None
    judges: Sequence[str] = ()
    judge_models: Sequence[str] = ()
    require: Sequence[str] = ()
    show: bool = False
    quiet: bool = False
    command: str = ""


@dataclass
class Job:
    """One model on one task.

    folders, hashes: of the arms and their networks, by role, known when the models were loaded once.
    """

    models: Compared
    task: SampleSet
    judges: Sequence[str]
    folder: Path
    folders: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def run(request: Request, tell: Callable[[str], None], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The results of every model on every task. Work that is done is skipped.

    tell: is given each report's summary as soon as there is one. note: what was read from prompt files and models.

    Raises:
        EraseError: something of the request is wrong; before the first image is generated, whatever it is.
    """
    jobs = [_job(request, model, name) for model in request.models for name in request.tasks]
    for text in dict.fromkeys(job.task.note for job in jobs):
        note(text)
    if request.real and not any(_real(request, job) for job in jobs):
        raise EraseError("--real goes with the judge features: --task quality, or --judge features")
    judges = [_judges(request, job) for job in jobs]
    others = {"base": True, "gold": bool(request.gold)}
    known = [
        expected.scores(
            job.task.identity(),
            job.task.samples,
            job.judges,
            **others,
            real=bool(_real(request, job)),
            dimension=getattr(made.get("features"), "dimension", None),
        )
        for job, made in zip(jobs, judges, strict=True)
    ]
    check_rules(request.require, known)
    for job, made in zip(jobs, judges, strict=True):
        _check_real(request, job, made)
    for source in dict.fromkeys(source for job in jobs for source in job.models.sources.values()):
        for line in _check_source(request, source, jobs, judges):
            note(line)
    for job in jobs:
        check_origin(job.models, job.hashes)
    results = []
    for job, made in zip(jobs, judges, strict=True):
        for role, source in job.models.sources.items():
            _draw_and_score(request, role, source, job, made)
        others = {role: folder for role, folder in job.folders.items() if role != "erased"}
        if _real(request, job):
            others["real"] = _score_real(request, job, made)
        how: dict[str, Any] = {"show": request.show, "tell": tell}
        results.append(write_report(job.folder, others, job.folder, job.models.label, request.command, **how))
    return results


def run_images(request: Request, tell: Callable[[str], None]) -> dict[str, Any]:
    """The results of a folder of images that this project need not have made.

    Raises:
        EraseError: something of the request is wrong, or an image is no image.
    """
    if not request.options.images or not request.judges:
        raise EraseError("the task images needs a folder and a judge: --images DIR --judge JUDGE")
    wanted = concepts.find(request.concept, request.kind) if request.concept else None
    options = judged(wanted, request.options.features)
    task = {"id": "images", "version": tasks.make("images").version, "options": options}
    sources = judging.sources(request.judge_models)
    made = {name: judging.make(name, task, source=sources.get(name)) for name in request.judges}
    label = label_of(request.options.images)
    folder = request.output / label / "images"
    others = {}
    arm.adopt(Path(request.options.images), folder, options)
    if request.base_images:
        others["base"] = request.output / "shared" / f"images-{label_of(request.base_images)}"
        arm.adopt(Path(request.base_images), others["base"], options)
    if request.real:
        others["real"] = request.output / "shared" / f"real-{label_of(request.real)}-{request.options.features}"
        if "features" not in made:
            raise EraseError("--real goes with --judge features")
        arm.adopt(Path(request.real), others["real"], options)
    has = {role: role in others for role in ("base", "gold", "real")}
    dimension = getattr(made.get("features"), "dimension", None)
    known = expected.scores(task, arm.samples(folder), request.judges, **has, dimension=dimension)
    check_rules(request.require, [known], has_base="base" in others)
    for role, place in {"images": folder, **others}.items():
        for name in ["features"] if role == "real" else request.judges:
            score.score(place, made[name], quiet=request.quiet)
    return write_report(folder, others, folder, label, request.command, show=request.show, tell=tell)


def write_report(
    erased: Path,
    others: Mapping[str, Path],
    output: Path,
    name: str,
    command: str,
    *,
    show: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure scored arms, write results, outcomes and report into the folder, and return the results."""
    results, outcomes = measure.measure(erased, **others, name=name, command=command)
    files.write_json(output / "outcomes.json", outcomes)
    page.write(results, output, images=sheet.common_root(erased, others.get("base")), show=show)
    tell(page.summary(results))
    tell(f"{output / 'report.html'}: written")
    return results


def _job(request: Request, model: str, name: str) -> Job:
    drawing = request.drawing
    concept = concept_of(request.concept, request.kind, model, drawing.config)
    task, guard = make_task(name, request.options, concept, model), make_guard(drawing, concept)
    if task.judges and request.judges:
        raise EraseError(f"--judge goes with the tasks prompts and images; {name} has {', '.join(task.judges)}")
    models = compared(model, drawing, guard, concept=request.concept, base=request.base, gold=request.gold)
    return Job(models, task, task.judges or request.judges, request.output / models.label / file_name(task.id))


def _judges(request: Request, job: Job) -> dict[str, Judge]:
    sources, device = judging.sources(request.judge_models), choose(request.drawing.device, "fp32").device.type
    make = judging.make
    return {name: make(name, job.task.identity(), source=sources.get(name), device=device) for name in job.judges}


def _real(request: Request, job: Job) -> str | None:
    """Real images or features, for a task that compares them."""
    return request.real if "features" in job.judges else None


def _check_real(request: Request, job: Job, judges: Mapping[str, Judge]) -> None:
    real = _real(request, job)
    if real is None:
        return
    if Path(real).is_file():
        quality.load_features(real, score.identity_of(judges["features"]))
    else:
        arm.adopt(Path(real), _real_folder(request, job), {})


def _real_folder(request: Request, job: Job) -> Path:
    return request.output / "shared" / f"real-{label_of(str(request.real))}-{job.task.options.get('features', 'clip')}"


def _check_source(
    request: Request, source: Source, jobs: Sequence[Job], judges: Sequence[Mapping[str, Judge]]
) -> tuple[str, ...]:
    """Load the model once: it exists, fits its delta, and has no other images in its folders. Returns its notes."""
    drawing, model = request.drawing, source.load(request.drawing, only_generates=True)
    hashes = generate.model_hashes(model)
    for job, made in zip(jobs, judges, strict=True):
        for role in (role for role, own in job.models.sources.items() if own == source):
            how = drawing.num_inference_steps, drawing.guidance_scale, drawing.resolution
            settings = generate.effective_settings(model, job.task, *how)
            for judge in made.values():
                score.check_size(judge, [generate.size_of(sample, settings) for sample in job.task.samples])
            given = drawing.generation_batch_size
            size = generate.together(given, model, job.folder if role == "erased" else None)
            identity = generate.identity(hashes, job.task, settings, size)
            folder = job.folder
            if role != "erased":  # shared by all that have the same base
                key = files.text_hash(identity)[:12]
                folder = request.output / "shared" / f"{label_of(source.model)}-{job.folder.name}-{key}"
            arm.check_arm(folder, identity)
            job.folders[role] = folder
            job.hashes[role] = generate.network_hash(model, hashes, job.models.made_from)
    return model.notes


def _draw_and_score(request: Request, role: str, source: Source, job: Job, judges: Mapping[str, Judge]) -> None:
    drawing, folder = request.drawing, job.folders[role]
    how: dict[str, Any] = {"steps": drawing.num_inference_steps, "guidance": drawing.guidance_scale}
    how["resolution"] = drawing.resolution
    early: Early = {}
    with jsonl.alone(folder):  # many runs may share one base
        if not (folder / arm.MANIFEST).exists() or arm.missing(folder):
            model = source.load(drawing, only_generates=True)
            how["batch_size"] = generate.together(drawing.generation_batch_size, model, folder)
            how |= {"quiet": request.quiet, "role": role, "judges": list(judges.values())}
            early = generate.generate(model, job.task, folder, **how)
            del model
        for judge in judges.values():
            score.score(folder, judge, quiet=request.quiet, role=role, early=early.get(judge.name))


def _score_real(request: Request, job: Job, judges: Mapping[str, Judge]) -> Path:
    """Real images with the features of the task's network, looked at once."""
    if Path(str(request.real)).is_file():
        return Path(str(request.real))
    folder = _real_folder(request, job)
    with jsonl.alone(folder):
        score.score(folder, judges["features"], quiet=request.quiet)
    return folder
