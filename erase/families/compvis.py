"""What the CompVis (LDM) layout of a single-file Stable Diffusion calls the weights that diffusers names otherwise."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from erase.errors import EraseError

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".query.": ".q.",  # these four: files of 2022
    ".key.": ".k.",
    ".value.": ".v.",
    ".proj_attn.": ".proj_out.",
}


def no_layout(config: Mapping[str, Any]) -> str | None:
    """Why a UNet has no place in the CompVis layout, by its configuration; None if it has one."""
    layers = config.get("layers_per_block", 2)
    if isinstance(layers, int):
        return None
    return f"layers_per_block is {layers}; the CompVis layout needs one number for all levels"


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The name of a UNet weight in the CompVis layout, without `model.diffusion_model.`.

    `down_blocks.0.attentions.0.proj_in.weight` is `input_blocks.1.1.proj_in.weight`. CompVis numbers the blocks of all
    levels through: a level takes `layers_per_block` numbers and one more, on the way down for its downsampler.

    config: of the UNet, as in unet/config.json; any number of levels and layers.

    Raises:
        EraseError: the weight has no place in that layout, or levels differ in their number of layers.
    """
    if problem := no_layout(config):
        raise EraseError(problem)
    layers = config.get("layers_per_block", 2)  # diffusers' default
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if not match:
        for start, stem in _ENDS.items():
            if name.startswith(start + "."):
                rest = name.removeprefix(start + ".")
                return f"{stem}.{_resnet_name(rest) if 'resnets' in start else rest}"
        raise EraseError(f"{name!r} has no name in the CompVis layout of Stable Diffusion 1 and 2")
    way, level, kind, item, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    number = level * (layers + 1) + item
    stem = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    if kind == "resnets":
        return f"{stem}.0.{_resnet_name(rest)}"
    if kind == "attentions":
        return f"{stem}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{number + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    slot = 2 if "CrossAttn" in config["up_block_types"][level] else 1
    return f"output_blocks.{number + layers}.{slot}.{rest}"


def unet_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers name -> CompVis name, for the UNet weights with these names; see `unet_name`."""
    return {name: unet_name(name, config) for name in names}


def vae_name(name: str, levels: int) -> str:
    """The name of a VAE weight in the CompVis layout, without `first_stage_model.`.

    levels: of the decoder; CompVis counts them from the image, diffusers from the latent.
    """
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for word, compvis in _VAE.items():
        name = name.replace(word, compvis)
    return name


def _resnet_name(rest: str) -> str:
    layer, _, end = rest.partition(".")
    return f"{_RESNET[layer]}.{end}"
