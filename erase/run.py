"""The whole job: model and concept in, mask, masked fine-tuning, and a run folder that stock diffusers opens."""

import gc
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, is_tensorboard_available, is_wandb_available
from diffusers import StableDiffusionPipeline
from torch import Tensor

import erase
from erase import (
    card,
    compvis,
    concepts,
    data,
    delta,
    device,
    export,
    files,
    forms,
    lowrank,
    memory,
    methods,
    models,
    records,
    saliency,
    scope,
    single_file,
    train,
)
from erase.concepts import Concept
from erase.errors import EraseError, missing, no_file
from erase.forms import unet_state
from erase.mini import world
from erase.settings import RECIPES, Settings, require_consistent, resolve

# Processes generate fixed shares of the images and wait for one another afterwards. A slower GPU may need hours longer
# than a faster one, and a process group gives up after 10 minutes by default.
WAIT = timedelta(hours=24)


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    folder: the run folder, a diffusers pipeline. record: what `run.json` holds.
    is_new: False where the folder held the finished run already.
    added: forms that were written beside such a run.
    """

    folder: Path
    record: dict[str, Any]
    is_new: bool = True
    added: tuple[str, ...] = ()


def erase_concept(
    concept: str | Concept | Sequence[str | Concept],
    model: str | os.PathLike[str] | StableDiffusionPipeline = "CompVis/stable-diffusion-v1-4",
    *,
    method: str | type | Any = "salun",
    set: Mapping[str, Any] | Sequence[str] | str = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Take `concept` out of `model` and write the result; the Python twin of the command line.

    concept: a preset's name, a .toml path, free text together with kind="object" or "style", or a Concept; or several.
    model: "mini", a diffusers folder, a hub id, a checkpoint file, or a StableDiffusionPipeline, which is not changed:
        it is written to the cache once.
    method: a method's name, "package.module:Class", or such a class or an instance of it; see `erase.methods`.
    set: hyperparameters of the method, such as {"alpha": 0.5} or ("alpha=0.5",).
    options: any field of `erase.settings.Settings`, such as output="runs/church" or density=0.1.

    The same call continues an interrupted run, and returns the record of a finished one.

    Raises:
        EraseError: what the user can mend; nothing is half-written.
    """
    known = {item.name for item in fields(Settings)} | {"mixed_precision"}
    for name in options:
        if name not in known:
            raise EraseError(f"unknown option {name!r}; erase.settings.Settings lists them")
    several = [concept] if isinstance(concept, (str, Concept)) else list(concept)
    names = tuple(one.name if isinstance(one, Concept) else one for one in several)
    if not isinstance(model, (str, os.PathLike)):
        cache_dir = options.get("cache_dir")
        model = single_file.keep(model, Path(cache_dir).expanduser() if cache_dir else None)
    given: Any = [set] if isinstance(set, str) else set
    if not isinstance(method, str):
        method, own = methods.give(method)
        more = given.items() if isinstance(given, Mapping) else (text.partition("=")[::2] for text in given)
        given = own | dict(more)
    settings = Settings(concept=names, model=os.fspath(model), method=method, set=given, **options)
    return run(settings, [one if isinstance(one, Concept) else None for one in several], quiet=quiet)


def run(
    settings: Settings,
    concept: Concept | Sequence[Concept | None] | None = None,
    *,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Run:
    """See `erase_concept`. `tell` hears what is to be known before the work begins.

    concept: what the settings' names stand for, where these are no presets; None where they are.
    """
    started = time.time()
    require_consistent(settings)
    method = make_method(settings)
    if settings.alpha is not None and not hasattr(method, "alpha"):
        raise EraseError(f"--alpha is {settings.alpha:g}, but {settings.method} has no retain term that it would weigh")
    given = [concept] if isinstance(concept, Concept) else list(concept or [None] * len(settings.concept))
    found = find_concepts(settings, given, None)  # unknown or refused: an error before a model is loaded
    name = " and ".join(one.name for one in found)
    folder = Path(settings.output or Path("runs") / concepts.slug(name))
    earlier = read_base(settings, folder)
    if earlier is not None:
        settings = replace(settings, model=str(settings.base))
    compute = device.choose(settings.device, settings.precision)
    if settings.precision is None and compute.precision == "fp16" and not can_scale(settings, method):
        compute = replace(compute, precision="fp32")
        tell("this GPU has no bf16, and fp16 does not go with these settings: computing in fp32")
    settings = replace(settings, precision=compute.precision)
    require_precision(settings, method)
    if settings.moments == "8bit" and hasattr(method, "loss") and find_spec("bitsandbytes") is None:
        raise missing("bitsandbytes")
    accelerator = make_accelerator(settings, folder, compute)
    cache_dir = Path(settings.cache_dir).expanduser() if settings.cache_dir else models.default_cache_dir()
    model = models.load(
        settings.model,
        device=compute.device,
        allow_pickle=settings.allow_pickle,
        unet=settings.unet,
        config=settings.config,
        revision=settings.revision,
        cache_dir=cache_dir,
    )
    for note in model.notes:
        tell(note)
    model.precision = compute.precision
    model.use_attention(settings.attention)
    parts = find_concepts(settings, given, model)
    everything = [*parts, *(earlier.concepts if earlier else [])]
    united = concepts.unite(everything)
    together = 1
    if settings.low_memory:
        size = (settings.resolution or model.resolution) // model.vae_scale
        together = memory.part_of_batch(model.unet, size, model.tokenizer.model_max_length)

    def resolved(settings: Settings) -> Settings:
        return resolve(
            settings,
            united.kind,
            model.defaults,
            num_processes=accelerator.num_processes,
            part=together,
            on_gpu=compute.device.type == "cuda",
        )

    def default(name: str) -> Any:
        return getattr(resolved(replace(asked, **{name: Settings.__dataclass_fields__[name].default})), name)

    asked, settings = settings, resolved(settings)
    require_rank(settings, method)
    truncated = data.truncated(model, united)
    parameters = scope.inside(dict(model.unet.named_parameters()), str(settings.scope))
    base_hash = delta.content_hash(unet_state(model.unet))
    given_mask = load_mask(settings, model, parameters, base_hash)
    identity = records.identity(
        settings,
        [united, *everything],
        base_hash=base_hash,
        mask_hash=None if given_mask is None else saliency_hash(given_mask),
        base=earlier and earlier.record,
    )
    outputs = planned(settings, folder, model)
    if accelerator.is_main_process:
        how = {"overwrite": settings.overwrite, "resume": settings.resume}
        records.begin(folder, identity, outputs=outputs, default=default, **how)
    accelerator.wait_for_everyone()
    record = records.read(folder)
    if record["status"] == "done":
        return finished(folder, record, settings, accelerator.is_main_process)
    for part in concepts.apart(everything)[: len(parts)]:
        tell(announcement(replace(part, others=united.others), settings, method))
    if truncated:
        some = f"{truncated[0][:60]!r}" + (f" and {len(truncated) - 1} more" if len(truncated) > 1 else "")
        tell(f"longer than the {model.tokenizer.model_max_length} tokens that the text encoder reads, and cut: {some}")
    if settings.low_memory:
        needs = needed_memory(settings, model, parameters)
        phases = ", ".join(f"{phase} {need / 1e9:.1f}" for phase, need in needs.items())
        tell(f"needs about {max(needs.values()) / 1e9:.1f} GB of memory ({phases})")
    try:
        return _carry_out(
            settings,
            united,
            parts,
            earlier,
            model,
            parameters,
            given_mask,
            folder,
            identity,
            outputs,
            compute,
            accelerator,
            cache_dir,
            started,
            quiet,
            tell,
        )
    except EraseError:
        if accelerator.is_main_process and [path.name for path in folder.iterdir()] == [records.RECORD]:
            (folder / records.RECORD).unlink()  # nothing to continue from: bad input leaves nothing behind
            folder.rmdir()
        raise


def _carry_out(
    settings: Settings,
    concept: Concept,
    parts: Sequence[Concept],
    earlier: "Base | None",
    model: models.Model,
    parameters: Mapping[str, torch.nn.Parameter],
    given_mask: saliency.Packed | None,
    folder: Path,
    identity: Mapping[str, Any],
    outputs: Sequence[str],
    compute: device.Compute,
    accelerator: Accelerator,
    cache_dir: Path,
    started: float,
    quiet: bool,
    tell: Callable[[str], None],
) -> Run:
    """The run itself: data, mask, training, files; each part is skipped or continued when `folder` holds it."""
    base_hash, work = identity["base_hash"], folder / "work"
    method, plan = make_method(settings), make_plan(settings, model)
    if settings.report_to:
        accelerator.init_trackers("erase-concept", config={k: str(v) for k, v in asdict(settings).items()})
    clock, seconds = time.perf_counter(), {"load": time.time() - started}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()

    def gather(kind: str) -> data.Data:
        return data.gather(
            model,
            concept,
            replace(plan, pictures=kind, retains=getattr(method, "retains", True)),
            model_hash=base_hash,
            cache_dir=cache_dir,
            workers=data.Workers(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
            quiet=quiet or not accelerator.is_main_process,
            tell=tell,
        )

    is_scored = given_mask is None and settings.mask in {"saliency", "inverse"}
    shown = gather("concept") if is_scored else None
    pictures = None
    if hasattr(method, "loss"):
        kind = getattr(method, "pictures", "concept")
        pictures = shown if shown is not None and kind == "concept" else gather(kind)
    text = data.read_text(model, concept)
    model.release()
    if settings.weights == "bf16":
        model.round_unet(torch.bfloat16)
    lap("data")
    mask = given_mask
    if mask is None and settings.mask != "none":
        mask = make_mask(settings, model, shown, parts, parameters, accelerator, work, base_hash, quiet)
    if mask is not None and earlier is not None and earlier.mask is not None:
        mask = saliency.pack(saliency.union(mask, earlier.mask))
    lap("mask")
    losses: list[dict[str, float]] = []
    notes: dict[str, Any] = {}
    if pictures is None:
        if settings.weights == "bf16":  # rounded for the mask's sake only
            model.reload_unet()
        notes = train.solve(method, text, parameters, mask)
    else:
        losses = _train(
            model,
            method,
            pictures,
            parameters,
            mask,
            settings.rank,
            make_recipe(settings, plan),
            accelerator,
            state_path=work / "training.safetensors",
            checkpointing=settings.gradient_checkpointing,
            quiet=quiet,
        )
    lap("train")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return Run(folder, {})
    gc.collect()
    fingerprint = pictures.fingerprint if pictures else files.text_hash([concept.fingerprint(), base_hash])
    provenance = {
        "erase_version": erase.__version__,
        "base": settings.model,
        "concept": asdict(concept),
        "method": settings.method,
        "hyperparameters": asdict(method),
        "settings": identity["settings"],
        "data": fingerprint,
        "made_for": settings.model,
        "base_dtype": None if settings.unet else export.stored_dtype(model.folder / "unet"),
    }
    if earlier is not None:
        provenance["after"] = earlier.record
    new_state = unet_state(model.unet)
    base_unet = model.stored_unet()
    change = delta.difference(unet_state(base_unet), new_state, provenance)
    if change.base_hash != base_hash:
        raise EraseError(f"{model.folder} changed on the disk during the run; nothing was written, start again")
    if outside := outside_of(change, parameters, mask):
        raise EraseError(
            f"{outside[0]!r} changed outside the mask or the scope; nothing was published. Delete {work}, and the same "
            "command starts again"
        )
    write_outputs(folder, settings, model, base_unet, new_state, change, mask, concept, earlier)
    lap("output")
    moved = sum(change.changed.values())
    record = {
        "identity": identity,
        "identity_hash": files.text_hash(identity),
        "concept": asdict(concept),
        "concepts": [asdict(part) for part in [*parts, *(earlier.concepts if earlier else [])]],
        "base": earlier and earlier.record,
        "settings": asdict(settings),
        "compute": compute.record(),
        "model": {
            "name": settings.model,
            "origin": earlier.record["model"] if earlier else settings.model,
            "origin_hash": earlier.record["model_hash"] if earlier else base_hash,
            "base_hash": base_hash,
            "result_hash": change.result_hash,
            "base_dtype": provenance["base_dtype"],
        },
        "mask": None if mask is None else {"weights": _total(mask), "ones": saliency.count(mask)},
        "weights": {"total": sum(t.numel() for t in new_state.values()), "changed": moved},
        "data": {
            **(pictures.record if pictures else {}),
            "fingerprint": fingerprint,
            "truncated_prompts": data.truncated(model, concept),
        },
        "method": {"name": settings.method, **asdict(method), **notes},
        "losses": losses,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    record = records.finish(folder, record, outputs)
    clean(folder)
    return Run(folder, record)


def finished(folder: Path, record: dict[str, Any], settings: Settings, is_main_process: bool) -> Run:
    """A run that was finished before, verified, with the forms added that it lacks."""
    if not is_main_process:
        return Run(folder, {}, is_new=False)
    records.verify(folder, record)
    clean(folder)
    there = {"delta", *forms.held(folder, record)}
    added = tuple(form for form in settings.save if form not in there)
    if added:
        forms.add(folder, added, rank=settings.lora_rank)
    return Run(folder, records.read(folder), is_new=False, added=added)


def clean(folder: Path) -> None:
    """Delete intermediate state, which a finished run does not need any more."""
    if (folder / "work").is_dir():
        files.refuse_links(folder)
        shutil.rmtree(folder / "work")


def outside_of(change: delta.Delta, parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> list[str]:
    """Names of the weights of which some changed that are outside the scope or the mask.

    parameters: those in the scope, by name.
    """
    found = []
    for name in change.changed:
        plain = name.removeprefix("unet.")
        may = None if mask is None or plain not in parameters else mask[plain].reshape(-1)
        if plain not in parameters or may is not None and (delta.changed_bits(change, name) & ~may).any():
            found.append(plain)
    return found


def _train(
    model: models.Model,
    method: Any,
    pictures: data.Data,
    parameters: Mapping[str, torch.nn.Parameter],
    mask: Mapping[str, Tensor] | None,
    rank: int | None,
    recipe: train.Recipe,
    accelerator: Accelerator,
    **how: Any,
) -> list[dict[str, float]]:
    """`train.train` of the parameters themselves, or of a change of low rank."""
    if rank is None:
        return train.train(model, method, pictures, parameters, mask, recipe, accelerator, **how)
    with lowrank.factors(model.unet, parameters, rank, train.generator(recipe.seed, "rank")) as factors:
        return train.train(model, method, pictures, factors, None, recipe, accelerator, **how)


# --- the parts of the job -------------------------------------------------------------------------------------------


def make_plan(settings: Settings, model: models.Model) -> data.Plan:
    """Which pictures the run trains on, and how they are drawn."""
    assert settings.sampler is not None  # `resolve` has filled it in
    return data.Plan(
        num_forget=_int(settings.num_forget),
        num_retain=_int(settings.num_retain),
        steps=_int(settings.num_inference_steps),
        guidance=_float(settings.guidance_scale),
        size=settings.resolution or model.resolution,
        batch_size=_int(settings.generation_batch_size),
        seed=settings.seed,
        sampler=settings.sampler,
        round_trip=not RECIPES[settings.recipe].shared_latent,
        forget_images=settings.forget_images,
        retain_images=settings.retain_images,
    )


def make_recipe(settings: Settings, plan: data.Plan) -> train.Recipe:
    """How the run trains; methods without training never ask."""
    recipe = RECIPES[settings.recipe]
    return train.Recipe(
        num_steps=_int(settings.num_train_steps),
        batch_size=_int(settings.batch_size),
        learning_rate=_float(settings.learning_rate),
        weight_decay=_float(settings.weight_decay),
        max_grad_norm=settings.max_grad_norm,
        accumulation=settings.gradient_accumulation_steps,
        target=str(settings.target),
        in_order=recipe.in_order,
        independent_latents=not recipe.shared_latent,
        seed=settings.seed,
        checkpoint_every=settings.checkpointing_steps,
        eight_bit=settings.moments == "8bit",
        way_steps=plan.steps,
        way_guidance=plan.way_guidance,
    )


def make_accelerator(settings: Settings, folder: Path, compute: device.Compute) -> Accelerator:
    """accelerate's view of the machine; refuses when a launcher asked for more processes than it started."""
    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if settings.report_to and not available[settings.report_to]():
        raise missing(settings.report_to)
    AcceleratorState._reset_state()  # a process may make several runs, each with its own precision
    accelerator = Accelerator(
        cpu=compute.device.type == "cpu",
        mixed_precision=compute.mixed_precision,
        log_with=settings.report_to,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        project_config=ProjectConfiguration(logging_dir=str(folder / "logs")),
        step_scheduler_with_optimizer=False,
    )
    wanted = _world_size()
    if wanted != accelerator.num_processes:
        raise EraseError(
            f"the launcher asked for {wanted} processes but accelerate runs {accelerator.num_processes}; "
            "on CPUs start with: torchrun --nproc_per_node N -m erase.cli ... --device cpu"
        )
    return accelerator


def make_method(settings: Settings) -> Any:
    """The method with its hyperparameters, as recipe and options say."""
    recipe = RECIPES[settings.recipe]
    general: dict[str, Any] = {"frozen_target": recipe.frozen_target, "distill_retain": recipe.distill_retain}
    general["seed"] = settings.seed
    if settings.alpha is not None:
        general["alpha"] = settings.alpha
    return methods.make(settings.method, general, settings.set)


def can_scale(settings: Settings, method: Any) -> bool:
    """Whether fp16 can do: its gradients are scaled, which a method that compares them does not know of."""
    compares = getattr(method, "balance", None) is not None or hasattr(method, "prepare")
    return not compares and settings.weights != "bf16"


def require_precision(settings: Settings, method: Any) -> None:
    """Raise an EraseError where fp16, which scales gradients, meets a method that compares them."""
    if settings.precision == "fp16" and not can_scale(settings, method):
        raise EraseError(f"{settings.method} compares gradients, which --precision fp16 scales; use bf16 or fp32")


def require_rank(settings: Settings, method: Any) -> None:
    """Raise an EraseError where --rank, which puts factors in the place of weights, meets what handles weights."""
    if settings.rank is None:
        return
    if settings.mask != "none":
        raise EraseError(
            f"--rank {settings.rank} does not go with a mask: a masked change is of no low rank; leave one out"
        )
    if not hasattr(method, "loss") or hasattr(method, "prepare") or hasattr(method, "shrink"):
        raise EraseError(f"--rank {settings.rank} does not go with {settings.method}, which changes weights directly")
    if settings.weights == "bf16":
        raise EraseError(f"--rank {settings.rank} does not go with --weights bf16; choose fp32")


@dataclass(frozen=True)
class Base:
    """An earlier run to go on from.

    concepts: what it and those before it erased. mask: what was allowed to move, None if everything was.
    record: what this run's own records say of it.
    """

    concepts: list[Concept]
    mask: saliency.Packed | None
    record: dict[str, Any]


def read_base(settings: Settings, output: Path) -> Base | None:
    """The run that --base names.

    Raises:
        EraseError: it is no finished run with a pipeline, its files were altered, it is the output itself, or it was
            made from another --model.
    """
    if settings.base is None:
        return None
    if settings.unet is not None:
        raise EraseError(f"--unet {settings.unet} does not go with --base, whose UNet is what it erased; leave one out")
    folder = Path(settings.base).expanduser()
    record = records.read(folder) if (folder / records.RECORD).is_file() else {}
    if record.get("status") != "done" or not (folder / "model_index.json").is_file():
        raise EraseError(f"--base is {settings.base!r}, which is no finished run with a pipeline; give a run folder")
    if folder.resolve() == output.resolve():
        raise EraseError(f"--base {settings.base} is this run's own output; choose another --output")
    origin = record["model"].get("origin", record["model"]["name"])
    default = Settings.__dataclass_fields__["model"].default
    if settings.model not in {default, origin, settings.base}:
        raise EraseError(f"{settings.base} was made from {origin}, not from {settings.model}; leave out --model")
    records.verify(folder, record)
    try:
        erased = [Concept(**part) for part in record.get("concepts", [record["concept"]])]
    except (KeyError, TypeError) as error:
        raise EraseError(f"{folder / records.RECORD} is damaged: its concepts cannot be read ({error})") from error
    mask_path = folder / "mask.safetensors"
    told = {
        "run": str(folder),
        "model": origin,
        "model_hash": record["model"].get("origin_hash", record["model"]["base_hash"]),
        "concepts": [part.name for part in erased],
        "hash": record["model"]["result_hash"],
    }
    return Base(erased, saliency.load(mask_path)[0] if mask_path.is_file() else None, told)


def announcement(concept: Concept, settings: Settings, method: Any) -> str:
    """What becomes what, for the user to see before the work begins."""
    forget, more = concept.forget[0], len(concept.forget) - 1
    rest = f" (and {more} more prompt{'s' if more > 1 else ''})" if more else ""
    if not getattr(method, "anchors", True):
        return f"{concept.name}: {forget!r}{rest} is unlearned; {settings.method} uses no anchor"
    if settings.target == "random" and concept.others:
        return f"{concept.name}: {forget!r}{rest} -> a random one of {len(concept.others)} other classes"
    if settings.target == "fixed" and concept.others:
        return f"{concept.name}: {forget!r}{rest} -> {concept.others[0]!r}"
    hints = [concepts.advice(concept), "--anchor chooses another" if settings.kind and not settings.anchor else ""]
    return "; ".join([f"{concept.name}: {concepts.mapping(concept)}", *filter(None, hints)])


def find_concepts(settings: Settings, given: Sequence[Concept | None], model: models.Model | None) -> list[Concept]:
    """The concepts that the settings name or that are given, in the model's language (None: any), with overrides."""
    return [find_concept(settings, name, one, model) for name, one in zip(settings.concept, given, strict=True)]


def find_concept(settings: Settings, name: str, concept: Concept | None, model: models.Model | None) -> Concept:
    """One of them."""
    given = {"forget": settings.forget, "anchor": settings.anchor, "retain": settings.retain}
    if concept is None:
        family = "mini" if model and model.is_mini else None
        concept = concepts.find(name, settings.kind, model_family=family, **given)
    else:
        concept = concepts.override(concept, **{key: value or None for key, value in given.items()})
    if model and model.is_mini:
        require_known(concept, settings)
    if model and not model.is_mini and concept.judge.get("type") == "mini" and not settings.forget:
        raise EraseError(
            f"the preset {concept.name!r} is of the embedded model's world; "
            f'for {settings.model} describe it: --concept "{concept.name}" --kind {concept.kind}'
        )
    return concept


def require_known(concept: Concept, settings: Settings) -> None:
    """Raise an EraseError for a forget prompt or anchor with a word that the embedded model was never shown."""
    known = {*world.WORDS, *world.COLOURS}
    for part, prompts in (("forget", concept.forget), ("anchor", concept.anchor)):
        for prompt in prompts:
            strange = [word for word in re.findall(r"\w+", prompt.lower()) if word not in known]
            if strange:
                other = "" if part == "forget" else "; give --anchor, such as 'a photo of a square'"
                raise EraseError(
                    f"the embedded model does not know {strange[0]!r} (in the {part} prompt {prompt!r}){other}; "
                    f"it knows {', '.join(world.SHAPES)} and persons"
                )


def needed_memory(settings: Settings, model: models.Model, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes by phase, computed from the shapes; an estimate for the device that trains."""
    accumulates, method = settings.mask in {"saliency", "inverse"}, make_method(settings)
    mask_batch = _part(settings) if settings.score == "abs_sum" else _int(settings.batch_size)
    mask_batch *= 2 if settings.mask_guidance else 1  # conditional and unconditional, before one backward pass
    return memory.estimate(
        model.unet,
        parameters,
        density=1.0 if settings.mask == "none" else settings.density,
        eight_bit=settings.moments == "8bit",
        latent_size=(settings.resolution or model.resolution) // model.vae_scale,
        tokens=model.tokenizer.model_max_length,
        mask_batch=mask_batch if accumulates else None,
        part=None if hasattr(method, "solve") else _part(settings),
        dtype=torch.bfloat16 if settings.weights == "bf16" else torch.float32,
        checkpointing=settings.gradient_checkpointing,
        needs_base=getattr(method, "needs_base", False),
    )


def load_mask(
    settings: Settings, model: models.Model, parameters: Mapping[str, Tensor], base_hash: str
) -> saliency.Packed | None:
    """The mask of a file, ours or the reference's, checked against this model; None when --mask names no file."""
    if settings.mask in {"saliency", "random", "inverse", "none"}:
        return None
    path = Path(str(settings.mask)).expanduser()
    if not path.is_file():
        raise EraseError(f"--mask: {no_file(path)}; or choose saliency, random, inverse or none")
    if path.suffix == ".safetensors":
        mask, header = saliency.load(path)
    else:
        unet: Any = model.unet
        names = {theirs: ours for ours, theirs in compvis.unet_names(unet.state_dict(), unet.config).items()}
        mask, header = saliency.load_reference(path, lambda name: names.get(name, name)), {"base": path.name}
    saliency.check(mask, header, parameters, base_hash=base_hash)
    missing = [name for name in parameters if name not in mask]
    if missing:
        raise EraseError(f"{path} has no entry for {missing[0]!r}; it was made for another --scope")
    return saliency.pack({name: mask[name] for name in parameters})


def make_mask(
    settings: Settings,
    model: models.Model,
    pictures: data.Data | None,
    parts: Sequence[Concept],
    parameters: Mapping[str, torch.nn.Parameter],
    accelerator: Accelerator,
    work: Path,
    base_hash: str,
    quiet: bool,
) -> saliency.Packed:
    """The saliency mask or a control of it, kept in `work` until the run is finished.

    Of several concepts each has its own, at the full density and from the pictures of its own prompts, and what any
    of them lets move may move: with k concepts between density and k times it.
    """
    path = work / "mask.safetensors"
    if path.exists():
        return kept_mask(path, settings, parameters, base_hash)
    if settings.mask == "random":
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        mask = saliency.random_mask(shapes, settings.density, settings.seed, per_tensor=settings.per_tensor)
    else:
        assert pictures is not None
        mask = {}
        for number, shown in enumerate(by_concept(pictures, parts, settings)):
            scores = train.accumulate(
                model,
                shown,
                parameters,
                accelerator,
                score=settings.score,
                guidance=_float(settings.mask_guidance),
                batch_size=_int(settings.batch_size),
                seed=settings.seed,
                state_path=work / f"saliency-{number}.safetensors",
                part=_part(settings),
                checkpointing=settings.gradient_checkpointing,
                quiet=quiet,
            )
            largest = settings.mask == "saliency"
            own = saliency.select(scores, settings.density, per_tensor=settings.per_tensor, largest=largest)
            mask = saliency.union(own, mask)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        header = {
            "base": settings.model,
            "base_hash": base_hash,
            "data_hash": pictures and pictures.fingerprint,
            "source": settings.mask,
            "density": settings.density,
            "score": settings.score,
            "per_tensor": settings.per_tensor,
            "mask_guidance": settings.mask_guidance,
            "scope": settings.scope,
            "seed": settings.seed,
            "concepts": [part.name for part in parts],
        }
        saliency.save(path, mask, header)
    return saliency.pack(mask)


def kept_mask(path: Path, settings: Settings, parameters: Mapping[str, Tensor], base_hash: str) -> saliency.Packed:
    """The mask that this run made before it was interrupted."""
    try:
        files.read_own(path, kind="mask", base_hash=base_hash, source=settings.mask, density=settings.density)
        mask, header = saliency.load(path)
        saliency.check(mask, header, parameters, base_hash=base_hash)
    except EraseError as error:
        told = str(error).replace("; copy or download it again", "")
        raise EraseError(f"{told}; delete {path}, and the same command makes the mask again") from error
    return mask


def by_concept(pictures: data.Data, parts: Sequence[Concept], settings: Settings) -> list[data.Data]:
    """The forget pictures of each concept to be masked for; of a single one, and of unnamed images, all.

    An earlier run's concepts have no mask here, since theirs is there already.
    """
    if len(parts) == 1 and settings.base is None or settings.forget_images:
        return [pictures]
    return [data.of_prompts(pictures, part.forget) for part in parts]


def planned(settings: Settings, folder: Path, model: models.Model) -> list[str]:
    """The files that the run will write, run.json apart, relative to its folder."""
    names = [records.DELTA, records.CARD]
    names += [records.MASK] if settings.mask != "none" or settings.base else []
    names += [records.SAMPLES] if settings.num_samples else []
    return names + [name for form in published(settings) for name in forms.names(form, folder, model.folder)]


def published(settings: Settings) -> list[str]:
    """The forms to write; a single file comes with the folder that it is made from."""
    return ["pipeline", *settings.save] if "single-file" in settings.save else list(settings.save)


def write_outputs(
    folder: Path,
    settings: Settings,
    model: models.Model,
    base_unet: Any,
    new_state: Mapping[str, Tensor],
    change: delta.Delta,
    mask: saliency.Packed | None,
    concept: Concept,
    earlier: "Base | None" = None,
) -> None:
    """Everything in the run folder but run.json."""
    delta.save(folder / records.DELTA, change)
    made = folder / "work" / records.MASK
    if made.exists() and earlier is None:
        files.copy(made, folder / records.MASK)
    elif mask is not None:
        header = saliency.load(made)[1] if made.exists() else {}
        header |= {"base": settings.model, "base_hash": change.base_hash}
        header |= {"united_with": earlier.record["run"]} if earlier and earlier.mask else {}
        saliency.save(folder / records.MASK, mask, header)
    for form in dict.fromkeys(published(settings)):
        forms.write(
            form,
            folder,
            run_folder=folder,
            source=model.folder,
            base={name: tensor.detach() for name, tensor in base_unet.state_dict().items()},
            new=forms.plain(new_state),
            rank=_int(settings.lora_rank),
            provenance=change.provenance,
        )
    if settings.num_samples:
        card.write_samples(folder / records.SAMPLES, model, base_unet, concept, settings)
    dtype = ", dtype=torch.float32" if export.needs_dtype(model.folder) else ""
    loading = f'StableDiffusionPipeline.from_pretrained("this folder"{dtype})'
    text = card.model_card(settings, concept, change, loading=loading, after=earlier and earlier.record)
    files.write_text(folder / records.CARD, text)


def saliency_hash(mask: Mapping[str, Tensor]) -> str:
    return delta.content_hash({name: bits.to(torch.uint8) for name, bits in mask.items()})


def versions() -> dict[str, str]:
    return {
        "erase-concept": erase.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "threads": str(torch.get_num_threads()),
    }


def peak_memory() -> dict[str, int]:
    """Bytes: of the process, except on Windows, and of the GPU if there is one."""
    peak = {}
    if find_spec("resource"):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _part(settings: Settings) -> int:
    """Pictures of one branch that go through the UNet together."""
    return max(1, _int(settings.batch_size) // (settings.gradient_accumulation_steps * _world_size()))


def _total(mask: Mapping[str, Tensor]) -> int:
    return sum(bits.numel() for bits in mask.values())


def _int(value: int | None) -> int:
    assert value is not None  # `resolve` has filled it in
    return value


def _float(value: float | None) -> float:
    assert value is not None
    return value
