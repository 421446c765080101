"""Forms that a model cannot be written in are refused before the first image, and before another form is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from erase import masks
from erase.delta import content_hash
from erase.errors import EraseError
from erase.export.single_file import save_single_file
from erase.families import loading
from erase.families.sd import StableDiffusion
from erase.options.settings import Settings
from erase.runs import forms, job

FEW: Any = {"num_forget": 2, "num_retain": 2, "num_inference_steps": 2, "num_train_steps": 1, "device": "cpu",
            "num_samples": 0, "forget": ("a cat",), "anchor": ("a dog",), "kind": "object"}  # fmt: skip


@pytest.fixture
def second(toy_pipeline_dir, tmp_path) -> Path:
    """A toy whose text encoder is OpenCLIP's, as that of Stable Diffusion 2."""
    folder = tmp_path / "second"
    shutil.copytree(toy_pipeline_dir, folder)
    change(folder / "text_encoder" / "config.json", hidden_act="gelu")
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def no_images(monkeypatch) -> None:
    monkeypatch.setattr(StableDiffusion, "draw", lambda *_, **__: pytest.fail("an image was generated"))


def refused(model: Path, output: Path, **options: Any) -> str:
    with pytest.raises(EraseError) as error:
        job.run(Settings("cat", str(model), output=str(output), **{**FEW, **options}), quiet=True)
    assert not output.exists()
    return str(error.value)


def test_a_single_file_of_stable_diffusion_2_has_the_original_names(second, tmp_path):
    """Of 24 layers the last one is unused, and diffusers' folder lacks it: the file has a copy of the one before."""
    config = CLIPTextConfig.from_pretrained(second / "text_encoder")
    config.num_hidden_layers = 23
    CLIPTextModel(config).save_pretrained(second / "text_encoder")
    save_single_file(tmp_path / "model.safetensors", second, dtype="fp32")
    stored = load_file(tmp_path / "model.safetensors")
    start = "cond_stage_model.model."
    text = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
    assert {name for name in text if "resblocks" not in name} == {
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
        "logit_scale",
    }
    blocks = {name.split(".")[2] for name in text if "resblocks" in name}
    assert blocks == {str(number) for number in range(24)}
    one, last = (text[f"transformer.resblocks.{number}.attn.in_proj_weight"] for number in (22, 23))
    assert torch.equal(one, last) and not torch.equal(one, text["transformer.resblocks.21.attn.in_proj_weight"])
    assert text["text_projection"].shape == (config.hidden_size,) * 2
    how: Any = {"config": str(second), "local_files_only": True, "safety_checker": None}
    loaded = StableDiffusionPipeline.from_single_file(str(tmp_path / "model.safetensors"), **how)
    folder = StableDiffusionPipeline.from_pretrained(second, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        assert content_hash(getattr(loaded, part).state_dict()) == content_hash(getattr(folder, part).state_dict())


def test_a_family_without_single_files_or_loras_says_so(toy_pipeline_dir, tmp_path, no_images, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "no_checkpoint", classmethod(lambda cls, folder: "only as a folder"))
    monkeypatch.setattr(StableDiffusion, "lora_names", classmethod(lambda cls, folder, weights: {}))
    assert "only as a folder" in refused(toy_pipeline_dir, tmp_path / "run", save=("single-file",))
    assert "no LoRA can be written: sd has no names for LoRA layers" in refused(
        toy_pipeline_dir, tmp_path / "run", save=("lora",)
    )


def test_a_network_without_a_place_in_the_original_layout_is_refused(toy_pipeline_dir, tmp_path):
    """Where levels differ in their number of layers, CompVis' numbers of blocks mean nothing."""
    folder = tmp_path / "odd"
    shutil.copytree(toy_pipeline_dir, folder)
    change(folder / "unet" / "config.json", layers_per_block=[1, 2])
    family = loading.family_of(folder)
    assert (
        family.no_checkpoint(folder) == "layers_per_block is [1, 2]; the CompVis layout needs one number for all levels"
    )
    assert family.no_checkpoint(toy_pipeline_dir) is None


def test_a_mask_in_which_no_layer_of_a_lora_may_change_is_refused(toy_pipeline_dir, tmp_path, no_images):
    model = loading.load(toy_pipeline_dir)
    bits = {n: torch.full(p.shape, n == "conv_in.weight") for n, p in model.trainable("full").items()}
    masks.save(tmp_path / "mask.safetensors", bits, {"base_hash": None})
    said = refused(toy_pipeline_dir, tmp_path / "run", save=("lora",), mask=str(tmp_path / "mask.safetensors"),
                   scope="full")  # fmt: skip
    assert said == (
        "no LoRA can be written: no attention or feed-forward layer may change with this scope and mask; leave out lora"
    )


def test_other_forms_of_a_finished_run_are_refused_before_any_is_written(toy_pipeline_dir, tmp_path, monkeypatch):
    model = str(toy_pipeline_dir)
    run = job.run(Settings("cat", model, output=str(tmp_path / "run"), save=("delta",), **FEW), quiet=True)
    before = sorted(path.name for path in run.folder.iterdir())
    monkeypatch.setattr(StableDiffusion, "no_checkpoint", classmethod(lambda cls, folder: "it has no layout"))
    with pytest.raises(EraseError, match="no single file can be written: it has no layout"):
        forms.add(run.folder, ["unet", "single-file"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(EraseError, match="no single file can be written"):
        job.run(Settings("cat", model, output=str(tmp_path / "run"), save=("unet", "single-file"), **FEW), quiet=True)
    assert sorted(path.name for path in run.folder.iterdir()) == before
