"""A run's result as a single checkpoint file, with the names of the original (CompVis) code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from erase.delta import State
from erase.errors import EraseError
from erase.families import compvis
from erase.families.pipeline_folder import cast, component_names, read_weights
from erase.files import read_json
from erase.tensor_files import write_tensors


def save_single_file(
    path: str | Path,
    pipeline_dir: str | Path,
    *,
    unet: State | None = None,
    dtype: Literal["fp16", "fp32"] = "fp16",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write UNet, VAE and text encoder of a Stable Diffusion 1 folder as one checkpoint in the CompVis (LDM) layout.

    unet: the UNet's weights; those in the folder if None. provenance: JSON-serialisable; goes into the header.

    Raises:
        EraseError: the folder is not Stable Diffusion 1, or a component has no weights.
    """
    folder = Path(pipeline_dir)
    text_config = read_json(folder / "text_encoder" / "config.json")
    if "text_encoder_2" in component_names(folder) or text_config.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise EraseError(f"{folder}: only Stable Diffusion 1 models have this single-file layout; use the folder")
    unet_config = read_json(folder / "unet" / "config.json")
    levels = len(read_json(folder / "vae" / "config.json")["up_block_types"])
    checkpoint: dict[str, Tensor] = {}
    for name, tensor in (unet if unet is not None else read_weights(folder / "unet")).items():
        checkpoint[f"model.diffusion_model.{compvis.unet_name(name, unet_config)}"] = tensor
    for name, tensor in read_weights(folder / "vae").items():
        name = compvis.vae_name(name, levels)
        is_attention = ".attn_1." in name and tensor.ndim == 2
        checkpoint[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_attention else tensor  # 1x1 conv
    for name, tensor in read_weights(folder / "text_encoder").items():
        if not name.endswith("position_ids"):  # 0 to 76, in old files only
            checkpoint[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    number = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    write_tensors(path, {name: cast(tensor, number) for name, tensor in checkpoint.items()}, provenance)
