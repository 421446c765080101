"""Laws of files of UNet weights alone: any published naming gives the same model, and nothing is dropped silently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import load_sd
from safetensors.torch import save_file

from erase import delta
from erase.errors import EraseError
from erase.families import compvis, sd, stored_unet

SOME = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def base(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture(scope="module")
def weights(base) -> dict[str, torch.Tensor]:
    """Another UNet's."""
    return {name: tensor + 0.25 for name, tensor in base.unet.state_dict().items()}


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "unet.safetensors") -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def named(weights: dict[str, torch.Tensor], base: sd.StableDiffusion, naming: str) -> dict[str, torch.Tensor]:
    if "input_blocks" in naming:
        names = compvis.unet_names(weights, base.unet.config)
        return {naming.removesuffix("input_blocks") + names[name]: tensor for name, tensor in weights.items()}
    return {naming + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "naming",
    [
        "",
        "unet.",
        "module.",
        "module.unet.",
        "input_blocks",
        "model.diffusion_model.input_blocks",
        "model.diffusion_model.",
    ],
)
def test_every_published_naming_gives_the_same_unet(naming, base, weights, tmp_path):
    """diffusers' names, CompVis' names, and the prefixes of wrappers around them (4.3)."""
    path = written(tmp_path, named(weights, base, naming))
    model = load_sd(base.folder, unet=path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.unet.state_dict().items())
    assert model.notes == (f"{path} replaces {len(weights)} of the UNet's {len(weights)} tensors",)
    assert model.weights_file == str(path) and model.folder == base.folder and "unet.safetensors" in model.name
    again = model.stored_network().state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
    model.reload_network()
    assert torch.equal(model.unet.conv_in.weight, weights["conv_in.weight"])


def test_a_part_of_the_weights_replaces_that_part_and_says_so(base, weights, tmp_path):
    """ESD publishes the layers that it trained (4.3)."""
    path = written(tmp_path, {f"unet.{SOME}": weights[SOME].half()})
    model = load_sd(base.folder, unet=path)
    different = [
        name for name, t in model.unet.state_dict().items() if not torch.equal(t, base.unet.state_dict()[name])
    ]
    assert different == [SOME] and model.unet.dtype == torch.float32
    assert model.notes == (f"{path} replaces 1 of the UNet's {len(weights)} tensors",)
    assert base.notes == ()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_needs_permission(base, weights, tmp_path, suffix):
    """Permission opens the file without running its code, and what was left out is said (2.5, 4.3)."""
    path = written(tmp_path, {"state_dict": weights, "trainer": Trainer()}, f"unet{suffix}")  # pyright: ignore
    with pytest.raises(EraseError, match="is a pickle, .*--allow-pickle"):
        load_sd(base.folder, unet=path)
    model = load_sd(base.folder, unet=path, allow_pickle=True)
    assert torch.equal(model.unet.conv_in.weight, weights["conv_in.weight"])
    assert "Trainer" in model.notes[0] and "none of their code ran" in model.notes[0]


class Trainer:
    pass


def test_what_does_not_fit_is_refused_by_name(base, weights, tmp_path):
    """Surplus names, other shapes, quantized and not finite weights, and files of another kind (3.6, 4.3, 4.8)."""
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "surplus": ({**weights, "conv_extra.weight": torch.zeros(1)}, "has no weight 'conv_extra.weight'"),
        "shape": ({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, r"\[8, 4, 3, 3\] but \[4, 4, 3, 3\]"),
        "int8": ({SOME: torch.zeros(4, 8, dtype=torch.int8)}, "stored as int8"),
        "float8": ({SOME: torch.zeros(4, 8).to(torch.float8_e4m3fn)}, "stored as float8_e4m3fn"),
        "nan": ({SOME: torch.full((4, 8), torch.nan)}, "not finite"),
        "twice": ({SOME: weights[SOME], f"unet.{SOME}": weights[SOME] + 0}, "twice"),
        "empty": ({}, "holds no weights"),
        "whole": ({"first_stage_model.a": torch.zeros(1), "conv_in.bias": weights["conv_in.bias"]}, "whole checkpoint"),
        "lora": ({"unet.conv_in.lora_A.weight": torch.zeros(1)}, "is a LoRA"),
    }
    for name, (tensors, message) in bad.items():
        path = written(tmp_path, tensors, f"{name}.safetensors")
        with pytest.raises(EraseError, match=message) as error:
            stored_unet.load_unet(base.folder, unet=path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(EraseError, match="no such file"):
        load_sd(base.folder, unet=tmp_path / "gone.safetensors")
    with pytest.raises(EraseError, match="is no file of weights"):
        (tmp_path / "weights.txt").write_text("")
        load_sd(base.folder, unet=tmp_path / "weights.txt")
    change = delta.difference({SOME: weights[SOME]}, {SOME: weights[SOME] + 1})
    delta.save(tmp_path / "delta.safetensors", change)
    with pytest.raises(EraseError, match="is a delta or a mask"):
        load_sd(base.folder, unet=tmp_path / "delta.safetensors")


def test_a_unet_that_does_not_fit_leaves_the_weights_as_they_were(base, weights, tmp_path):
    from erase.families import unet_file

    path = written(tmp_path, {"conv_in.weight": weights["conv_in.weight"], SOME: torch.full((4, 8), torch.inf)})
    unet = stored_unet.load_unet(base.folder)
    with pytest.raises(EraseError, match="not finite"):
        unet_file.put_into(unet, path, allow_pickle=False)
    assert torch.equal(unet.conv_in.weight, base.unet.conv_in.weight)
