"""The whole job: model and concept in, mask, masked fine-tuning, and a run folder that stock diffusers opens."""

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor

import erase
from erase import concepts, delta, device, files, masks, methods, words
from erase.concepts import Concept
from erase.data import cache, latents, prompt_states
from erase.errors import EraseError, missing
from erase.export.states import unet_state
from erase.families import loading, pipeline_folder, scope, sd, single_file
from erase.options.recipes import resolve
from erase.options.settings import Settings, require_consistent
from erase.runs import forms, records
from erase.runs.earlier import Base, read_base
from erase.runs.machine import make_accelerator, peak_memory, versions
from erase.runs.masking import load_mask, make_mask, saliency_hash
from erase.runs.outputs import clean, outside_of, planned, write_outputs
from erase.runs.planning import (
    can_scale,
    make_method,
    make_plan,
    make_recipe,
    needed_memory,
    require_precision,
    require_rank,
)
from erase.runs.subjects import announcement, find_concepts
from erase.training import batches, closed_form, loop, lowrank, memory


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
    options: any field of `erase.options.settings.Settings`, such as output="runs/church" or density=0.1.

    The same call continues an interrupted run, and returns the record of a finished one.

    Raises:
        EraseError: what the user can mend; nothing is half-written.
    """
    known = {item.name for item in fields(Settings)} | {"mixed_precision"}
    for name in options:
        if name not in known:
            raise EraseError(f"unknown option {name!r}; erase.options.settings.Settings lists them")
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
    folder = Path(settings.output or Path("runs") / words.slug(name))
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
    cache_dir = Path(settings.cache_dir).expanduser() if settings.cache_dir else files.default_cache_dir()
    model = loading.load(
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
    truncated = prompt_states.truncated(model, united)
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
    model: sd.Model,
    parameters: Mapping[str, torch.nn.Parameter],
    given_mask: masks.Packed | None,
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

    def gather(kind: str) -> latents.Data:
        return latents.gather(
            model,
            concept,
            replace(plan, pictures=kind, retains=getattr(method, "retains", True)),
            model_hash=base_hash,
            cache_dir=cache_dir,
            workers=cache.Workers(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
            quiet=quiet or not accelerator.is_main_process,
            tell=tell,
        )

    is_scored = given_mask is None and settings.mask in {"saliency", "inverse"}
    shown = gather("concept") if is_scored else None
    pictures = None
    if hasattr(method, "loss"):
        kind = getattr(method, "pictures", "concept")
        pictures = shown if shown is not None and kind == "concept" else gather(kind)
    text = prompt_states.read_text(model, concept)
    model.release()
    if settings.weights == "bf16":
        model.round_unet(torch.bfloat16)
    lap("data")
    mask = given_mask
    if mask is None and settings.mask != "none":
        mask = make_mask(settings, model, shown, parts, parameters, accelerator, work, base_hash, quiet)
    if mask is not None and earlier is not None and earlier.mask is not None:
        mask = masks.pack(masks.union(mask, earlier.mask))
    lap("mask")
    losses: list[dict[str, float]] = []
    notes: dict[str, Any] = {}
    if pictures is None:
        if settings.weights == "bf16":  # rounded for the mask's sake only
            model.reload_unet()
        notes = closed_form.solve(method, text, parameters, mask)
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
        "base_dtype": None if settings.unet else pipeline_folder.stored_dtype(model.folder / "unet"),
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
        "mask": None if mask is None else {"weights": _total(mask), "ones": masks.count(mask)},
        "weights": {"total": sum(t.numel() for t in new_state.values()), "changed": moved},
        "data": {
            **(pictures.record if pictures else {}),
            "fingerprint": fingerprint,
            "truncated_prompts": prompt_states.truncated(model, concept),
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


def _train(
    model: sd.Model,
    method: Any,
    pictures: latents.Data,
    parameters: Mapping[str, torch.nn.Parameter],
    mask: Mapping[str, Tensor] | None,
    rank: int | None,
    recipe: batches.Recipe,
    accelerator: Accelerator,
    **how: Any,
) -> list[dict[str, float]]:
    """`train.train` of the parameters themselves, or of a change of low rank."""
    if rank is None:
        return loop.train(model, method, pictures, parameters, mask, recipe, accelerator, **how)
    with lowrank.factors(model.unet, parameters, rank, batches.generator(recipe.seed, "rank")) as factors:
        return loop.train(model, method, pictures, factors, None, recipe, accelerator, **how)


def _total(mask: Mapping[str, Tensor]) -> int:
    return sum(bits.numel() for bits in mask.values())
