"""The UNet alone of a diffusers folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import (
    UNet2DConditionModel,
)

from erase.errors import EraseError
from erase.families import components, unet_file
from erase.families.components import one_line
from erase.files import default_cache_dir as default_cache_dir


def load_unet(
    folder: Path,
    allow_pickle: bool = False,
    unet: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> UNet2DConditionModel:
    """The UNet alone of a diffusers folder, in float32 on the CPU, as `load` reads it."""
    with reading(folder):
        network = components.load(UNet2DConditionModel, folder / "unet", allow_pickle=allow_pickle)
        if unet is not None:
            for note in unet_file.put_into(network, unet, allow_pickle=allow_pickle):
                tell(note)
    return network


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """One line for files and folders that the system does not let us read."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(source) else ""
        raise EraseError(f"{source!s:.150} cannot be read: {error.strerror or one_line(error)}{where:.150}") from error
    except RuntimeError as error:  # of pathlib: "~" without a home folder, links in a circle
        raise EraseError(f"{source!s:.150} cannot be read: {one_line(error)}") from error
