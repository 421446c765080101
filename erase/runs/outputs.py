"""The files of a run folder: delta, mask, published forms, samples, model card."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import delta, files, masks
from erase.data import latents
from erase.errors import EraseError
from erase.families import pipeline_folder
from erase.runs import card, folders, forms, samples
from erase.runs.decisions import Decisions
from erase.runs.planning import whole
from erase.version import __version__


def write(decided: Decisions, images: latents.Data | None, mask: masks.Packed | None) -> delta.Delta:
    """Write everything in the run folder but run.json; returns the change from the base model.

    images: those that were trained on. The model has the weights of its base again if samples were generated.

    Raises:
        EraseError: the base changed on the disk meanwhile, or a weight outside the mask or the scope changed; nothing
            is written then.
    """
    model = decided.model
    new, stored = model.state_of(model.network), model.stored_weights()
    change = delta.difference(delta.Component(model.part, stored), new, provenance(decided, images))
    if change.base_hash != decided.base_hash:
        raise EraseError(f"{model.folder} changed on the disk during the run; nothing was written, start again")
    if outside := outside_of(change, model.part, decided.parameters, mask):
        raise EraseError(
            f"{outside[0]!r} changed outside the mask or the scope; nothing was published. Delete {decided.work}, and "
            "the same command starts again"
        )
    delta.save(decided.folder / folders.DELTA, change)
    write_mask(decided, change, mask)
    write_forms(decided, stored, new, change)
    if decided.settings.num_samples:
        where = decided.compute.device  # weights that were divided are on the CPU
        samples.write_samples(decided.folder / folders.SAMPLES, model, decided.concept, decided.settings, where)
    loading = "\n".join(model.loading_code(model.folder, '"this folder"'))
    after = decided.earlier and decided.earlier.record
    how: dict[str, Any] = {"family": type(model), "loading": loading, "after": after, "anchors": decided.method.anchors}
    text = card.model_card(decided.settings, decided.concept, change, **how)
    files.write_text(decided.folder / folders.CARD, text)
    return change


def provenance(decided: Decisions, images: latents.Data | None) -> dict[str, Any]:
    """How the change was made, for the delta's header."""
    settings, model = decided.settings, decided.model
    made = {
        "erase_version": __version__,
        "base": settings.model,
        "concept": asdict(decided.concept),
        "method": settings.method,
        "hyperparameters": decided.method.hyperparameters(),
        "settings": decided.identity["settings"],
        "data": data_hash(decided, images),
        "made_for": settings.model,
        "base_dtype": None if settings.unet else pipeline_folder.stored_dtype(model.folder / model.part),
    }
    return made if decided.earlier is None else made | {"after": decided.earlier.record}


def data_hash(decided: Decisions, images: latents.Data | None) -> str:
    """Hash of the training data; of the concept and the model only if no images were used."""
    return images.fingerprint if images else files.text_hash([decided.concept.fingerprint(), decided.base_hash])


def write_mask(decided: Decisions, change: delta.Delta, mask: masks.Packed | None) -> None:
    """mask.safetensors, if there is a mask; one that was united with an earlier run's says so."""
    made, earlier = decided.work / folders.MASK, decided.earlier
    if made.exists() and earlier is None:
        files.copy(made, decided.folder / folders.MASK)
    elif mask is not None:
        how = dict(masks.load(made)[1].made) if made.exists() else {}
        how |= {"base": decided.settings.model, "base_hash": change.base_hash}
        how |= {"united_with": earlier.record["run"]} if earlier and earlier.mask else {}
        masks.save(decided.folder / folders.MASK, mask, how)


def write_forms(decided: Decisions, stored: delta.State, new: delta.State, change: delta.Delta) -> None:
    """The forms that --save asks for. stored: the base's weights, as the network names them."""
    for form in dict.fromkeys(forms.published(decided.settings)):
        forms.write(
            form,
            decided.folder,
            run_folder=decided.folder,
            source=decided.model.folder,
            part=decided.model.part,
            base=stored,
            new=delta.in_component(decided.model.part, new),
            rank=whole(decided.settings.lora_rank),
            provenance=change.provenance,
            tell=decided.tell,
        )


def outside_of(
    change: delta.Delta, component: str, parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None
) -> list[str]:
    """Names of the weights of which some changed that are outside the scope or the mask.

    component: the one that the change is of. parameters: those in the scope, by name.
    """
    found = []
    for plain, name in delta.in_component(component, {name: name for name in change.changed}).items():
        may = None if mask is None or plain not in parameters else mask[plain].reshape(-1)
        if plain not in parameters or may is not None and (delta.changed_bits(change, name) & ~may).any():
            found.append(plain)
    return found


def clean(folder: Path) -> None:
    """Delete intermediate state, which a finished run does not need any more."""
    if (folder / "work").is_dir():
        files.refuse_links(folder)
        shutil.rmtree(folder / "work")
