"""All weights of a pipeline folder under the names of single checkpoint files, those of the original code."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from erase.delta import State
from erase.families import compvis
from erase.families.pipeline_folder import read_weights
from erase.files import read_json

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
_SD2_LAYERS = 24  # of the text encoder of Stable Diffusion 2, which uses the states after the last but one
_LOGIT_SCALE = math.log(100)  # where OpenCLIP's training ends; no image depends on it


def sd1(folder: Path, unet: State | None = None, text_encoder: State | None = None) -> dict[str, Tensor]:
    """The CompVis (LDM) layout of Stable Diffusion 1.

    unet, text_encoder: their weights; those in the folder if None.

    Raises:
        EraseError: a component has no weights, or the UNet's have no place in the layout.
    """
    return {
        **_unet(folder, unet),
        **_vae(folder),
        **_clip(text_encoder or read_weights(folder / "text_encoder"), "cond_stage_model.transformer.text_model."),
    }


def sd2(folder: Path, unet: State | None = None, text_encoder: State | None = None) -> dict[str, Tensor]:
    """The layout of Stability AI's Stable Diffusion 2: Stable Diffusion 1's with an OpenCLIP text encoder.

    unet, text_encoder: their weights; those in the folder if None.

    Raises:
        EraseError: a component has no weights, or the UNet's have no place in the layout.
    """
    weights = text_encoder or read_weights(folder / "text_encoder")
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in weights.items()}
    second = _with_unused(open_clip(text))
    return {
        **_unet(folder, unet),
        **_vae(folder),
        **{f"cond_stage_model.model.{name}": tensor for name, tensor in second.items()},
    }


def _with_unused(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what diffusers left out of the encoder: its 24th layer and its projection, which no image depends on.

    Software that builds the original encoder looks for them. The layer is a copy of the one before, and the projection
    the identity; sd-scripts writes such a layer too.
    """
    width = len(text["ln_final.weight"])
    unused = {"text_projection": torch.eye(width, dtype=text["ln_final.weight"].dtype)}
    if sum(name.endswith("ln_1.weight") for name in text) == _SD2_LAYERS - 1:
        last = f"resblocks.{_SD2_LAYERS - 2}."
        unused |= {n.replace(last, f"resblocks.{_SD2_LAYERS - 1}."): t.clone() for n, t in text.items() if last in n}
    return text | unused


def sdxl(folder: Path, unet: State | None = None) -> dict[str, Tensor]:
    """The layout of Stability AI's generative-models, with the empty tensors by which ComfyUI knows predictions of v.

    unet: the UNet's weights; those in the folder if None.

    Raises:
        EraseError: a component has no weights, or the UNet's have no place in the layout.
    """
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    marks = {
        "v_pred": scheduler.get("prediction_type") == "v_prediction",
        "ztsnr": scheduler.get("rescale_betas_zero_snr") is True,
    }
    second = open_clip(read_weights(folder / "text_encoder_2"))
    return {
        **_unet(folder, unet),
        **_vae(folder),
        **_clip(read_weights(folder / "text_encoder"), "conditioner.embedders.0.transformer.text_model."),
        **{f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()},
        **{name: torch.zeros(0) for name, is_marked in marks.items() if is_marked},
    }


def open_clip(weights: State) -> dict[str, Tensor]:
    """The weights of a CLIP text model, with or without projection, under OpenCLIP's names, with its logit scale.

    OpenCLIP stacks the projections of queries, keys and values, and multiplies by the transposed `text_projection`.
    """
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(_LOGIT_SCALE)}
    for name, tensor in weights.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif match := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name):
            stacked = [weights[f"{match[1]}.self_attn.{one}_proj.{match[2]}"] for one in "qkv"]
            found[f"{_renamed(match[1] + '.')}attn.in_proj_{match[2]}"] = torch.cat(stacked)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|position_ids$", name):
            found[_renamed(name)] = tensor
    return found


def _renamed(name: str) -> str:
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def _unet(folder: Path, unet: State | None) -> dict[str, Tensor]:
    weights = read_weights(folder / "unet") if unet is None else unet
    names = compvis.unet_names(weights, read_json(folder / "unet" / "config.json"))
    return {f"model.diffusion_model.{names[name]}": tensor for name, tensor in weights.items()}


def _vae(folder: Path) -> dict[str, Tensor]:
    levels, found = len(read_json(folder / "vae" / "config.json")["up_block_types"]), {}
    for name, tensor in read_weights(folder / "vae").items():
        name = compvis.vae_name(name, levels)
        is_attention = ".attn_1." in name and tensor.ndim == 2
        found[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_attention else tensor  # 1x1 convolution
    return found


def _clip(weights: State, prefix: str) -> dict[str, Tensor]:
    named = {name: prefix + name.removeprefix("text_model.") for name in weights if not name.endswith("position_ids")}
    return {named[name]: weights[name] for name in named}  # position_ids, 0 to 76, are in old files only
