"""Load a model from a folder, the hub or a single file, as the family that serves its pipeline reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from erase.errors import EraseError
from erase.families import architecture, registry, single_file
from erase.families.hub import download
from erase.families.protocol import Family
from erase.families.stored_unet import reading
from erase.files import default_cache_dir as default_cache_dir
from erase.options.model_classes import MINI_PIXEL, MINI_PIXEL_DIR

MINI_DIR = Path(__file__).parents[1] / "mini" / "weights"


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    unet: str | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> Family:
    """A model in float32 from 'mini', 'mini-pixel', a diffusers folder, a hub id or a single checkpoint file.

    allow_pickle: accept weights that are not safetensors (.ckpt, .bin).
    unet: a file of weights of the network, all or some, that replace the model's; see `Family.from_folder`.
    config: a diffusers folder whose configs and tokenizer a single file is read with; without one they come from
        the hub.
    cache_dir: where a single file is converted to a diffusers folder, once.

    Raises:
        EraseError: not found, unreachable, broken, incomplete, or of an architecture that no family knows.
    """
    with reading(source):
        folder, notes = _locate(source, allow_pickle, config, revision, cache_dir)
        family = family_of(folder, source)
        model = family.from_folder(source, folder, allow_pickle=allow_pickle, weights_file=unet)
    model.notes = (*notes, *model.notes)
    model.to(torch.device(device))
    return model


def family_of(folder: Path, source: str | Path | None = None) -> type[Family]:
    """The family that serves a pipeline folder, by the class name in its model_index.json and its architecture.

    source: what the user gave, for messages; the folder if None.

    Raises:
        EraseError: it is no pipeline folder, or of an architecture that no family knows.
    """
    source = folder if source is None else source
    family = registry.serving(architecture.pipeline_class(folder))
    kind = family.other_kind(folder)
    if kind:
        raise architecture.refusal(source, kind)
    return family


def keep(pipeline: Any, cache_dir: Path | None = None) -> Path:
    """The folder of a pipeline in memory, written to the cache once with the same bits.

    Raises:
        EraseError: see `Family.keep`.
    """
    return registry.serving(type(pipeline).__name__).keep(pipeline, cache_dir)


def locate(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    config: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """The local diffusers folder of a model: its own, the hub's snapshot, or a converted single file.

    tell: called with lines for the user about how it was made.
    """
    with reading(source):
        folder, notes = _locate(source, allow_pickle, config, revision, cache_dir)
        family_of(folder, source)
    for note in notes:
        tell(note)
    return folder


def _locate(
    source: str | Path, allow_pickle: bool, config: str | None, revision: str | None, cache_dir: Path | None
) -> tuple[Path, list[str]]:
    """The folder, and lines for the user about how it was made."""
    if str(source) in {"mini", MINI_PIXEL}:
        return MINI_DIR if str(source) == "mini" else MINI_PIXEL_DIR, []
    path = Path(source).expanduser()
    if path.is_dir():
        return path, []
    if path.suffix in single_file.SUFFIXES:
        if not path.is_file():
            raise EraseError(f"{path}: no such file")
        family = registry.reading(single_file.shapes(path, allow_pickle=allow_pickle))
        return family.convert(path, allow_pickle=allow_pickle, config=config, cache_dir=cache_dir)
    if _is_local(str(source)):
        raise EraseError(f"no model {str(source)!r}: there is no such folder")
    if "/" not in str(source):
        raise EraseError(
            f"no model {str(source)!r}: it is not 'mini' or 'mini-pixel', a folder, a checkpoint file or a hub id"
        )
    return download(str(source), revision, allow_pickle), []


def _is_local(source: str) -> bool:
    """Whether a text that is no existing folder is the path of one: no hub id, or one in a folder that exists."""
    if source.startswith(("/", ".", "~", "runs/")) or source.count("/") > 1:
        return True
    return "/" in source and Path(source).parent.is_dir()
