"""A run's result as a diffusers pipeline folder."""

from pathlib import Path
from typing import Any

import torch

from erase.delta import Layout, State, layout_of, require_layout
from erase.errors import EraseError
from erase.families import architecture
from erase.families.pipeline_folder import (
    WEIGHTS,
    cast,
    component_names,
    files_to_publish,
    network_file,
    network_part,
)
from erase.files import copy, file_hash, read_json, refuse_links
from erase.tensor_files import content_hash, read_tensors, write_tensors


def save_pipeline(
    base_dir: str | Path, output_dir: str | Path, network: State, *, dtype: torch.dtype | None = None
) -> None:
    """Write a pipeline folder that stock diffusers opens: the base model's files with these weights of its network.

    Copied are the components that model_index.json names, and nothing else that lies in the base folder. A component
    that has only variant files (`model.fp16.safetensors`) gets them under the plain name. model_index.json is written
    last, so a folder that opens is whole; weights that an earlier result left in `output_dir` are deleted.

    network: all weights of the trained network (UNet or transformer), named as diffusers names them, without a prefix.
    dtype: of the written floating-point weights; as they are when None.

    Raises:
        EraseError: the base is not a whole Stable Diffusion folder or is the output itself, the weights do not fit its
            network, or a file cannot be written.
    """
    base, output = Path(base_dir), Path(output_dir)
    if base.resolve() == output.resolve():
        raise EraseError(f"{output} is the base model itself; choose another output folder")
    files = dict(files_to_publish(base))
    # diffusers leaves a weight that the file lacks empty, with no more than a warning
    require_layout(layout_of(network), _layout(base), f"the {_called(base)} of {base}", dtypes=False)

    refuse_links(output)
    (output / "model_index.json").unlink(missing_ok=True)
    for component in component_names(base):
        for path in (output / component).glob("*"):
            if WEIGHTS.fullmatch(path.name) and f"{component}/{path.name}" not in files:
                path.unlink()
    for name, source in files.items():
        copy(source, output / name)
    write_tensors(output / network_file(base), {name: cast(tensor, dtype) for name, tensor in network.items()})
    copy(base / "model_index.json", output / "model_index.json")


def is_result(
    base_dir: str | Path, output_dir: str | Path, network: State, *, dtype: torch.dtype | None = None
) -> bool:
    """Whether `output_dir` holds what `save_pipeline` with these arguments writes."""
    base, output = Path(base_dir), Path(output_dir)
    copied = [*files_to_publish(base), ("model_index.json", base / "model_index.json")]
    if not all((output / name).is_file() and file_hash(output / name) == file_hash(path) for name, path in copied):
        return False
    if not (output / network_file(base)).is_file():
        return False
    expected = {name: cast(tensor, dtype) for name, tensor in network.items()}
    return content_hash(read_tensors(output / network_file(base))) == content_hash(expected)


def _layout(base: Path) -> Layout:
    """Of the trained network, by the class in model_index.json and its config."""
    import diffusers

    part = network_part(base)
    cls: Any = getattr(diffusers, architecture.components(base)[part])
    with torch.device("meta"):
        return layout_of(cls.from_config(dict(read_json(base / part / "config.json"))).state_dict())


def _called(base: Path) -> str:
    part = network_part(base)
    return {"unet": "UNet"}.get(part, part)
