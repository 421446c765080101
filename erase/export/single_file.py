"""A run's result as a single checkpoint file, in the layout of the original code, which ComfyUI and A1111 load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from erase.delta import State
from erase.errors import EraseError
from erase.families import loading
from erase.families.pipeline_folder import cast
from erase.tensor_files import write_tensors


def save_single_file(
    path: str | Path,
    pipeline_dir: str | Path,
    *,
    weights: State | None = None,
    part: str | None = None,
    dtype: Literal["fp16", "fp32"] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write all networks of a pipeline folder as one checkpoint in the original layout of its family.

    weights: those of the trained network, which is `part`, by default the family's (the UNet); None: the folder's.
    dtype: of the written weights; None is the family's `checkpoint_dtype`.
    provenance: JSON-serialisable; goes into the header.

    Raises:
        EraseError: the folder's family has no such layout, or a component has no weights.
    """
    folder = Path(pipeline_dir)
    family = loading.family_of(folder)
    family = family if part is None else family.trains(part)
    problem = family.no_checkpoint(folder)
    if problem:
        raise EraseError(f"{folder}: {problem}; use the folder")
    number = {"fp16": torch.float16, "fp32": torch.float32}[dtype or family.checkpoint_dtype]
    tensors = {name: cast(tensor, number) for name, tensor in family.checkpoint(folder, weights).items()}
    write_tensors(path, tensors, provenance)
