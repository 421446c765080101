"""The forms in which a result is published, at the end of a run or later: folder, network alone, single file, LoRA."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import delta, files, tensor_files
from erase.delta import State
from erase.errors import EraseError
from erase.export import lora, pipeline
from erase.export.single_file import save_single_file
from erase.families import loading, pipeline_folder
from erase.families.layers import fits_lora
from erase.options.settings import Settings
from erase.runs import folders
from erase.runs.record import RunRecord

FORMS = ("pipeline", "unet", "single-file", "lora")


def names(form: str, run_folder: Path, source: Path, part: str) -> list[str]:
    """The files of a form, relative to the folder that it is written to.

    source: diffusers folder that the parts other than the network come from. part: the component that is trained.
    """
    if form == "pipeline":
        return pipeline_folder.published_names(source, part)
    return {"unet": [folders.UNET], "lora": [folders.LORA], "single-file": [single_file(run_folder)], "delta": []}[form]


def published(settings: Settings) -> list[str]:
    """The forms to write; a single file comes with the folder that it is made from."""
    return ["pipeline", *settings.save] if "single-file" in settings.save else list(settings.save)


def planned(settings: Settings, folder: Path, source: Path, part: str) -> list[str]:
    """The files that the run will write, run.json apart, relative to its folder.

    source: diffusers folder of the base model. part: the component that is trained.
    """
    files = [folders.DELTA, folders.CARD]
    files += [folders.MASK] if settings.mask != "none" or settings.base else []
    files += [folders.SAMPLES] if settings.num_samples else []
    return files + [name for form in published(settings) for name in names(form, folder, source, part)]


def require_writable(forms: Sequence[str], source: Path, changing: Mapping[str, Tensor], part: str) -> None:
    """Refuse forms that a model cannot be written in.

    source: diffusers folder of the base model. changing: the network's weights that may change, by name.
    part: that network.

    Raises:
        EraseError: one cannot be written; the message says why.
    """
    own = loading.family_of(source)
    family = own.trains(part)
    if "unet" in forms and part != own.part:
        raise EraseError(
            f"the form unet has the weights of the {own.part}, and this run changes the {part}; leave it out"
        )
    if "single-file" in forms and (problem := family.no_checkpoint(source)):
        raise EraseError(f"no single file can be written: {problem}; leave out single-file")
    if "lora" in forms:
        fitting = [name for name, weight in changing.items() if fits_lora(name, weight)]
        problem = "" if fitting else "no attention or feed-forward layer may change with this scope and mask"
        if not family.lora_names(source, changing):
            problem = f"{family.family} has no names for LoRA layers of its {part}"
        if problem:
            raise EraseError(f"no LoRA can be written: {problem}; leave out lora")


def single_file(run_folder: Path) -> str:
    """The name of the single file: that of the run folder, unless another file has it."""
    name = f"{run_folder.resolve().name}.safetensors"
    return f"checkpoint-{name}" if name in folders.KNOWN else name


def held(run_folder: Path, record: RunRecord) -> list[str]:
    """The forms that a finished run's folder holds."""
    known = {"pipeline": "model_index.json", "unet": folders.UNET, "lora": folders.LORA}
    forms = [form for form, name in known.items() if name in record.files]
    others = [name for name in record.files if "/" not in name and name.endswith(".safetensors")]
    return forms + (["single-file"] if set(others) - set(folders.KNOWN) else [])


def write(
    form: str,
    target: Path,
    *,
    run_folder: Path,
    source: Path,
    part: str,
    base: State,
    new: State,
    rank: int,
    provenance: Mapping[str, Any],
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write one form to the folder `target`.

    part: the component that was trained. base, new: its weights before and after, named as the library names them.
    rank: of a LoRA.
    tell: called with a line about how much of the change a LoRA holds.
    """
    if form == "pipeline" and source.resolve() != target.resolve():
        pipeline.save_pipeline(source, target, new, part=part)
    elif form == "unet":
        tensor_files.write_tensors(target / folders.UNET, new)
    elif form == "lora":
        family = loading.family_of(source).trains(part)
        names, labels = family.lora_names(source, base), family.lora_labels(source)
        fit = lora.save_lora(target / folders.LORA, base, new, rank=rank, names=names, labels=labels)
        tell(f"LoRA of rank {rank}: {fit.summary()}")
    elif form == "single-file":
        save_single_file(target / single_file(run_folder), source, weights=new, part=part, provenance=provenance)


def add(
    run_folder: Path,
    forms: Sequence[str],
    *,
    output: Path | None = None,
    rank: int | None = None,
    model: str | None = None,
    config: str | None = None,
    allow_pickle: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Path]:
    """Write other forms of a finished run, verified first; returns the folder or file of each.

    output: folder for them instead of the run folder, whose record names them otherwise.
    rank: of a LoRA; None is the run's setting. model: the base, if it is no longer where the run found it.
    tell: see `write`.

    Raises:
        EraseError: no finished run, files that are missing or altered, or a base that cannot be loaded.
    """
    record = folders.read_finished(run_folder)
    folders.verify(run_folder, record)
    files.refuse_links(run_folder)
    change, settings = delta.load(run_folder / folders.DELTA), record.settings
    if "pipeline" in held(run_folder, record):
        source, family = run_folder, loading.family_of(run_folder).trains(change.component)
        after = family.state_of(family.read_network(run_folder))
        before = delta.remove(after, change) if "lora" in forms else after
    else:
        source = loading.locate(
            model or record.model.name,
            allow_pickle=allow_pickle or bool(settings.get("allow_pickle")),
            config=config or settings.get("config"),
            revision=settings.get("revision") if model is None else None,
        )
        family = loading.family_of(source).trains(change.component)
        pickles = allow_pickle or bool(settings.get("allow_pickle"))
        weights_file = settings.get("unet") if model is None else None
        before = family.state_of(family.read_network(source, allow_pickle=pickles, weights_file=weights_file))
        after = delta.apply(before, change)
    target = output or run_folder
    changed = {name: after[name] for name in change.changed}
    require_writable(forms, source, delta.in_component(family.part, changed), family.part)
    for form in forms:
        write(
            form,
            target,
            run_folder=run_folder,
            source=source,
            part=family.part,
            base=delta.in_component(family.part, before),
            new=delta.in_component(family.part, after),
            rank=rank or settings.get("lora_rank") or 64,
            provenance=change.provenance,
            tell=tell,
        )
    written = [name for form in forms for name in names(form, run_folder, source, family.part)]
    if target.resolve() == run_folder.resolve():
        folders.finish(run_folder, record, [*record.files, *written])
    return {
        form: target if form == "pipeline" else target / names(form, run_folder, source, family.part)[0]
        for form in forms
    }
