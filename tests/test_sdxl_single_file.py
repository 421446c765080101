"""Single files of Stable Diffusion XL in the original layout: written, read by stock diffusers, and read back."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from erase import cli, erase_concept
from erase.concepts import Concept
from erase.delta import content_hash
from erase.errors import EraseError
from erase.export.single_file import save_single_file
from erase.families import compvis, loading
from erase.families.sdxl import StableDiffusionXL

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONCEPT = Concept("cat", "object", forget=("a cat",), anchor=("a dog",), retain=("a tree",))
OPTIONS: dict[str, Any] = {
    "num_forget": 2,
    "num_retain": 2,
    "num_inference_steps": 2,
    "num_train_steps": 2,
    "batch_size": 2,
    "num_samples": 0,
    "learning_rate": 1e-2,
    "device": "cpu",
    "quiet": True,
}


def load(source: Path, **options: Any) -> StableDiffusionXL:
    model = loading.load(source, **options)
    assert isinstance(model, StableDiffusionXL)
    return model


def hashes(pipeline: Any, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    states = {name: getattr(pipeline, name).state_dict() for name in NETWORKS}
    return {
        name: content_hash({key: tensor.to(dtype) for key, tensor in state.items()}) for name, state in states.items()
    }


def stock(folder: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def stock_file(path: Path, config: Path, dtype: torch.dtype) -> Any:
    how: Any = {"config": str(config), "local_files_only": True, "dtype": dtype, "add_watermarker": False}
    return StableDiffusionXLPipeline.from_single_file(str(path), **how)


@pytest.fixture(scope="module")
def single_file(toy_sdxl_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(path, toy_sdxl_dir, dtype="fp32")
    return path


def rewritten(path: Path, target: Path, leave_out: str = "?", **more: Tensor) -> Path:
    save_file({key: t for key, t in load_file(path).items() if not key.startswith(leave_out)} | more, target)
    return target


def refused(source: Path, **options: Any) -> str:
    with pytest.raises(EraseError) as error:
        loading.load(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_stock_diffusers_reads_every_network_of_a_written_file_bit_for_bit(toy_sdxl_dir, tmp_path, dtype):
    path, number = tmp_path / "model.safetensors", {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    save_single_file(path, toy_sdxl_dir, dtype=dtype)
    loaded = stock_file(path, toy_sdxl_dir, number)
    assert hashes(loaded, number) == hashes(stock(toy_sdxl_dir), number)
    first = path.read_bytes()
    save_single_file(path, toy_sdxl_dir, dtype=dtype)
    assert path.read_bytes() == first


def test_stock_diffusers_generates_from_a_written_file_what_it_generates_from_the_folder(single_file, toy_sdxl_dir):
    found = []
    for pipeline in (stock(toy_sdxl_dir), stock_file(single_file, toy_sdxl_dir, torch.float32)):
        for name in NETWORKS:  # where weights lie in memory decides the last bit
            for parameter in getattr(pipeline, name).requires_grad_(False).parameters():
                parameter.data = parameter.data.clone()
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        found.append(pipeline("a cat", num_inference_steps=2, height=8, width=8, generator=generator, output_type="pt"))
    assert torch.equal(found[0].images, found[1].images)


def test_the_names_are_those_of_the_original_layout(single_file, toy_sdxl_dir):
    """OpenCLIP stacks q, k and v, multiplies by text_projection from the other side, and stores the logit scale."""
    stored = load_file(single_file)
    starts = {"model.diffusion_model", "first_stage_model", "conditioner.embedders.0", "conditioner.embedders.1"}
    assert {next((s for s in starts if name.startswith(s + ".")), name) for name in stored} == starts
    text = stock(toy_sdxl_dir).text_encoder_2.state_dict()
    start = "conditioner.embedders.1.model."
    second = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
    rows = [text[f"text_model.encoder.layers.1.self_attn.{one}_proj.weight"] for one in "qkv"]
    assert torch.equal(second["transformer.resblocks.1.attn.in_proj_weight"], torch.cat(rows))
    assert torch.equal(second["text_projection"], text["text_projection.weight"].T)
    assert second["logit_scale"].item() == pytest.approx(4.6052, abs=1e-4)
    blocks = {name.split("resblocks.0.")[1] for name in second if "resblocks.0." in name}
    parts = {"ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj", "attn.out_proj"}
    assert blocks == {f"{part}.{end}" for part in parts for end in ("weight", "bias")} | {
        "attn.in_proj_weight",
        "attn.in_proj_bias",
    }
    assert {name for name in second if "resblocks" not in name} == {
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "ln_final.bias",
        "text_projection",
        "logit_scale",
    }
    assert "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" in stored
    assert stored["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    assert "model.diffusion_model.label_emb.0.2.bias" in stored


def test_a_file_is_read_as_its_folder_is_read(single_file, toy_sdxl_dir, cache_dir, monkeypatch):
    model, base = load(single_file, config=str(toy_sdxl_dir)), load(toy_sdxl_dir)
    assert {part: model.hash_of(part) for part in model.parts} == {part: base.hash_of(part) for part in base.parts}
    schedulers: Any = model.scheduler, base.scheduler
    assert model.zeros == base.zeros and dict(schedulers[0].config) == dict(schedulers[1].config)
    assert [path.name for path in (cache_dir / "converted").iterdir()] == [model.folder.name]
    assert (model.folder / "tokenizer_2" / "vocab.json").is_file()  # what older transformers read
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", None)
    assert load(single_file, config=str(toy_sdxl_dir)).folder == model.folder  # converted once
    how: Any = {"steps": 2, "guidance": 5.0, "size": 8}
    assert torch.equal(model.draw(["a cat"], [0], **how), base.draw(["a cat"], [0], **how))


def test_without_a_baked_vae_the_config_folders_is_taken_and_otherwise_asked_for(single_file, toy_sdxl_dir, tmp_path):
    path = rewritten(single_file, tmp_path / "bare.safetensors", "first_stage_model.")
    model = load(path, config=str(toy_sdxl_dir))
    assert model.hash_of("vae") == load(toy_sdxl_dir).hash_of("vae")
    assert model.notes[0] == f"{path} has no VAE; that of --config {toy_sdxl_dir} is used"
    other = Path(shutil.copytree(toy_sdxl_dir, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    assert load(path, config=str(other)).hash_of("vae") != model.hash_of("vae")
    weights.unlink()
    assert refused(path, config=str(other)) == (
        f"{path} has no VAE, and --config {other} has no weights of one; give a folder with vae/*.safetensors"
    )
    assert refused(path).startswith(f"{path} has no VAE; name a diffusers folder that has one: --config DIR")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_in.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.ln_final.bias",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "conditioner.embedders.0.",
    ],
)
def test_a_file_that_lacks_weights_is_refused_in_one_line(single_file, toy_sdxl_dir, tmp_path, cache_dir, name):
    path = rewritten(single_file, tmp_path / "broken.safetensors", name)
    assert refused(path, config=str(toy_sdxl_dir)).startswith(f"cannot load {path}: ")
    assert not cache_dir.exists()


def test_a_pickle_is_read_only_when_it_is_allowed(single_file, toy_sdxl_dir, tmp_path):
    path, config = tmp_path / "model.ckpt", str(toy_sdxl_dir)
    torch.save({"state_dict": load_file(single_file)}, path)
    assert refused(path, config=config).startswith(f"{path} is a pickle, which can run code when loaded; ")
    assert load(path, config=config, allow_pickle=True).hash_of("unet") == load(toy_sdxl_dir).hash_of("unet")


def test_a_config_of_another_architecture_is_refused(single_file, toy_sdxl_dir, toy_pipeline_dir, tmp_path):
    assert f"--config {toy_pipeline_dir} is a StableDiffusionPipeline" in refused(
        single_file, config=str(toy_pipeline_dir)
    )
    save_single_file(tmp_path / "sd.safetensors", toy_pipeline_dir)
    message = refused(tmp_path / "sd.safetensors", config=str(toy_sdxl_dir))
    assert f"--config {toy_sdxl_dir} is a StableDiffusionXLPipeline" in message


def test_v_prediction_is_marked_in_the_file_and_read_back(toy_sdxl_dir, single_file, tmp_path):
    """ComfyUI knows it by a tensor `v_pred`, and a schedule that ends in pure noise by `ztsnr`."""
    base = Path(shutil.copytree(toy_sdxl_dir, tmp_path / "v"))
    scheduler: Any = EulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    how: Any = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.register_to_config(**how)
    scheduler.save_pretrained(base / "scheduler")
    save_single_file(tmp_path / "v.safetensors", base)
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
    assert not {"v_pred", "ztsnr"} & load_file(single_file).keys()
    model = load(tmp_path / "v.safetensors", config=str(toy_sdxl_dir))  # whose scheduler says epsilon
    assert model.prediction_type == "v_prediction"
    assert torch.equal(model.alphas_cumprod, load(base).alphas_cumprod)
    assert "predicts v" in model.notes[0]


def test_edm_models_are_refused_by_name(single_file, toy_sdxl_dir, tmp_path):
    path = rewritten(single_file, tmp_path / "e.safetensors", edm_mean=torch.zeros(4), edm_std=torch.ones(4))
    assert "is an EDM model" in refused(path, config=str(toy_sdxl_dir))
    folder = Path(shutil.copytree(toy_sdxl_dir, tmp_path / "edm"))
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "EDMEulerScheduler"))
    assert "is an EDM model" in refused(folder)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_unet_weights_alone_are_read_in_comfyui_names(toy_sdxl_dir, tmp_path, prefix):
    base = load(toy_sdxl_dir)
    names = compvis.unet_names(base.unet.state_dict(), base.unet.config)
    weights = {name: tensor + 0.25 for name, tensor in base.unet.state_dict().items()}
    path = tmp_path / "unet.safetensors"
    save_file({prefix + names[name]: tensor for name, tensor in weights.items()}, path)
    model = load(toy_sdxl_dir, unet=path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.unet.state_dict().items())
    assert "give its base as the model, and this file as --unet" in refused(path)


def test_a_whole_file_is_not_taken_for_unet_weights(single_file, toy_sdxl_dir):
    assert "is a whole checkpoint, not the weights of a UNet alone" in refused(toy_sdxl_dir, unet=single_file)


def test_a_run_saves_a_single_file_and_a_later_export_writes_the_same(toy_sdxl_dir, tmp_path):
    output = tmp_path / "run"
    erase_concept(CONCEPT, toy_sdxl_dir, output=str(output), save=("single-file",), **OPTIONS)
    expected = hashes(stock(output), torch.float16)
    assert hashes(stock_file(output / "run.safetensors", output, torch.float16), torch.float16) == expected
    assert expected["unet"] != hashes(stock(toy_sdxl_dir), torch.float16)["unet"]  # control: it is the erased one
    cli.main(["export", str(output), "--to", "single-file", "--output", str(tmp_path / "later")])
    assert (tmp_path / "later" / "run.safetensors").read_bytes() == (output / "run.safetensors").read_bytes()


def test_a_run_starts_from_a_single_file(single_file, toy_sdxl_dir, tmp_path):
    erase_concept(CONCEPT, single_file, output=str(tmp_path / "a"), config=str(toy_sdxl_dir), **OPTIONS)
    erase_concept(CONCEPT, toy_sdxl_dir, output=str(tmp_path / "b"), **OPTIONS)
    assert hashes(stock(tmp_path / "a")) == hashes(stock(tmp_path / "b"))


def test_a_pipeline_in_memory_is_kept_with_the_same_bits(toy_sdxl_dir):
    pipeline = stock(toy_sdxl_dir)
    folders = []
    for zeros in (True, False):
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        model = load(loading.keep(pipeline))
        assert model.zeros is zeros and hashes(model) == hashes(pipeline)
        folders.append(model.folder)
    assert folders[0] != folders[1]
    pipeline.text_encoder_2 = None
    with pytest.raises(EraseError, match="the pipeline's text_encoder_2 is not in memory"):
        loading.keep(pipeline)
