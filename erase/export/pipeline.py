"""A run's result as a diffusers pipeline folder."""

from pathlib import Path
from typing import Any

import torch

from erase.delta import Layout, State, layout_of, require_layout
from erase.errors import EraseError
from erase.families import architecture
from erase.families.ddpm import UNETS
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
    base_dir: str | Path,
    output_dir: str | Path,
    network: State,
    *,
    dtype: torch.dtype | None = None,
    part: str | None = None,
) -> None:
    """Write a pipeline folder that stock diffusers opens: the base model's files with these weights of its network.

    Copied are the components that model_index.json names, and nothing else that lies in the base folder. A component
    that has only variant files (`model.fp16.safetensors`) gets them under the plain name. model_index.json is written
    last, so a folder that opens is whole; weights that an earlier result left in `output_dir` are deleted.

    network: all weights of the trained network, named as the library names them, without a prefix.
    dtype: of the written floating-point weights; as they are when None.
    part: the component that was trained; None is the family's own (UNet or transformer).

    Raises:
        EraseError: the base is not a whole Stable Diffusion folder or is the output itself, the weights do not fit its
            network, or a file cannot be written.
    """
    base, output = Path(base_dir), Path(output_dir)
    if base.resolve() == output.resolve():
        raise EraseError(f"{output} is the base model itself; choose another output folder")
    part = part or network_part(base)
    files = dict(files_to_publish(base, part))
    # the libraries leave a weight that the file lacks empty, with no more than a warning
    require_layout(layout_of(network), _layout(base, part), f"the {_called(part)} of {base}", dtypes=False)

    refuse_links(output)
    (output / "model_index.json").unlink(missing_ok=True)
    for component in component_names(base):
        for path in (output / component).glob("*"):
            if WEIGHTS.fullmatch(path.name) and f"{component}/{path.name}" not in files:
                path.unlink()
    for name, source in files.items():
        copy(source, output / name)
    write_tensors(output / network_file(part), _stored(part, network, dtype))
    copy(base / "model_index.json", output / "model_index.json")


def is_result(
    base_dir: str | Path,
    output_dir: str | Path,
    network: State,
    *,
    dtype: torch.dtype | None = None,
    part: str | None = None,
) -> bool:
    """Whether `output_dir` holds what `save_pipeline` with these arguments writes."""
    base, output = Path(base_dir), Path(output_dir)
    part = part or network_part(base)
    copied = [*files_to_publish(base, part), ("model_index.json", base / "model_index.json")]
    if not all((output / name).is_file() and file_hash(output / name) == file_hash(path) for name, path in copied):
        return False
    if not (output / network_file(part)).is_file():
        return False
    expected = content_hash(_stored(part, network, dtype))
    return content_hash(read_tensors(output / network_file(part))) == expected


def _layout(base: Path, part: str) -> Layout:
    """Of a network, by the class in model_index.json and its config."""
    import diffusers
    import transformers

    name, config = architecture.components(base)[part], read_json(base / part / "config.json")
    with torch.device("meta"):
        cls: Any = UNETS.get(name) or getattr(diffusers, name, None)
        if cls is not None:
            return layout_of(cls.from_config(dict(config)).state_dict())
        cls = getattr(transformers, name)
        return layout_of(cls(cls.config_class.from_dict(dict(config))).state_dict())


def _stored(part: str, network: State, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The weights as the file has them; a text encoder's under names that all versions of transformers read."""
    prefix = "text_model." if part.startswith("text_encoder") else ""
    return {prefix + name.removeprefix(prefix): cast(tensor, dtype) for name, tensor in network.items()}


def _called(part: str) -> str:
    return {"unet": "UNet", "text_encoder": "text encoder"}.get(part, part)
