"""Erased models under attack, beside their base and a retrained model: from a request to reports.

All is checked before the first image is generated.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from erase import files, guards, tensor_files
from erase.concepts import Concept, refusal
from erase.data import prompt_files
from erase.device import choose
from erase.errors import EraseError
from erase.evaluation import arm, attacked, evaluate, expected, generate, jsonl, own_images, rows, score
from erase.evaluation.attacks import registry as attacks
from erase.evaluation.attacks.protocol import Attack, Finding, Given, Shown
from erase.evaluation.gate import check_rules
from erase.evaluation.judges import registry as judging
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.options import AttackOptions, Drawing
from erase.evaluation.sources import Compared, Source, check_origin, compared, concept_of, label_of, make_guard
from erase.evaluation.tasks.attack import Attacked
from erase.evaluation.tasks.protocol import SampleSet, seed_of
from erase.families.protocol import Family
from erase.progress import progress
from erase.registry import file_name

JUDGES = {
    "mini": "mini",
    "imagenet": "classifier",
    "nudenet": "nudenet",
    "clip": "clip",
    "classes": "mini-pixel",
}  # by a concept's judge type
QUICK = {"num_images": 6, "attack_seeds": 1, "steps": 8}  # what --quick makes of options that are not given

TOGETHER = 8  # images that an attack generates at once, where nothing else is asked for


@dataclass(frozen=True)
class Request:
    """What `eval-concept attack` is asked.

    budget: points of the curve; see `Attack.with_budget`. given: names of the options that the user gave.
    """

    model: str
    attacks: Sequence[str]
    output: Path
    options: AttackOptions = field(default_factory=AttackOptions)
    drawing: Drawing = field(default_factory=Drawing)
    budget: Sequence[int] = ()
    concept: str | None = None
    kind: Any = None
    base: str | None = None
    gold: str | None = None
    judge: str | None = None
    judge_models: Sequence[str] = ()
    require: Sequence[str] = ()
    show: bool = False
    quiet: bool = False
    command: str = ""
    given: Sequence[str] = ()


@dataclass
class Job:
    """One attack on all models.

    folders: of the arms, by role, known when the models were loaded once. known: see `Given`.
    """

    name: str
    attack: Attack
    task: SampleSet
    judge: Judge
    folder: Path
    folders: dict[str, Path] = field(default_factory=dict[str, Path])
    known: dict[int, dict[str, Finding]] = field(default_factory=dict[int, dict[str, Finding]])


def run(request: Request, tell: Callable[[str], None], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The results of every attack. Work that is done is skipped.

    tell: is given each report's summary as soon as there is one. note: how the models were loaded.

    Raises:
        EraseError: something of the request is wrong; before the first image is generated, whatever it is.
    """
    concept = concept_of(request.concept, request.kind, request.model, request.drawing.config)
    if concept is None:
        raise EraseError(f"an attack needs a concept, and {request.model} names none; give --concept NAME")
    for name in request.attacks:
        attacks.ATTACKS.load(name)
    drawing, guard = request.drawing, make_guard(request.drawing, concept)
    models = compared(request.model, drawing, guard, concept=request.concept, base=request.base, gold=request.gold)
    own = _own_prompts(request, concept)

    @functools.cache
    def open_base() -> Family:
        return models.sources["base"].load(drawing)

    key = files.text_hash(generate.model_hashes(open_base()))
    jobs = [_job(request, models, name, concept, own, open_base(), key) for name in request.attacks]
    roles = {"base": True, "gold": bool(request.gold), "real": False}
    known = [expected.scores(job.task.identity(), job.task.samples, [job.judge.name], **roles) for job in jobs]
    check_rules(request.require, known)
    check_origin(models, {role: _check_source(request, models, role, jobs, note) for role in models.sources})
    results = []
    for job in jobs:
        shown, others = (_images(request, job, concept, open_base, key, kind) for kind in ("shown", "others"))
        for role, source in models.sources.items():
            _attack_and_score(request, job, role, source, open_base, concept, shown, others)
        beside = {role: folder for role, folder in job.folders.items() if role != "erased"}
        label = models.label + (" (quick)" if request.options.quick else "")
        how: dict[str, Any] = {"show": request.show, "tell": tell}
        results.append(evaluate.write_report(job.folder, beside, job.folder, label, request.command, **how))
    return results


def _own_prompts(request: Request, concept: Concept) -> list[str]:
    """The user's prompts, none of which may involve minors: they are what an attack aims at."""
    needing = [name for name in request.attacks if attacks.ATTACKS.load(name).needs_prompts]
    if needing and not request.options.prompts:
        raise EraseError(f"the attack {needing[0]} needs your own list: --prompts FILE (CSV, .jsonl or .txt)")
    if not request.options.prompts:
        return []
    if not needing:
        raise EraseError("--prompts goes with the attack prompts")
    path = Path(request.options.prompts).expanduser()
    found = prompt_files.read(path).rows
    rows.refuse_rows(path, found)
    refusal.refuse([row.prompt for row in found], f"{path}", sexual=concept.is_sexual, target=True)
    return list(dict.fromkeys(row.prompt for row in found))


def _job(
    request: Request,
    models: Compared,
    name: str,
    concept: Concept,
    own: Sequence[str],
    base: Family,
    key: str,
) -> Job:
    """key: hash of all parts of the base."""
    options = request.options
    attack = attacks.make(name, presets_of(base, concept, quick=options.quick), options.set)
    if request.budget:
        attack = attack.with_budget(request.budget)
    judge, judged = request.judge or JUDGES.get(str(concept.judge.get("type")), ""), own_images.judged(concept, "clip")
    if not judge or not judging.JUDGES.load(judge).knows(judged):
        judges = f"the judge {judge} cannot" if judge else "no judge is known that can"
        raise EraseError(f"{judges} tell whether an image shows {concept.name!r}; choose one with --judge")
    number, runs = _counts(request)
    prompts = attack.asks(concept, own, number)
    refusal.refuse(set(prompts), f"the attack {name}", sexual=concept.is_sexual, target=True)
    told = {
        **judged,
        "attack": name,
        "attack_version": attack.version,
        "settings": json.loads(json.dumps(asdict(attack))),  # pyright: ignore[reportArgumentType]
        "points": list(attack.points),
        "unit": attack.unit,
        "control": attack.control,
        "controls": list(attack.controls),
        "attack_seeds": runs if attack.is_random else 1,
        "quick": options.quick,
        "judge": judge,
        "base": key,
        **({} if options.limit is None else {"limit": options.limit}),
    }
    task = Attacked("attack").samples_of(told, prompts, (judge,))
    device = choose(request.drawing.device, "fp32").device.type
    source = judging.sources(request.judge_models).get(judge)
    looking = judging.make(judge, task.identity(), source=source, device=device)
    folder = f"attack-{file_name(name)}" + ("-quick" if options.quick else "")
    return Job(name, attack, task, looking, request.output / models.label / folder)


def presets_of(base: Family, concept: Concept, *, quick: bool = False) -> list[str]:
    """Tables of the attacks' presets.toml for this model and kind of concept, the most general first."""
    family = "mini" if base.is_mini else "classes" if base.classes else "sd"
    return [family, f"{family}-{concept.kind}", *(["quick"] if quick else [])]


def _settings(request: Request, job: Job, model: Family) -> dict[str, Any]:
    steps = request.drawing.num_inference_steps or (QUICK["steps"] if request.options.quick else None)
    drawing = request.drawing
    return generate.effective_settings(model, job.task, steps, drawing.guidance_scale, drawing.resolution)


def _counts(request: Request) -> tuple[int, int]:
    """Images of each point and attack seed, and attack seeds."""
    options, quick = request.options, request.options.quick
    number = QUICK["num_images"] if quick and "num_images" not in request.given else options.num_images
    runs = QUICK["attack_seeds"] if quick and "attack_seeds" not in request.given else options.attack_seeds
    return min(number, options.limit or number), runs


def _check_source(
    request: Request, models: Compared, role: str, jobs: Sequence[Job], note: Callable[[str], None]
) -> str:
    """Load the model once: it exists, fits its delta, and its folders hold no other images. Its network's hash."""
    source = models.sources[role]
    model = source.load(request.drawing)
    for line in model.notes:
        note(line)
    hashes = generate.model_hashes(model)
    for job in jobs:
        settings = _settings(request, job, model)
        if job.attack.finds_words:
            _ = model.token_embeddings  # an error if there is none
        if job.attack.finds_classes:
            _ = model.class_vectors  # likewise
        job.attack.require_possible(model, settings["steps"])
        if model.guard:
            guards.require_acting(model.guard, job.attack.fewest_steps(settings["steps"]))
        score.check_size(job.judge, [generate.size_of(sample, settings) for sample in job.task.samples])
        identity = generate.identity(hashes, job.task, settings, request.drawing.generation_batch_size or TOGETHER)
        folder = job.folder
        if role != "erased":  # shared by all that have the same base
            shared = f"{label_of(source.model)}-{job.folder.name}-{files.text_hash(identity)[:12]}"
            folder = request.output / "shared" / shared
        arm.check_arm(folder, identity)
        job.folders[role] = folder
    return generate.network_hash(model, hashes, models.made_from)


def _images(
    request: Request, job: Job, concept: Concept, open_base: Callable[[], Family], key: str, kind: str
) -> Shown:
    """The base's images of the concept ("shown"), or of what should stay ("others"), that the attack learns from.

    They are generated once, from seeds that no erasure uses.
    """
    base = open_base()
    settings = _settings(request, job, base)
    number = job.attack.num_shown if kind == "shown" else job.attack.num_others
    prompts = concept.forget if kind == "shown" else concept.retain or concept.anchor
    texts = tuple(islice(cycle(prompts), number))
    if not texts:
        return Shown(torch.empty(0, *base.latent_shape(settings["size"])), ())
    how: dict[str, Any] = {name: settings[name] for name in ("steps", "guidance", "size")}
    what = {"base": key, "kind": kind, "prompts": list(texts), "scheduler": settings["scheduler"], **how}
    path = request.output / "shared" / f"{kind}-{label_of(concept.name)}-{files.text_hash(what)[:12]}.safetensors"
    with jsonl.alone(path):
        if not path.exists():
            seeds = [seed_of(f"attack-{kind}", concept.name, i) for i in range(number)]
            size = request.drawing.generation_batch_size or TOGETHER
            with progress(number, f"images of {concept.name}" if kind == "shown" else "other images", "images",
                          quiet=request.quiet) as bar:  # fmt: skip
                parts = []
                for i in range(0, number, size):
                    parts.append(base.draw(texts[i : i + size], seeds[i : i + size], **how))
                    bar.update(len(parts[-1]))
            tensor_files.write_tensors(path, {"latents": torch.cat(parts).contiguous()}, what)
        return Shown(tensor_files.read_own(path, copied=True, **what)[0]["latents"], texts)


def _attack_and_score(
    request: Request,
    job: Job,
    role: str,
    source: Source,
    open_base: Callable[[], Family],
    concept: Concept,
    shown: Shown,
    others: Shown,
) -> None:
    drawing, folder = request.drawing, job.folders[role]
    with jsonl.alone(folder):  # many runs may share one base
        if not (folder / arm.MANIFEST).exists() or arm.missing(folder):
            model = source.load(drawing)
            settings = _settings(request, job, model)
            given = Given(
                model=model,
                open_base=open_base,
                concept=concept,
                shown=shown,
                others=others,
                samples=attacked.first_run(job.task.samples),
                steps=settings["steps"],
                guidance=settings["guidance"],
                size=settings["size"],
                quiet=request.quiet,
                known=job.known,
            )
            attacked.attack(
                given, job.attack, job.task, folder, settings, drawing.generation_batch_size or TOGETHER, role
            )
        score.score(folder, job.judge, quiet=request.quiet, role=role)
