"""Laws of models that this version does not know: each is refused by its own name, before any weight is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erase.errors import EraseError
from erase.families import architecture, loading

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(toy_pipeline_dir, tmp_path) -> Path:
    return Path(shutil.copytree(toy_pipeline_dir, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(source: Path) -> str:
    with pytest.raises(EraseError) as error:
        loading.load(source)
    message = str(error.value)
    assert "\n" not in message and len(message.replace(str(source), "")) < 400
    return message


@pytest.mark.parametrize(
    ("name", "components", "kind"),
    [
        (
            "StableDiffusionXLPipeline",
            {"text_encoder_2": ["transformers", "X"]},
            "without the component",
        ),
        ("StableDiffusionXLInpaintPipeline", {}, "Stable Diffusion XL for another task"),
        ("StableDiffusionXLImg2ImgPipeline", {"text_encoder": [None, None]}, "the refiner of Stable Diffusion XL"),
        (
            "StableDiffusion3Img2ImgPipeline",
            {"transformer": ["diffusers", "X"], "unet": [None, None]},
            "Stable Diffusion 3 for another task",
        ),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "X"]}, "transformer is X"),
        ("FluxPipeline", {"transformer": ["diffusers", "X"], "unet": [None, None]}, "FLUX"),
        ("QwenImagePipeline", {"transformer": ["diffusers", "X"], "unet": [None, None]}, "a diffusion transformer"),
        ("StableDiffusionControlNetPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}, "with a ControlNet"),
        ("StableDiffusionPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}, "with a ControlNet"),
        ("LatentConsistencyModelPipeline", {}, "a latent consistency model"),
        ("AnimateDiffPipeline", {"motion_adapter": ["diffusers", "X"]}, "AnimateDiff"),
        ("LDMTextToImagePipeline", {"bert": ["x", "Y"], "unet": [None, None]}, "LDMTextToImagePipeline"),
        ("StableDiffusionPipeline", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is AutoencoderTiny"),
        ("StableDiffusionPipeline", {"text_encoder": ["x", "XLMRoberta"]}, "text encoder is XLMRoberta"),
        ("StableDiffusionPipeline", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "flow-matching"),
    ],
)
def test_a_pipeline_of_another_kind_is_named(name, components, kind, folder):
    """By its class, and by its components where the class says too little (4.8)."""
    edit(folder / "model_index.json", _class_name=name, **components)
    message = refused(folder)
    assert message.startswith(str(folder)) and kind in message
    assert message.endswith("Stable Diffusion 1, 2, XL and 3, and class-conditional pixel models")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"in_channels": 9}, "an inpainting model"),
        ({"in_channels": 8}, "InstructPix2Pix"),
        ({"in_channels": 5}, "a depth-to-image model"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "an upscaler"),
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL's"),
        ({"class_embed_type": "projection"}, "unCLIP's"),
        ({"time_cond_proj_dim": 256}, "a latent consistency model"),
        ({"attention_type": "gated"}, "GLIGEN"),
    ],
)
def test_a_unet_of_another_kind_is_named(changes, kind, folder):
    """Inpainting, image editing, depth: text-to-image pipelines but for the UNet's inputs (4.8)."""
    edit(folder / "unet" / "config.json", **changes)
    assert kind in refused(folder)


def test_other_pipelines_with_the_same_parts_are_accepted(folder):
    """Image-to-image is the same model in another pipeline class (4.8)."""
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipelineSafe"):
        edit(folder / "model_index.json", _class_name=name)
        loading.load(folder)


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.default.weight", "lora.down.weight", "lora_down.weight"])
@pytest.mark.parametrize("part", [UNET, "text_encoder/model.safetensors"])
def test_an_attached_lora_is_named(name, part, folder):
    """What `save_pretrained` writes with an adapter loaded, in the UNet or the text encoder (4.8)."""
    save_file({**load_file(folder / part), f"a.to_k.{name}": torch.zeros(1)}, folder / part)
    assert "has a LoRA attached" in refused(folder) and "fuse_lora()" in refused(folder)


def test_an_adapter_beside_a_text_encoder_is_not_followed(folder):
    """transformers would load the adapter's base model from wherever its config says (2.5)."""
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere"}')
    assert "has a LoRA attached" in refused(folder)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ({"conditioner.embedders.0.a": (1,), "conditioner.embedders.1.b": (1,)}, "Stable Diffusion XL"),
        ({"conditioner.embedders.0.model.a": (1,)}, "the refiner of Stable Diffusion XL"),
        ({"model.diffusion_model.joint_blocks.0.a": (1,)}, "Stable Diffusion 3"),
        ({"double_blocks.0.a": (1,)}, "FLUX"),
        ({"model.diffusion_model.double_blocks.0.a": (1,)}, "FLUX"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4, 9, 3, 3)}, "an inpainting model"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4, 8, 3, 3)}, "InstructPix2Pix"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (4, 5, 3, 3)}, "a depth-to-image model"),
        ({"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "a ControlNet"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, "is a LoRA, not a model"),
        ({"unet.down_blocks.0.lora_A.weight": (4, 4)}, "is a LoRA, not a model"),
        ({"emb_params": (2, 8)}, "a textual inversion embedding"),
        ({"down_blocks.0.a": (1,)}, "the weights of a UNet only"),
        ({"input_blocks.0.0.weight": (1,)}, "the weights of a UNet only"),
        ({"decoder.conv_in.weight": (1,)}, "the weights of a VAE only"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_of_another_kind_is_named(names, kind, suffix, tmp_path):
    """By the names of its tensors, and the shape of the first (4.8)."""
    path, tensors = tmp_path / f"model{suffix}", {name: torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    with pytest.raises(EraseError) as error:
        loading.load(path, allow_pickle=True)
    assert str(error.value).startswith(str(path)) and kind in str(error.value)


def test_a_folder_that_is_no_pipeline_says_what_it_is(folder, tmp_path):
    assert "is a UNet only; give its base as the model" in refused(folder / "unet")
    assert "is a single component ('AutoencoderKL')" in refused(folder / "vae")
    (tmp_path / "lora").mkdir()
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert "is a LoRA, not a model" in refused(tmp_path / "lora")
    assert architecture.of_pipeline(folder) is None  # control
