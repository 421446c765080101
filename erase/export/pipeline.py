"""A run's result as a diffusers pipeline folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from erase.delta import Layout, State, layout_of, require_layout
from erase.errors import EraseError
from erase.families.pipeline_folder import UNET_FILE, WEIGHTS, cast, component_names, files_to_publish
from erase.files import copy, file_hash, read_json, refuse_links
from erase.tensor_files import content_hash, read_tensors, write_tensors

Config = Mapping[str, Any]


def save_pipeline(
    base_dir: str | Path, output_dir: str | Path, unet_state: State, *, dtype: torch.dtype | None = None
) -> None:
    """Write a pipeline folder that stock diffusers opens: the base model's files with these UNet weights.

    Copied are the components that model_index.json names, and nothing else that lies in the base folder. A component
    that has only variant files (`model.fp16.safetensors`) gets them under the plain name. model_index.json is written
    last, so a folder that opens is whole; weights that an earlier result left in `output_dir` are deleted.

    unet_state: all weights of the UNet, named as diffusers names them, without a prefix.
    dtype: of the written floating-point weights; as they are when None.

    Raises:
        EraseError: the base is not a whole Stable Diffusion folder or is the output itself, the weights do not fit its
            UNet, or a file cannot be written.
    """
    base, output = Path(base_dir), Path(output_dir)
    if base.resolve() == output.resolve():
        raise EraseError(f"{output} is the base model itself; choose another output folder")
    files = dict(files_to_publish(base))
    # diffusers leaves a weight that the file lacks empty, with no more than a warning
    unet = _unet_layout(read_json(base / "unet" / "config.json"))
    require_layout(layout_of(unet_state), unet, f"the UNet of {base}", dtypes=False)

    refuse_links(output)
    (output / "model_index.json").unlink(missing_ok=True)
    for component in component_names(base):
        for path in (output / component).glob("*"):
            if WEIGHTS.fullmatch(path.name) and f"{component}/{path.name}" not in files:
                path.unlink()
    for name, source in files.items():
        copy(source, output / name)
    write_tensors(output / UNET_FILE, {name: cast(tensor, dtype) for name, tensor in unet_state.items()})
    copy(base / "model_index.json", output / "model_index.json")


def is_result(
    base_dir: str | Path, output_dir: str | Path, unet_state: State, *, dtype: torch.dtype | None = None
) -> bool:
    """Whether `output_dir` holds what `save_pipeline` with these arguments writes."""
    base, output = Path(base_dir), Path(output_dir)
    copied = [*files_to_publish(base), ("model_index.json", base / "model_index.json")]
    if not all((output / name).is_file() and file_hash(output / name) == file_hash(path) for name, path in copied):
        return False
    if not (output / UNET_FILE).is_file():
        return False
    expected = {name: cast(tensor, dtype) for name, tensor in unet_state.items()}
    return content_hash(read_tensors(output / UNET_FILE)) == content_hash(expected)


def _unet_layout(config: Config) -> Layout:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return layout_of(unet.state_dict())
