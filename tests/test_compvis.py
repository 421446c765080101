"""Laws of the CompVis names: diffusers reads them back as its own, and they are those of the published checkpoints."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from erase.errors import EraseError
from erase.families.compvis import unet_name, unet_names

SD14: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768)  # on top of the defaults of UNet2DConditionModel
SMALL: dict[str, Any] = dict(sample_size=8, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2)
TOPOLOGIES: list[dict[str, Any]] = [
    dict(block_out_channels=(4, 8, 16, 16)),
    dict(
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    dict(block_out_channels=(4, 8, 16, 16), use_linear_projection=True),  # Stable Diffusion 2
    dict(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    ),  # Stable Diffusion XL
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=["sd1", "three-levels", "sd2", "sdxl"])
def test_compvis_names_are_those_that_diffusers_reads(topology):
    unet = UNet2DConditionModel(**SMALL, **topology)
    state = unet.state_dict()
    names = unet_names(state, unet.config)
    assert names.keys() == state.keys() and len(set(names.values())) == len(names)
    checkpoint = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in state.items()}
    back = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)
    first, second = "mid_block.resnets.0.norm1.weight", "mid_block.resnets.1.norm1.weight"  # control: two names swapped
    swapped = names | {first: names[second], second: names[first]}
    checkpoint = {f"model.diffusion_model.{swapped[name]}": tensor for name, tensor in state.items()}
    assert convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))[first] is state[second]


def test_the_full_size_name_map_has_the_686_tensors_of_stable_diffusion_1():
    """Right-hand names are those of the published v1-inference checkpoints."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14)
    names = unet_names(unet.state_dict(), unet.config)
    assert len(names) == len(set(names.values())) == 686
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    published = {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.time_emb_proj.bias": "middle_block.2.emb_layers.1.bias",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "output_blocks.11.0.skip_connection.weight",
        "conv_norm_out.weight": "out.0.weight",
        "conv_out.weight": "out.2.weight",
    }
    assert {name: names[name] for name in published} == published
    assert unet_name("conv_in.weight", unet.config) == "input_blocks.0.0.weight"


SDXL: dict[str, Any] = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


def test_the_full_size_name_map_has_the_1680_tensors_of_stable_diffusion_xl():
    """Right-hand names are those of the published base model."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    names = unet_names(unet.state_dict(), unet.config)
    assert len(names) == len(set(names.values())) == 1680
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    published = {
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight": (
            "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"
        ),
        "down_blocks.2.attentions.1.proj_in.weight": "input_blocks.8.1.proj_in.weight",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2.bias": (
            "middle_block.1.transformer_blocks.9.ff.net.2.bias"
        ),
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight": (
            "output_blocks.5.1.transformer_blocks.0.attn1.to_q.weight"
        ),
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.2.resnets.2.conv_shortcut.weight": "output_blocks.8.0.skip_connection.weight",
    }
    assert {name: names[name] for name in published} == published


def test_a_name_outside_the_layout_is_refused():
    with pytest.raises(EraseError, match="'encoder_hid_proj.weight' has no name in the CompVis layout"):
        unet_name("encoder_hid_proj.weight", {"layers_per_block": 2, "up_block_types": []})
    with pytest.raises(EraseError, match=r"layers_per_block is \[1, 2\]"):
        unet_name("down_blocks.0.resnets.0.conv1.weight", {"layers_per_block": [1, 2], "up_block_types": []})
