"""An earlier run from which this one continues (--base)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erase import masks
from erase.concepts import Concept
from erase.errors import EraseError
from erase.options.settings import Settings
from erase.runs import folders
from erase.runs.record import RunRecord


@dataclass(frozen=True)
class Base:
    """An earlier run to continue from.

    concepts: what it and those before it erased. mask: the weights that were allowed to change; None if all were.
    record: what this run's own records say of it. part: the component that it changed; None is the family's own.
    """

    concepts: list[Concept]
    mask: masks.Packed | None
    record: dict[str, Any]
    part: str | None = None


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
    record = folders.read(folder) if (folder / folders.RECORD).is_file() else None
    if not isinstance(record, RunRecord) or not (folder / "model_index.json").is_file():
        raise EraseError(f"--base is {settings.base!r}, which is no finished run with a pipeline; give a run folder")
    if folder.resolve() == output.resolve():
        raise EraseError(f"--base {settings.base} is this run's own output; choose another --output")
    origin = record.model.origin
    default = Settings.__dataclass_fields__["model"].default
    if settings.model not in {default, origin, settings.base}:
        raise EraseError(f"{settings.base} was made from {origin}, not from {settings.model}; leave out --model")
    folders.verify(folder, record)
    mask_path = folder / "mask.safetensors"
    told = {
        "run": str(folder),
        "model": origin,
        "model_hash": record.model.origin_hash,
        "concepts": [part.name for part in record.concepts],
        "hash": record.model.result_hash,
    }
    return Base(
        list(record.concepts), masks.load(mask_path)[0] if mask_path.is_file() else None, told, record.model.part
    )
