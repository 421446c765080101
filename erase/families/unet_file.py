"""Files that hold the weights of a UNet alone, as ESD, UCE, SalUn and `--save unet` publish them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erase import pickles
from erase.errors import EraseError, no_file
from erase.families import architecture, compvis
from erase.families.components import require_finite
from erase.tensor_files import read_metadata, read_tensors

_PREFIXES = ("module.", "unet.", "model.diffusion_model.", "diffusion_model.", "model.")
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".tar"}


def put_into(unet: Any, path: str | Path, *, allow_pickle: bool) -> list[str]:
    """Replace weights of a UNet of diffusers by those of a file, and return lines about it for the user.

    Names are diffusers' or CompVis' (`model.diffusion_model.*` or `input_blocks.*`), with prefixes such as `unet.` and
    `module.`. The file may hold a part of the weights only: ESD publishes the layers that it trained.

    Raises:
        EraseError: the file cannot be read, holds a name or shape that the UNet does not have, or values that are not
            finite floating-point numbers; the UNet is as it was then.
    """
    path = Path(path).expanduser()
    stored, notes = _read(path, allow_pickle)
    weights: dict[str, Tensor] = unet.state_dict()
    named = _rename(path, list(stored), weights, unet.config)
    for theirs, ours in named.items():
        stored[theirs] = _fitted(path, theirs, stored[theirs], weights[ours])
    require_finite(path, stored.items())
    with torch.no_grad():
        for theirs, ours in named.items():
            weights[ours].copy_(stored[theirs])
    return [*notes, f"{path} replaces {len(named)} of the UNet's {len(weights)} tensors"]


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], list[str]]:
    if path.suffix == ".safetensors":
        if read_metadata(path).get("kind") in {"mask", "exact", "additive"}:
            raise EraseError(f"{path} is a delta or a mask, not the weights of a UNet")
        return read_tensors(path), []
    if not path.is_file():
        raise EraseError(f"{no_file(path)}; give a file of UNet weights (.safetensors)")
    if path.suffix not in PICKLES:
        raise EraseError(f"{path} is no file of weights; give .safetensors, or .pt, .pth, .bin or .ckpt")
    pickles.require_allowed(path, allow_pickle)
    stored, stubs = pickles.tensors(path)
    return stored, [pickles.stubbed(path, stubs)] if stubs else []


def _rename(path: Path, names: list[str], weights: dict[str, Tensor], config: Any) -> dict[str, str]:
    """Name in the file -> name in the UNet."""
    lora = architecture.attached_lora(names)
    if lora:
        raise EraseError(f"{path} is a LoRA ({lora!r:.80}), not the weights of a UNet; merge it into its base first")
    if not names:
        raise EraseError(f"{path} holds no weights")
    if any(
        name.startswith(("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoder."))
        for name in names
    ):
        raise EraseError(f"{path} is a whole checkpoint, not the weights of a UNet alone; give it as the model itself")
    compvis_names: dict[str, str] = {}
    found: dict[str, str] = {}
    for name in names:
        bare = name
        while bare not in weights and bare not in compvis_names:
            prefix = next((prefix for prefix in _PREFIXES if bare.startswith(prefix)), None)
            if prefix is not None:
                bare = bare.removeprefix(prefix)
            elif not compvis_names:
                compvis_names = {theirs: ours for ours, theirs in compvis.unet_names(weights, config).items()}
            else:
                raise EraseError(f"{path}: the UNet of the base model has no weight {name!r:.100}")
        ours = bare if bare in weights else compvis_names[bare]
        if ours in found.values():
            raise EraseError(f"{path} holds the weight {ours!r} twice")
        found[name] = ours
    return found


def _fitted(path: Path, name: str, tensor: Tensor, weight: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise EraseError(f"{path}: {name!r:.100} is stored as {kind}; give weights in float32, float16 or bfloat16")
    if tensor.shape == weight.shape:
        return tensor
    if tensor.numel() == weight.numel() and {*tensor.shape[2:], *weight.shape[2:]} == {1}:  # linear or 1x1 convolution
        return tensor.reshape(weight.shape)
    raise EraseError(
        f"{path}: {name!r:.100} has the shape {list(tensor.shape)} but {list(weight.shape)} in the base model's UNet"
    )
