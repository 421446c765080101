"""LoRAs: the names that kohya's trainer writes, what diffusers makes of them, and what a rank leaves out."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_compvis import SD14, SDXL
from torch import Tensor

from erase.errors import EraseError
from erase.export.lora import save_lora
from erase.families import layers
from erase.families.protocol import Family
from erase.families.sd import StableDiffusion
from erase.families.sdxl import StableDiffusionXL

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it
WORDS = ("to_q.", "to_k.", "to_v.", "to_out.", "proj_in.", "proj_out.", "net.")


def is_lora_layer(name: str) -> bool:
    return ".attentions." in name and name.endswith("weight") and any(word in name for word in WORDS)


def changed(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The UNet's weights, and others in all layers that a LoRA holds."""
    base, draws = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), torch.Generator().manual_seed(1)
    noise = {name: 0.05 * torch.randn(tensor.shape, generator=draws) for name, tensor in base.items()}
    return base, {name: base[name] + noise[name] * is_lora_layer(name) for name in base}


@pytest.mark.parametrize(
    ("fixture", "family", "cls"),
    [
        ("tiny_pipeline_dir", StableDiffusion, StableDiffusionPipeline),
        ("toy_sdxl_dir", StableDiffusionXL, StableDiffusionXLPipeline),
    ],
)
def test_diffusers_makes_the_new_model_of_a_lora_of_full_rank(
    fixture, family: type[Family], cls: Any, request, tmp_path
):
    """Linear layers and 1x1 convolutions; loaded as it is and fused; a file with wrong names would load as nothing."""
    pytest.importorskip("peft")
    folder = request.getfixturevalue(fixture)
    base, new = changed(folder)
    names = family.lora_names(folder, base)
    fit = save_lora(tmp_path / FILE, base, new, rank=64, names=names, labels=family.lora_labels(folder))
    assert fit.left_out == 0 and max(fit.residuals.values()) < 1e-6
    assert fit.residuals.keys() == {name.removesuffix(".weight") for name in base if is_lora_layer(name)}
    pipeline = cls.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    held = {name.split(".lora_A")[0] for name, _ in pipeline.unet.named_parameters() if ".lora_A." in name}
    assert held == {name.removesuffix(".weight") for name in base if is_lora_layer(name)}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = pipeline.unet.state_dict()
    assert max((fused[name] - new[name]).abs().max().item() for name in new) < 1e-5
    assert max((base[name] - new[name]).abs().max().item() for name in new) > 0.1  # control


def full_size(tmp_path: Path, options: dict[str, Any], family: type[Family]) -> dict[str, str]:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**options)
    unet.save_config(tmp_path / "unet")
    weights = unet.state_dict()
    names = family.lora_names(tmp_path, weights)
    return {layer: names[layer] for name in weights if layers.fits_lora(name, weights[name])
            for layer in [name.removesuffix(".weight")]}  # fmt: skip


def test_the_names_for_stable_diffusion_xl_are_the_722_modules_of_kohyas_trainer(tmp_path):
    """280 projections of self-attention, 280 of cross-attention, 140 of feed-forward, 22 around the blocks."""
    names = full_size(tmp_path, SDXL, StableDiffusionXL)
    assert len(names) == len(set(names.values())) == 722
    block = r"(?:input_blocks_[4578]_1|middle_block_1|output_blocks_[0-5]_1)"
    layer = r"(?:attn[12]_to_(?:q|k|v|out_0)|ff_net_(?:0_proj|2))"
    pattern = rf"lora_unet_{block}_(?:proj_(?:in|out)|transformer_blocks_\d_{layer})"
    assert all(re.fullmatch(pattern, name) for name in names.values())
    counts = [sum(part in name for name in names.values()) for part in ("attn1", "attn2", "_ff_net_", "_1_proj_")]
    assert counts == [280, 280, 140, 22]
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[layer] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def test_the_names_for_stable_diffusion_1_are_the_192_modules_of_kohyas_trainer(tmp_path):
    """Its UNet there has diffusers' names."""
    names = full_size(tmp_path, SD14, StableDiffusion)
    assert len(names) == len(set(names.values())) == 192
    layer = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert names[layer] == "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"


def test_every_layer_has_up_down_and_alpha_and_the_header_says_what_it_is_for(toy_sdxl_dir, toy_pipeline_dir, tmp_path):
    """A1111 hides a LoRA whose header does not say SDXL from SDXL models; without alpha loaders guess."""
    for folder, family, version in (
        (toy_sdxl_dir, StableDiffusionXL, "sdxl_base_v1-0"),
        (toy_pipeline_dir, StableDiffusion, "sd_v1"),
    ):
        base, new = changed(folder)
        path, how = tmp_path / f"{version}.safetensors", {"rank": 3, "names": family.lora_names(folder, base)}
        save_lora(path, base, new, **how, labels=family.lora_labels(folder), provenance={"concept": "circle"})
        stored, by_layer = load_file(path), {}
        for name, tensor in stored.items():
            layer, end = name.split(".", 1)
            by_layer.setdefault(layer, {})[end] = tensor
        assert all(parts.keys() == {"lora_down.weight", "lora_up.weight", "alpha"} for parts in by_layer.values())
        assert {tensor.item() for name, tensor in stored.items() if name.endswith(".alpha")} == {3}
        assert {len(tensor) for name, tensor in stored.items() if name.endswith("down.weight")} == {3}
        with safe_open(path, "pt") as file:
            header = file.metadata()
        assert header["ss_network_module"] == "networks.lora" and header["ss_base_model_version"] == version
        assert header["ss_network_dim"] == header["ss_network_alpha"] == "3" and header["ss_v2"] == "False"
        assert "circle" in header["erase"]
        first = path.read_bytes()
        save_lora(path, base, new, **how, labels=family.lora_labels(folder), provenance={"concept": "circle"})
        assert path.read_bytes() == first


def test_a_lora_of_low_rank_leaves_what_the_singular_values_say(tmp_path):
    """The best rank-r approximation leaves the root of the sum of squares of the other singular values."""
    layer = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(24, 8, generator=draw)
    singular = torch.linalg.svdvals(change)
    base = {f"{layer}.weight": torch.randn(24, 8, generator=draw), "conv_in.weight": torch.zeros(4, 4, 3, 3)}
    new = base | {f"{layer}.weight": base[f"{layer}.weight"] + change}
    residuals = []
    for rank in (1, 3, 8):
        fit = save_lora(tmp_path / "lora.safetensors", base, new, rank=rank, names={layer: "lora_unet_x"})
        expected = (singular[rank:].square().sum() / singular.square().sum()).sqrt().item()
        assert fit.residuals[layer] == pytest.approx(expected, abs=1e-6)
        residuals.append(fit.residuals[layer])
        factors = load_file(tmp_path / "lora.safetensors")
        assert factors["lora_unet_x.lora_down.weight"].shape == (rank, 8)
        assert factors["lora_unet_x.lora_up.weight"].shape == (24, rank)
    assert residuals[0] > residuals[1] > residuals[2]


def test_a_lora_says_what_it_cannot_carry(tmp_path):
    base = {
        "a.attentions.0.proj_in.weight": torch.zeros(4, 4, 1, 1),
        "a.resnets.0.conv1.weight": torch.zeros(2, 2, 3, 3),
    }
    changed = {
        "a.attentions.0.proj_in.weight": torch.ones(4, 4, 1, 1),
        "a.resnets.0.conv1.weight": torch.ones(2, 2, 3, 3),
    }
    path, names = tmp_path / "lora.safetensors", {name.removesuffix(".weight"): name for name in base}
    fit = save_lora(path, base, changed, rank=2, names=names)
    assert fit.left_out == pytest.approx(36 / 52)
    assert fit.residuals.keys() == {"a.attentions.0.proj_in"}
    assert fit.summary() == (
        "1 layer, of whose change the rank cannot hold 0.0% to 0.0% (median 0.0%); 69.2% of the changed weights are "
        "in no such layer"
    )
    with pytest.raises(EraseError, match="no attention or feed-forward layer changed"):
        save_lora(path, base, base, rank=2, names=names)
    with pytest.raises(EraseError, match="rank must be at least 1, not 0"):
        save_lora(path, base, changed, rank=0, names=names)
