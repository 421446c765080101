"""Laws of a model: it noises and draws as diffusers does, and a folder or file that is not whole is one clear line."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loaded import load_sd
from safetensors.torch import load_file, save_file

from erase.conditioning import Conditioning
from erase.errors import EraseError
from erase.export import pipeline
from erase.export.single_file import save_single_file
from erase.families import loading, pipeline_folder, stored_unet
from erase.families.protocol import Sampler
from erase.families.sd import StableDiffusion

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def toy(toy_pipeline_dir) -> StableDiffusion:
    return load_sd(toy_pipeline_dir)


@pytest.fixture
def broken(toy_pipeline_dir, tmp_path) -> Path:
    """A copy of the toy pipeline that a test may break; whole until then."""
    shutil.copytree(toy_pipeline_dir, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused():
    """A function that loads and gives the message: one line that does not end in a library's advice."""

    def refused(source: str | Path, **options: Any) -> str:
        with pytest.raises(EraseError) as error:
            load_sd(source, **options)
        message = str(error.value)
        assert "\n" not in message and len(message) < 700
        return message

    return refused


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def pickled(folder: Path) -> Path:
    for path in [folder / UNET, folder / VAE, folder / TEXT]:
        stem = "pytorch_model" if path.name == "model.safetensors" else "diffusion_pytorch_model"
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    return folder


def inputs(model: StableDiffusion, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    draw = torch.Generator().manual_seed(3)
    side = int(model.unet.config["sample_size"])
    x = torch.randn(n, 4, side, side, generator=draw)
    return x, torch.tensor([10, 900])[:n], model.encode_text(["a circle", ""][:n])


@torch.no_grad()
def prediction(model: StableDiffusion) -> torch.Tensor:
    return model(*inputs(model))


# --- what a model does ----------------------------------------------------------------------------------------------


def test_the_noise_schedule_is_stable_diffusions(toy):
    """Golden values from the definition, beta = linspace(sqrt 0.00085, sqrt 0.012)^2, in double precision."""
    golden = [0.99915, 0.6737926252333215, 0.2763326838229746, 0.05616984800293729, 0.004660098513077238]
    assert toy.alphas_cumprod[[0, 250, 500, 750, 999]].tolist() == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_added_as_diffusers_adds_it(toy, dtype):
    draw = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 5, 4, 4, 4, generator=draw).to(dtype)
    t = torch.tensor([0, 1, 499, 998, 999])
    theirs: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ours = toy.add_noise(x, eps, t)
    assert ours.dtype == dtype
    assert torch.allclose(ours, theirs.add_noise(x, eps, t), atol=1e-6)
    linear: Any = DDPMScheduler()  # control: another schedule
    assert not torch.allclose(ours, linear.add_noise(x, eps, t), atol=1e-2)


def test_a_velocity_becomes_the_noise(broken):
    """v = sqrt(a) eps - sqrt(1 - a) x0 of a known x0 and eps, so from x_t and v the noise must come back."""
    config = broken / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    model = load_sd(broken)
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 4, 4, 4, generator=draw)
    t = torch.tensor([3, 950])
    scheduler: Any = DDPMScheduler.from_config(model.scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
    v = scheduler.get_velocity(x0, eps, t)
    x_t = model.add_noise(x0, eps, t)

    def unet(x, t, encoder_hidden_states):
        return type("Output", (), {"sample": v})

    assert torch.allclose(model.predict(unet, x_t, t, Conditioning(torch.zeros(2, 77, 8))), eps, atol=1e-5)
    model.prediction_type = "epsilon"  # control
    assert torch.equal(model.predict(unet, x_t, t, Conditioning(torch.zeros(2, 77, 8))), v)


def test_text_is_padded_and_cut_as_diffusers_does_it(toy):
    prompts = ["", "a circle", "long " * 50]
    pipeline = StableDiffusionPipeline.from_pretrained(toy.folder)
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert toy.encode_text(prompts).text_states.shape == (3, 77, 8)
    assert torch.allclose(toy.encode_text(prompts).text_states, expected, atol=1e-6)
    assert torch.allclose(toy.encode_text(prompts, batch_size=1).text_states, expected, atol=1e-5)


@pytest.mark.parametrize("sampler", ["model", "dpm++"])
def test_the_same_seed_is_the_same_image_in_any_batch_and_the_vae_is_not_asked(toy, monkeypatch, sampler):
    options: Any = dict(steps=3, guidance=3.0, size=8, sampler=sampler)
    monkeypatch.setattr(toy.vae, "decode", None)
    monkeypatch.setattr(toy.vae, "encode", None)
    together = toy.draw(["a circle", "a moon", "a tree"], [1, 2, 3], **options)
    alone = torch.cat([toy.draw([prompt], [seed], **options) for prompt, seed in [("a circle", 1), ("a moon", 2)]])
    assert together.shape == (3, 4, 4, 4)
    assert torch.allclose(together[:2], alone, atol=1e-5)  # sums in another order
    assert torch.equal(together, toy.draw(["a circle", "a moon", "a tree"], [1, 2, 3], **options))
    assert not torch.allclose(together[:1], toy.draw(["a circle"], [2], **options), atol=1e-2)  # control


def test_ten_steps_of_dpm_end_where_a_hundred_of_the_models_sampler_do():
    """Distances as shares of the image's norm. Control: ten steps of the model's own sampler end elsewhere."""
    model = load_sd("mini")

    def draw(steps: int, sampler: Sampler) -> torch.Tensor:
        return model.draw(["a red circle", "a moon"], [0, 1], steps=steps, guidance=2.0, size=64, sampler=sampler)

    exact = draw(100, "model")
    distances = [((draw(10, sampler) - exact).norm() / exact.norm()).item() for sampler in ("dpm++", "model")]
    assert distances[0] < 0.06 and distances[1] > 0.15, distances


def test_drawing_leaves_the_mode_as_it_was_and_takes_the_unet_that_it_is_given(toy, broken):
    other = stored_unet.load_unet(broken)
    with torch.no_grad():
        other.conv_out.weight.mul_(2)
    other.train()
    modes = {name: module.training for name, module in other.named_modules()}
    options: Any = dict(steps=2, guidance=1.0, size=8)
    drawn = toy.draw(["a circle"], [0], network=other, **options)
    assert {name: module.training for name, module in other.named_modules()} == modes
    assert not toy.unet.training
    assert not torch.equal(drawn, toy.draw(["a circle"], [0], **options))


def test_images_and_latents_have_the_size_that_the_vae_says(toy, tiny_pipeline_dir):
    assert (toy.vae_scale, toy.resolution) == (2, 8)
    mean, std = toy.encode_images(torch.zeros(3, 3, 8, 8))
    assert mean.shape == std.shape == (3, 4, 4, 4) and (std > 0).all()
    images = toy.decode(mean * 100, batch_size=2)
    assert images.shape == (3, 3, 8, 8) and images.abs().max() <= 1
    assert load_sd(tiny_pipeline_dir).resolution == 64


def test_only_a_folder_that_says_so_is_of_the_embedded_world(toy, broken):
    assert not toy.is_mini and toy.defaults == {}
    (broken / "erase_defaults.json").write_text('{"family": "mini", "batch_size": 2}')
    assert load_sd(broken).is_mini
    state = stored_unet.load_unet(broken).state_dict()
    pipeline.save_pipeline(broken, broken.parent / "out", state)
    assert load_sd(broken.parent / "out").is_mini  # a run folder stays what its base was


def test_a_saved_folder_predicts_exactly_what_the_model_in_memory_predicts(broken):
    model = load_sd(broken)
    before = prediction(model)
    with torch.no_grad():
        model.unet.conv_in.weight.add_(0.1)
    pipeline.save_pipeline(broken, broken.parent / "out", model.unet.state_dict())
    assert torch.equal(prediction(load_sd(broken.parent / "out")), prediction(model))
    assert not torch.equal(prediction(model), before)


def test_half_precision_variants_and_files_of_2022_load_in_single_precision(broken, toy):
    edit(broken / UNET, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    (broken / UNET).rename(broken / UNET.replace(".safetensors", ".fp16.safetensors"))

    def text_of_2022(tensors):
        old = {f"text_model.{name}": tensors.pop(name) for name in list(tensors)}
        tensors.update(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]})

    def vae_of_2022(tensors):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    edit(broken / TEXT, text_of_2022)
    edit(broken / VAE, vae_of_2022)
    model = load_sd(broken)
    parts = (model.unet, model.vae, model.text_encoder)
    assert {tensor.dtype for part in parts for tensor in part.parameters()} == {torch.float32}
    assert not any(tensor.requires_grad for part in parts for tensor in part.parameters())
    assert not any(part.training for part in parts)
    assert torch.equal(model.encode_text(["a circle"]).text_states, toy.encode_text(["a circle"]).text_states)
    assert torch.equal(model.encode_images(torch.ones(1, 3, 8, 8))[0], toy.encode_images(torch.ones(1, 3, 8, 8))[0])
    assert torch.allclose(prediction(model), prediction(toy), atol=1e-2)


def test_xformers_needs_a_gpu_and_its_package(toy, monkeypatch):
    toy.use_attention("sdpa")
    with pytest.raises(
        EraseError, match="^xformers needs a CUDA device but the model is on cpu; leave out --attention$"
    ):
        toy.use_attention("xformers")
    monkeypatch.setattr(StableDiffusion, "device", torch.device("cuda"))

    def fail(error: Exception) -> None:
        def enable():
            raise error

        monkeypatch.setattr(toy.unet, "enable_xformers_memory_efficient_attention", enable)

    fail(ModuleNotFoundError("Refer to https://github.com/facebookresearch/xformers"))
    with pytest.raises(EraseError, match="^xformers is not installed; pip install xformers$"):
        toy.use_attention("xformers")
    fail(NotImplementedError("No operator found\nfor this GPU"))
    with pytest.raises(EraseError, match=r"^xformers cannot be used here \(No operator found for this GPU\)"):
        toy.use_attention("xformers")


# --- what cannot be loaded ------------------------------------------------------------------------------------------


def test_a_place_where_no_model_is(refused, tmp_path, monkeypatch):
    assert "has no model_index.json; give the folder of a whole diffusers pipeline" in refused(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in (f"{tmp_path}/gone", "./gone", "runs/nope", "a/b/c", "models/gone"):
        assert refused(path) == f"no model '{path}': there is no such folder"
    assert refused("salun").startswith("no model 'salun': it is not 'mini'")
    assert refused(tmp_path / "gone.safetensors") == f"{tmp_path}/gone.safetensors: no such file"


def test_a_hub_that_cannot_be_reached_is_said_at_once(refused):
    started = time.perf_counter()
    message = refused("nobody/no-such-model")
    assert message.startswith("'nobody/no-such-model' is not a local folder and cannot be downloaded from the hub (")
    assert message.endswith("give the folder of a local copy with --model DIR, or try --model mini")
    assert time.perf_counter() - started < 5


def test_the_hub_is_asked_for_more_only_when_the_plain_weights_are_not_there(broken, monkeypatch):
    asked: list[str] = []

    def snapshot(repository, *, revision, allow_patterns, ignore_patterns):
        asked.extend(p for p in allow_patterns if p.startswith("unet/") and p not in {"unet/*.json", "unet/*.txt"})
        return str(broken)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_sd("somebody/model").folder == broken
    assert asked == ["unet/*.safetensors"]
    asked.clear()
    pickled(broken)
    assert load_sd("somebody/model", allow_pickle=True).folder == broken
    assert asked == ["unet/*.safetensors", "unet/*.fp16.safetensors", "unet/*.bin"]


@pytest.mark.parametrize("path", [UNET, VAE, TEXT])
def test_a_truncated_file_is_named(path, broken, refused):
    whole = (broken / path).read_bytes()
    for cut in (0, 4, len(whole) - 1):
        (broken / path).write_bytes(whole[:cut])
        assert refused(broken).startswith(f"{broken / path} is not a whole safetensors file (")
    (broken / path).unlink()
    assert refused(broken) == f"{(broken / path).parent} has no weights (*.safetensors); download the model again"
    (broken / path).with_name("config.json").unlink()
    assert f"{Path(path).parent}/config.json is missing" in refused(broken)


@pytest.mark.parametrize(
    ("path", "name"),
    [(UNET, "conv_in.bias"), (VAE, "decoder.conv_in.bias"), (TEXT, "final_layer_norm.bias")],
    ids=["unet", "vae", "text encoder"],
)
def test_weights_that_do_not_fit_are_named(path, name, broken, refused):
    """diffusers leaves a missing weight empty and transformers draws it at random, with no more than a warning."""
    folder, whole = (broken / path).parent, load_file(broken / path)
    save_file({key: tensor for key, tensor in whole.items() if key != name}, broken / path)
    assert refused(broken) == f"{folder} lacks '{name}'; its weights do not fit its config"
    save_file(whole | {"a.b": torch.zeros(1), "a.c": torch.zeros(1)}, broken / path)
    assert refused(broken) == f"{folder} has a weight too many, 'a.b' and 1 more; its weights do not fit its config"
    save_file(whole | {name: torch.zeros(3)}, broken / path)
    message = refused(broken)
    assert str(folder) in message and name in message and "shape" in message and "ignore_mismatched" not in message
    save_file(whole, broken / path)
    load_sd(broken)  # control


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["vocab.json", "merges.txt"], ["vocab.json"]])
def test_a_tokenizer_without_its_files_is_never_the_stub(kept, toy, broken, refused):
    """transformers makes a tokenizer of two tokens, or one that does not cut prompts, without an error."""
    pipeline_folder.write_pipeline(StableDiffusionPipeline.from_pretrained(broken), broken.parent / "full")
    folder = broken.parent / "full"
    load_sd(folder)  # control
    for path in (folder / "tokenizer").iterdir():
        if path.name not in kept:
            path.unlink()
    message = refused(folder)
    assert message.startswith((f"{folder}/tokenizer", f"cannot load {folder}/tokenizer"))
    assert "download" in message
    shutil.rmtree(folder / "tokenizer")
    assert refused(folder).startswith(f"{folder}/tokenizer is missing; ")


def test_broken_json_and_unknown_schedulers_are_named(broken, refused):
    (broken / "erase_defaults.json").write_text("[1]")
    assert refused(broken).startswith(f"{broken}/erase_defaults.json holds no JSON object")
    (broken / "erase_defaults.json").write_text("{")
    assert refused(broken).startswith(f"{broken}/erase_defaults.json cannot be read as JSON")
    (broken / "erase_defaults.json").unlink()
    (broken / "scheduler" / "scheduler_config.json").unlink()
    assert refused(broken).startswith(f"cannot load {broken}/scheduler: ")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "WarpScheduler"]}))
    assert "names the scheduler 'WarpScheduler', which diffusers does not have" in refused(broken)
    (broken / "unet" / "config.json").write_text("{")
    assert refused(broken).startswith(f"{broken}/unet/config.json cannot be read as JSON")


def test_a_model_of_another_kind_is_refused(broken, refused):
    config = broken / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    assert refused(broken).endswith("predicts 'sample'; only epsilon and v_prediction are known")
    options = json.loads((broken / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(options).save_pretrained(broken / "unet")  # pyright: ignore
    assert f"{broken} is an inpainting model (its UNet takes 9 channels), which this version does not know" in refused(
        broken
    )


def test_pickles_are_read_only_when_they_are_allowed(broken, toy, refused):
    pickled(broken)
    message = refused(broken)
    assert message.startswith(f"{broken}/unet has no safetensors weights; a pickle can run code when loaded: ")
    assert torch.equal(prediction(load_sd(broken, allow_pickle=True)), prediction(toy))
    (broken / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    assert "diffusion_pytorch_model.bin cannot be read as a file of torch.save (" in refused(broken, allow_pickle=True)


# --- single files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_file(tiny_pipeline_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(path, tiny_pipeline_dir, dtype="fp32")
    return path


def test_a_single_file_predicts_exactly_what_its_folder_predicts(
    single_file, tiny_pipeline_dir, cache_dir, monkeypatch
):
    model = load_sd(single_file, config=str(tiny_pipeline_dir))
    base = load_sd(tiny_pipeline_dir)
    assert torch.equal(prediction(model), prediction(base))
    assert torch.equal(model.encode_text(["a moon"]).text_states, base.encode_text(["a moon"]).text_states)
    assert torch.equal(model.decode(torch.ones(1, 4, 8, 8)), base.decode(torch.ones(1, 4, 8, 8)))
    assert isinstance(model.scheduler, DDIMScheduler) and dict(model.scheduler.config)["steps_offset"] == 1
    assert model.folder.parent == cache_dir / "converted"
    assert [path.name for path in model.folder.parent.iterdir()] == [model.folder.name]
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", None)
    assert load_sd(single_file, config=str(tiny_pipeline_dir)).folder == model.folder  # converted once


def test_a_single_file_with_another_config_is_converted_anew(single_file, tiny_pipeline_dir, tmp_path):
    shutil.copytree(tiny_pipeline_dir, tmp_path / "v")
    scheduler = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    assert load_sd(single_file, config=str(tiny_pipeline_dir)).prediction_type == "epsilon"
    assert load_sd(single_file, config=str(tmp_path / "v")).prediction_type == "v_prediction"


def test_a_checkpoint_is_read_only_when_it_is_allowed(single_file, tiny_pipeline_dir, tmp_path, refused):
    path, config = tmp_path / "model.ckpt", str(tiny_pipeline_dir)
    torch.save({"state_dict": load_file(single_file)}, path)
    assert refused(path, config=config).startswith(f"{path} is a pickle, which can run code when loaded; ")
    model = load_sd(path, config=config, allow_pickle=True)
    assert torch.equal(prediction(model), prediction(load_sd(tiny_pipeline_dir)))
    path.write_bytes(path.read_bytes()[:5000])
    message = refused(path, config=config, allow_pickle=True)
    assert message == f"{path} cannot be read as a file of torch.save (it is cut short); copy or download it again"


def test_a_single_file_that_is_not_whole_is_named(single_file, tiny_pipeline_dir, tmp_path, refused, cache_dir):
    path, config = tmp_path / "model.safetensors", str(tiny_pipeline_dir)
    path.write_bytes(single_file.read_bytes()[:-1])
    assert refused(path, config=config).startswith(f"{path} is not a whole safetensors file (")
    tensors = load_file(single_file)
    name = "model.diffusion_model.out.2.bias"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    assert refused(path, config=config) == f"cannot load {path}: it lacks weights that its config asks for"
    save_file({"lora_unet.lora_down.weight": torch.zeros(2)}, path)
    assert refused(path, config=config).startswith(f"{path} is a LoRA, not a model; ")
    assert refused(single_file, config=str(tmp_path)).startswith(f"--config is '{tmp_path}', which has no model_index")
    message = refused(single_file)  # its configs would come from the hub
    assert message.endswith("; offline, name a diffusers folder with its configs and tokenizer: --config DIR")
    assert not cache_dir.exists()


class ModelCheckpoint:
    """Stands for Lightning's callback of this name."""


def test_a_lightning_checkpoint_opens_with_its_callback_and_says_so(single_file, tiny_pipeline_dir, tmp_path):
    """The layout of sd-v1-4.ckpt: a callback object beside `state_dict`, averages (EMA) inside it (4.4)."""
    path, config = tmp_path / "sd-v1-4.ckpt", str(tiny_pipeline_dir)
    state = load_file(single_file)
    state |= {"model_ema.decay": torch.tensor(0.99), "model_ema.diffusion_modelout2bias": torch.zeros(4)}
    state["betas"] = state["sqrt_alphas"] = torch.linspace(0, 1, 5)  # two names for one memory
    torch.save({"callbacks": {ModelCheckpoint: ModelCheckpoint()}, "epoch": 1, "state_dict": state}, path)
    model = load_sd(path, config=config, allow_pickle=True)
    assert torch.equal(prediction(model), prediction(load_sd(tiny_pipeline_dir)))
    assert len(model.notes) == 1 and "ModelCheckpoint" in model.notes[0] and "none of their code ran" in model.notes[0]
    assert load_sd(path, config=config, allow_pickle=True).notes == model.notes  # from the cache as well


# --- parts that come and go -----------------------------------------------------------------------------------------


def test_released_parts_are_freed_and_come_back_as_they_were(toy_pipeline_dir):
    import gc
    import weakref

    model = load_sd(toy_pipeline_dir)
    text, image = model.encode_text(["a cat"]).text_states, model.decode(torch.ones(1, 4, 4, 4))
    parts = [weakref.ref(model.vae), weakref.ref(model.text_encoder)]
    model.release()
    gc.collect()
    assert [part() for part in parts] == [None, None]
    model.release()  # nothing to do
    assert torch.equal(model.encode_text(["a cat"]).text_states, text) and torch.equal(
        model.decode(torch.ones(1, 4, 4, 4)), image
    )
    assert not any(p.requires_grad for p in model.vae.parameters())
    with pytest.raises(AttributeError, match="'StableDiffusion' object has no attribute 'tokeniser'"):
        _ = model.tokeniser


def test_a_reloaded_unet_is_the_bases_in_the_same_parameters(toy_pipeline_dir):
    model = load_sd(toy_pipeline_dir)
    base = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    parameters = dict(model.unet.named_parameters())
    model.round_network(torch.bfloat16)
    assert not torch.equal(model.unet.conv_in.weight.float(), base["conv_in.weight"])
    model.reload_network()
    assert all(parameter is parameters[name] for name, parameter in model.unet.named_parameters())
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.unet.state_dict().items())


# --- the cache ------------------------------------------------------------------------------------------------------


def test_a_damaged_conversion_is_made_again(single_file, tiny_pipeline_dir, cache_dir):
    """Files in the cache are compared with their hashes before they are used."""
    folder = load_sd(single_file, config=str(tiny_pipeline_dir)).folder
    whole = (folder / UNET).read_bytes()
    for damage in (whole[:-4] + b"\0\0\0\0", b"", None):
        (folder / UNET).unlink() if damage is None else (folder / UNET).write_bytes(damage)
        assert loading.locate(single_file, config=str(tiny_pipeline_dir)) == folder
        assert (folder / UNET).read_bytes() == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_used_is_one_line(single_file, tiny_pipeline_dir, tmp_path, refused):
    """A file in the place of the cache folder; another user's cache fails the same way (4.7)."""
    (tmp_path / "file").write_text("")
    message = refused(single_file, config=str(tiny_pipeline_dir), cache_dir=tmp_path / "file")
    assert "a folder in this path is a file" in message and message.endswith("choose another folder")


def test_what_a_single_file_became_can_be_removed_and_applied_offline(
    single_file, tiny_pipeline_dir, tmp_path, capsys, monkeypatch
):
    """`apply` and `remove` take --config, --cache-dir and --unet as the main command does (4.3)."""
    from erase import cli, delta, tensor_files
    from erase.export.states import unet_state

    base = unet_state(load_sd(single_file, config=str(tiny_pipeline_dir)).unet)
    new = {name: tensor + 0.5 if name.endswith("conv_in.bias") else tensor for name, tensor in base.items()}
    delta.save(tmp_path / "delta.safetensors", delta.difference(base, new))
    given = ["--model", str(single_file), "--config", str(tiny_pipeline_dir), "--cache-dir", str(tmp_path / "cache")]
    given += ["--delta", str(tmp_path / "delta.safetensors")]
    cli.main(["apply", *given, "--output", str(tmp_path / "erased")])
    assert delta.content_hash(unet_state(stored_unet.load_unet(tmp_path / "erased"))) == delta.content_hash(new)
    path = tmp_path / "unet.safetensors"
    tensor_files.write_tensors(path, {name.removeprefix("unet."): tensor for name, tensor in new.items()})
    cli.main(["remove", *given, "--unet", str(path), "--output", str(tmp_path / "restored")])
    assert delta.content_hash(unet_state(stored_unet.load_unet(tmp_path / "restored"))) == delta.content_hash(base)
    assert f"{path} replaces 686 of the UNet's 686 tensors" in capsys.readouterr().out
