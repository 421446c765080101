"""The files of a run folder, planned and written."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import delta, files, masks
from erase.concepts import Concept
from erase.export import states
from erase.families import pipeline_folder, sd
from erase.options.settings import Settings
from erase.runs import card, forms, records, samples
from erase.runs.earlier import Base
from erase.runs.planning import whole


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


def planned(settings: Settings, folder: Path, model: sd.Model) -> list[str]:
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
    model: sd.Model,
    base_unet: Any,
    new_state: Mapping[str, Tensor],
    change: delta.Delta,
    mask: masks.Packed | None,
    concept: Concept,
    earlier: "Base | None" = None,
) -> None:
    """Everything in the run folder but run.json."""
    delta.save(folder / records.DELTA, change)
    made = folder / "work" / records.MASK
    if made.exists() and earlier is None:
        files.copy(made, folder / records.MASK)
    elif mask is not None:
        header = masks.load(made)[1] if made.exists() else {}
        header |= {"base": settings.model, "base_hash": change.base_hash}
        header |= {"united_with": earlier.record["run"]} if earlier and earlier.mask else {}
        masks.save(folder / records.MASK, mask, header)
    for form in dict.fromkeys(published(settings)):
        forms.write(
            form,
            folder,
            run_folder=folder,
            source=model.folder,
            base={name: tensor.detach() for name, tensor in base_unet.state_dict().items()},
            new=states.plain(new_state),
            rank=whole(settings.lora_rank),
            provenance=change.provenance,
        )
    if settings.num_samples:
        samples.write_samples(folder / records.SAMPLES, model, base_unet, concept, settings)
    dtype = ", dtype=torch.float32" if pipeline_folder.needs_dtype(model.folder) else ""
    loading = f'StableDiffusionPipeline.from_pretrained("this folder"{dtype})'
    text = card.model_card(settings, concept, change, loading=loading, after=earlier and earlier.record)
    files.write_text(folder / records.CARD, text)
