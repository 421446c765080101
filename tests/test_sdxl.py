"""Stable Diffusion XL: its conditioning against diffusers, its VAE's precision, every method on it, and its exports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from toy_training import fitting

from erase import delta, erase_concept, methods
from erase.concepts import Concept
from erase.conditioning import Conditioning
from erase.delta import in_component
from erase.errors import EraseError
from erase.export.pipeline import save_pipeline
from erase.families import loading
from erase.families.sdxl import StableDiffusionXL
from erase.methods import METHODS
from erase.tensor_files import read_tensors

PROMPTS = ["a photo of a cat", "a house"]


def load(folder: Path) -> StableDiffusionXL:
    model = loading.load(folder)
    assert isinstance(model, StableDiffusionXL)
    return model


def stock(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copy(toy_sdxl_dir, tmp_path) -> Path:
    return Path(shutil.copytree(toy_sdxl_dir, tmp_path / "copy"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_conditioning_is_what_the_pipeline_encodes(toy_sdxl_dir):
    model = load(toy_sdxl_dir)
    states, empty, pooled, empty_pooled = stock(toy_sdxl_dir).encode_prompt(PROMPTS, device="cpu")
    c, zero = model.encode_text(PROMPTS), model.unconditional().expand(2)
    assert torch.equal(c.text_states, states) and c.pooled is not None and torch.equal(c.pooled, pooled)
    assert zero.pooled is not None and torch.equal(zero.text_states, empty) and torch.equal(zero.pooled, empty_pooled)
    assert not empty.any() and model.encode_text([""]).text_states.any()  # zeros, and not the empty prompt


def test_without_zeros_the_unconditional_branch_is_the_empty_prompt(copy):
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    model = load(copy)
    assert torch.equal(model.unconditional().text_states, model.encode_text([""]).text_states)


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_it_generates_what_stock_diffusers_generates(toy_sdxl_dir, guidance):
    own = load(toy_sdxl_dir).draw(PROMPTS, [1, 2], steps=3, guidance=guidance, size=8)
    theirs = stock(toy_sdxl_dir)(
        PROMPTS,
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="latent",
    ).images
    torch.testing.assert_close(own, theirs)


def test_pooled_states_and_sizes_change_the_prediction(toy_sdxl_dir):
    model = load(toy_sdxl_dir)
    c, x, t = model.encode_text(PROMPTS), torch.randn(2, 4, 4, 4), torch.tensor([10, 900])
    assert c.pooled is not None
    own = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(2, -1)
    plain = model(x, t, c)
    assert torch.equal(plain, model(x, t, Conditioning(c.states, c.pooled, own)))
    for other in (Conditioning(c.states, c.pooled + 1), Conditioning(c.states, c.pooled, own * 4)):
        assert (model(x, t, other) - plain).abs().max() > 1e-5


def test_scope_pooled_is_the_weights_of_the_pooled_text_and_no_scope_of_attention_holds_them(toy_sdxl_dir):
    model = load(toy_sdxl_dir)
    assert len(model.trainable("pooled")) == 4
    for scope in ("xattn", "xattn-kv", "selfattn", "attn", "noxattn", "notime"):
        assert not model.trainable("pooled").keys() & model.trainable(scope).keys()


def test_a_trajectory_of_a_turbo_scheduler_starts_at_the_last_timestep_and_guidance_0_is_none(copy):
    EulerAncestralDiscreteScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear").save_pretrained(
        copy / "scheduler"
    )
    edit(copy / "model_index.json", scheduler=["diffusers", "EulerAncestralDiscreteScheduler"])
    model = load(copy)
    x, index, c = torch.randn(1, 4, 4, 4), torch.tensor([0]), model.encode_text(PROMPTS[:1])
    how: Any = {"steps": 4, "guidance": 0.0}
    _, t = model.trajectory(x, index, c, model.unconditional(), **how)
    assert t.tolist() == [999]
    moved = [
        model.trajectory(x, index + 2, c, empty, **how)[0]
        for empty in (model.unconditional(), model.encode_text(["a red horse"]))
    ]
    torch.testing.assert_close(*moved)


def test_the_vae_decodes_in_float32_where_fp16_would_overflow(copy):
    """The last convolutions times 1e6 give values beyond 65,504, the largest number in fp16."""
    model = load(copy)
    model.vae.decoder.conv_out.weight.data *= 1e6
    model.vae.encoder.conv_out.weight.data *= 1e6
    latents, images = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 8, 8)
    exact, (mean, _) = model.decode(latents), model.encode_images(images)
    model.precision = "fp16"
    for upcast in (True, False):
        model.vae.register_to_config(force_upcast=upcast)
        assert torch.equal(model.decode(latents), exact)
        assert torch.equal(model.encode_images(images)[0], mean)


def test_latent_moments_of_a_fine_tune_are_applied_both_ways(copy):
    edit(copy / "vae" / "config.json", latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    plain, model = load(copy), load(copy)
    plain.vae.register_to_config(latents_mean=None, latents_std=None)
    images, shift = torch.rand(1, 3, 8, 8), torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
    (mean, _), (base, _) = model.encode_images(images), plain.encode_images(images)
    torch.testing.assert_close(mean, (base - shift * 0.13025) / 2)
    torch.testing.assert_close(model.decode(mean), plain.decode(base))


def test_fp16_variants_load_as_their_numbers_in_float32(toy_sdxl_dir, tmp_path):
    stock(toy_sdxl_dir).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    model, base = load(tmp_path / "half"), load(toy_sdxl_dir)
    for part in (model.unet, model.vae, model.text_encoder, model.text_encoder_2):
        assert all(tensor.dtype == torch.float32 for tensor in part.parameters())
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, base.unet.state_dict()[name].half().float())


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "is the refiner of Stable Diffusion XL"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "without the component 'text_encoder_2'"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "force_zeros_for_empty_prompt is 'yes'"),
        ("unet/config.json", {"addition_embed_type": None}, "takes no pooled text and sizes"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "is a latent consistency model"),
    ],
)
def test_another_model_under_the_pipelines_name_is_refused(copy, file, values, message):
    edit(copy / file, **values)
    with pytest.raises(EraseError, match=message):
        loading.load(copy)


def test_a_learnt_word_is_known_to_both_encoders(toy_sdxl_dir):
    model = load(toy_sdxl_dir)
    token = model.tokens("cat")[0]
    other = model.token_embeddings[token] + 1
    expected = model.encode_with(PROMPTS, token, other)
    before = model.encode_text(PROMPTS)
    model.set_token(token, other)
    now = model.encode_text(PROMPTS)
    assert torch.equal(now.text_states, expected.text_states) and not torch.equal(now.text_states, before.text_states)
    assert now.pooled is not None and expected.pooled is not None and torch.equal(now.pooled, expected.pooled)


PREDICT = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], add_watermarker=False)
x, sizes = torch.load(sys.argv[2], weights_only=True)
answers = []
with torch.no_grad():
    for _ in range(2):
        encoded = pipeline.encode_prompt(["a photo of a cat", "a house"], device="cpu")
        added = {"text_embeds": encoded[2], "time_ids": sizes}
        predicted = pipeline.unet(x, 500, encoder_hidden_states=encoded[0], added_cond_kwargs=added).sample
        answers.append((encoded[0], encoded[2], predicted, pipeline.vae.decode(x).sample))
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            for tensor in part.requires_grad_(False).parameters():
                tensor.data = tensor.data.clone()
    torch.save(answers, sys.argv[3])
assert not any(name.split(".")[0] == "erase" for name in sys.modules)
"""


def test_stock_diffusers_in_a_fresh_process_predicts_exactly_what_the_model_in_memory_predicts(toy_sdxl_dir, tmp_path):
    """Prompts, prediction and image, up to rounding; bit for bit where weights are aligned and frozen, as in memory.

    A CPU computes other bits with weights that lie elsewhere in a file, and with convolutions that may be trained.
    """
    model, draws = load(toy_sdxl_dir), torch.Generator().manual_seed(2)
    x, sizes = torch.randn(2, 4, 4, 4, generator=draws), torch.tensor([[16.0, 8, 0, 4, 8, 8]] * 2)
    t, c = torch.tensor([500, 500]), model.encode_text(PROMPTS)
    c = Conditioning(c.states, c.pooled, sizes)
    with torch.no_grad():
        before = model(x, t, c)
        for parameter in model.unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
        expected: Any = c.states, c.pooled, model(x, t, c), model.vae.decode(x).sample  # pyright: ignore
    save_pipeline(toy_sdxl_dir, tmp_path / "out", model.unet.state_dict())
    torch.save((x, sizes), tmp_path / "inputs.pt")
    program = [sys.executable, "-c", PREDICT, str(tmp_path / "out"), str(tmp_path / "inputs.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another count, other roundings
    subprocess.run([*program, str(tmp_path / "answer.pt")], check=True, cwd=tmp_path, env=environment)
    mapped, aligned = torch.load(tmp_path / "answer.pt", weights_only=True)
    torch.testing.assert_close(mapped, expected)
    assert all(torch.equal(*pair) for pair in zip(aligned, expected, strict=True))
    assert (before - expected[2]).abs().max() > 0.01


CONCEPT = Concept(
    "cat",
    "object",
    forget=("a cat", "a photo of a cat"),
    anchor=("a dog", "a photo of a dog"),
    retain=("a tree", "a boat", "a house"),
)
OPTIONS: dict[str, Any] = {
    "num_forget": 3,
    "num_retain": 2,
    "num_inference_steps": 2,
    "num_train_steps": 2,
    "batch_size": 2,
    "num_samples": 0,
    "learning_rate": 1e-3,
    "device": "cpu",
    "quiet": True,
}


TEXT = [name for name in METHODS if METHODS[name].scope.startswith("text")]


@pytest.mark.parametrize("name", TEXT)
def test_a_method_that_trains_one_text_encoder_is_refused_before_any_image(toy_sdxl_dir, tmp_path, cache_dir, name):
    with pytest.raises(EraseError, match="--scope is 'text.*', which this model does not have; choose one of"):
        erase_concept(CONCEPT, toy_sdxl_dir, output=str(tmp_path / "run"), method=name, **OPTIONS)
    assert not (tmp_path / "run").exists() and not list(cache_dir.glob("latents/*"))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", [*{METHODS[name].path: name for name in METHODS if name not in TEXT}.values()])
def test_every_method_erases_from_it_and_the_delta_is_exact(toy_sdxl_dir, tmp_path, name, low_memory):
    """The run's own folder, opened by stock diffusers, has the erased weights; removed, the base's bits are back."""
    if low_memory and issubclass(methods.load(name), methods.ClosedForm):
        pytest.skip("closed forms have no training to save memory in")
    output = tmp_path / "run"
    hyperparameters = {"scissorhands": {"sparsity": 0.9, "prepare_batches": 1}, "speed": {"threshold": 0.5}}
    hyperparameters["dp"] = {"threshold": 0.5}
    hyperparameters["stereo"] = hyperparameters["recare"] = {"words": 1, "word_steps": 2}
    erase_concept(
        CONCEPT,
        toy_sdxl_dir,
        output=str(output),
        method=name,
        low_memory=low_memory,
        set=hyperparameters.get(name, {}),
        **fitting(name, OPTIONS),
    )
    base = read_tensors(toy_sdxl_dir / "unet" / "diffusion_pytorch_model.safetensors")
    new = read_tensors(output / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {key for key in base if not torch.equal(base[key], new[key])}
    assert changed and stock(output).unet.state_dict().keys() == base.keys()
    change = delta.load(output / "delta.safetensors")
    applied = delta.apply(delta.of_component("unet", base), change)
    assert all(torch.equal(tensor, new[key]) for key, tensor in in_component("unet", applied).items())
    removed = delta.remove(applied, change)
    assert all(torch.equal(tensor, base[key]) for key, tensor in in_component("unet", removed).items())


@pytest.mark.parametrize(
    ("scope", "mask"),
    [*((name, "saliency") for name in StableDiffusionXL.scopes), *(("full", m) for m in ("random", "inverse", "none"))],
)
def test_with_every_scope_and_mask_only_weights_inside_change(toy_sdxl_dir, tmp_path, scope, mask):
    output = tmp_path / "run"
    erase_concept(CONCEPT, toy_sdxl_dir, output=str(output), scope=scope, mask=mask, **OPTIONS)
    base = read_tensors(toy_sdxl_dir / "unet" / "diffusion_pytorch_model.safetensors")
    new = read_tensors(output / "unet" / "diffusion_pytorch_model.safetensors")
    inside = load(toy_sdxl_dir).trainable(scope)
    num_changed = {key: int((base[key] != new[key]).sum()) for key in base}
    assert all(key in inside for key, num in num_changed.items() if num) and any(num_changed.values())
    num_inside = sum(parameter.numel() for parameter in inside.values())
    assert sum(num_changed.values()) <= num_inside * (1 if mask == "none" else 0.5) + 1
    assert mask != "none" or sum(num_changed.values()) > 0.5 * num_inside  # control: a mask is what holds weights
