"""Names of a UNet's weights: the block that each is in, and whether a LoRA can hold it."""

import re

from torch import Tensor


def block_of(name: str) -> str:
    """The block of a UNet weight, for tables: "conv_in", "time_embedding", "down_blocks.0 attn2", "mid_block resnet".

    Norms inside a transformer count to the layer that they feed; a name from elsewhere gives its first part.
    """
    name = name.removeprefix("unet.")
    match = re.match(r"((?:down|up)_blocks\.\d+|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(.+)", name)
    if not match:
        return name.split(".")[0].replace("conv_norm_out", "conv_out")
    block, kind, rest = match.groups()
    if kind != "attentions":
        return f"{block} {'resnet' if kind == 'resnets' else 'sampler'}"
    part = re.match(r"\d+\.transformer_blocks\.\d+\.(\w+)", rest)
    fed = {"norm1": "attn1", "norm2": "attn2", "norm3": "ff"}
    return f"{block} {fed.get(part[1], part[1]) if part else 'proj'}"


def fits_lora(name: str, weight: Tensor) -> bool:
    """Linear layers and 1x1 convolutions of the transformer blocks."""
    return ".attentions." in name and weight.ndim >= 2 and all(size == 1 for size in weight.shape[2:])


def layer_of(weight: str) -> str:
    """The layer that a weight belongs to: its name without the last part."""
    return weight.rpartition(".")[0]


def lora_name(layer: str) -> str:
    """A layer of the UNet as kohya's trainer (sd-scripts) names it in LoRA files."""
    return "lora_unet_" + layer.replace(".", "_")
