"""A whole run: from model and concept through mask and training to a run folder that stock diffusers opens."""
# pyright: strict, reportPrivateImportUsage=false, reportDeprecated=false

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline

from erase import delta, masks, methods
from erase.concepts import Concept
from erase.errors import EraseError
from erase.families import loading
from erase.options.settings import Settings
from erase.runs import folders, forms, outputs, phases, watch
from erase.runs.decisions import Decisions, announce, decide
from erase.runs.machine import peak_memory, versions
from erase.runs.masking import choose_mask
from erase.runs.record import Changes, MaskSize, Models, RunRecord


@dataclass(frozen=True)
class Run:
    """What one run left behind.

    folder: the run folder, a diffusers pipeline.
    is_new: False where the folder held the finished run already.
    added: forms that were written beside such a run.
    is_main_process: False in the other processes of a distributed run.
    """

    folder: Path
    is_new: bool = True
    added: tuple[str, ...] = ()
    is_main_process: bool = True

    @cached_property
    def record(self) -> RunRecord:
        """What run.json holds."""
        return folders.read_finished(self.folder)


def erase_concept(
    concept: str | Concept | Sequence[str | Concept],
    model: str | os.PathLike[str] | DiffusionPipeline = "CompVis/stable-diffusion-v1-4",
    *,
    method: str | type | Any = "salun",
    set: Mapping[str, Any] | Sequence[str] | str = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Erase `concept` from `model` and write the result, as the command line does.

    concept: a preset's name, a .toml path, free text together with kind="object" or "style", or a Concept; or several.
    model: "mini", a diffusers folder, a hub id, a checkpoint file, or a pipeline of diffusers, which is not changed:
        it is written to the cache once.
    method: a method's name, "package.module:Class", or such a class or an instance of it; see `erase.methods`.
    set: hyperparameters of the method, such as {"alpha": 0.5} or ("alpha=0.5",).
    options: any field of `erase.options.settings.Settings`, such as output="runs/church" or density=0.1.

    The same call continues an interrupted run, and returns the record of a finished one.

    Raises:
        EraseError: every error that the user can correct; nothing is half-written.
    """
    known = {item.name for item in fields(Settings)} | {"mixed_precision"}
    for name in options:
        if name not in known:
            raise EraseError(f"unknown option {name!r}; erase.options.settings.Settings lists them")
    several = [concept] if isinstance(concept, (str, Concept)) else list(concept)
    names = tuple(one.name if isinstance(one, Concept) else one for one in several)
    if not isinstance(model, (str, os.PathLike)):
        cache_dir = options.get("cache_dir")
        model = loading.keep(model, Path(cache_dir).expanduser() if cache_dir else None)
    given: Any = [set] if isinstance(set, str) else set
    if not isinstance(method, str):
        method, own = methods.give(method)
        if not isinstance(given, Mapping):
            given = {name: value for name, _, value in (text.partition("=") for text in given)}
        given = own | dict(cast(Mapping[str, Any], given))
    settings = Settings(concept=names, model=os.fspath(model), method=method, set=given, **options)
    return run(settings, [one if isinstance(one, Concept) else None for one in several], quiet=quiet)


def run(
    settings: Settings,
    concept: Concept | Sequence[Concept | None] | None = None,
    *,
    quiet: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Run:
    """See `erase_concept`. tell: called with lines for the user before the work begins.

    concept: the concepts that the settings' names stand for; None if these are presets.
    """
    started = time.time()
    given = [concept] if isinstance(concept, Concept) else list(concept or [None] * len(settings.concept))
    decided = decide(settings, given, quiet=quiet, tell=tell)
    with watch.watched():
        try:
            result = _run(decided, started)
        except torch.OutOfMemoryError as error:
            raise EraseError(
                "the GPU's memory is too small for this run; repeat it with --overwrite and --low-memory, a smaller "
                "--density or --scope, or --generation-batch-size 1"
            ) from error
        decided.accelerator.wait_for_everyone()  # the folder is whole when any process goes on
        return result


def _run(decided: Decisions, started: float) -> Run:
    """Begin, continue or verify the run folder, and do what is left."""
    settings, folder, accelerator = decided.settings, decided.folder, decided.accelerator
    if accelerator.is_main_process:
        how = {"overwrite": settings.overwrite, "resume": settings.resume}
        folders.begin(folder, decided.identity, outputs=decided.outputs, default=decided.default, **how)
    accelerator.wait_for_everyone()
    record = folders.read(folder)
    if isinstance(record, RunRecord):
        return finished(folder, record, settings, accelerator.is_main_process)
    announce(decided)
    try:
        return _carry_out(decided, started)
    except EraseError:
        if accelerator.is_main_process and [path.name for path in folder.iterdir()] == [folders.RECORD]:
            (folder / folders.RECORD).unlink()  # nothing to continue from: bad input leaves nothing behind
            folder.rmdir()
        raise


def _carry_out(decided: Decisions, started: float) -> Run:
    """Data, mask, training, files; each part is skipped or continued when the run folder holds it."""
    accelerator, seconds = decided.accelerator, {"load": time.time() - started}
    if decided.settings.report_to:
        told = {name: str(value) for name, value in asdict(decided.settings).items()}
        accelerator.init_trackers("erase-concept", config=told)  # pyright: ignore[reportUnknownMemberType]

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 2)

    with timed("data"):
        data = phases.gather(decided)
    with timed("mask"):
        mask = choose_mask(decided, data.shown, data.shards)
    with timed("train"):
        trained = phases.train(decided, data, mask)
    for tracker in cast(Any, accelerator).trackers:
        tracker.finish()  # `end_training` would end the process group too, which a second run of the script needs
    if not accelerator.is_main_process:
        return Run(decided.folder, is_main_process=False)
    gc.collect()
    with timed("output"):
        change = outputs.write(decided, data.images, mask)
    folders.finish(decided.folder, _record(decided, data, mask, trained, change, seconds), decided.outputs)
    outputs.clean(decided.folder)
    return Run(decided.folder)


def _record(
    decided: Decisions,
    data: phases.Gathered,
    mask: masks.Packed | None,
    trained: phases.Trained,
    change: delta.Delta,
    seconds: Mapping[str, float],
) -> RunRecord:
    """What run.json says of a finished run, except for the time and the files."""
    settings, images, earlier = decided.settings, data.images, decided.earlier
    return RunRecord(
        identity=decided.identity,
        concept=decided.concept,
        concepts=tuple(decided.all_concepts),
        base=earlier and earlier.record,
        settings=asdict(settings),
        compute=decided.compute.record(),
        model=Models(
            settings.model,
            decided.base_hash,
            change.result_hash,
            origin=earlier.record["model"] if earlier else settings.model,
            origin_hash=earlier.record["model_hash"] if earlier else decided.base_hash,
            base_dtype=change.provenance["base_dtype"],
            part=decided.model.part,
        ),
        mask=None if mask is None else MaskSize(_total(mask), masks.count(mask)),
        weights=Changes(change.total, sum(change.changed.values())),
        data={
            **(images.record if images else {}),
            "fingerprint": outputs.data_hash(decided, images),
            "truncated_prompts": decided.truncated,
        },
        method={"name": settings.method, **decided.method.hyperparameters(), **trained.notes},
        losses=trained.losses,
        seconds=dict(seconds),
        peak_memory_bytes=peak_memory(),
        versions=versions(),
        plugin=methods.origin(settings.method),
        command=[Path(sys.argv[0]).name, *sys.argv[1:]],
    )


def _total(mask: masks.Packed) -> int:
    return sum(bits.numel() for bits in mask.values())


def finished(folder: Path, record: RunRecord, settings: Settings, is_main_process: bool) -> Run:
    """A run that was finished before, verified, with the forms added that it lacks."""
    if not is_main_process:
        return Run(folder, is_new=False, is_main_process=False)
    folders.verify(folder, record)
    outputs.clean(folder)
    there = {"delta", *forms.held(folder, record)}
    added = tuple(form for form in settings.save if form not in there)
    if added:
        forms.add(folder, added, rank=settings.lora_rank)
    return Run(folder, is_new=False, added=added)
