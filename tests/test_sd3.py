"""Laws of Stable Diffusion 3: it encodes, predicts and generates as diffusers does, and every method erases from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_sd3
from diffusers import StableDiffusion3Pipeline
from toy_training import fitting

from erase import delta, erase_concept, guards, tensor_files
from erase.concepts import Concept
from erase.data import prompt_states
from erase.errors import EraseError
from erase.evaluation import cli, generate
from erase.export.pipeline import save_pipeline
from erase.families import loading
from erase.families.sd3 import StableDiffusion3
from erase.methods import METHODS

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPTS = ["a church", "a small dog in a garden"]
HOW: dict[str, Any] = {"num_forget": 2, "num_retain": 2, "num_inference_steps": 2, "num_train_steps": 2}
REFUSED = {"fmn": "sd3 has no cross-attention layers", "salun-robust": "sd3 has no table of token embeddings"}
REFUSED["advunlearn"] = "--scope is 'text', which this model does not have"
REFUSED["hirm"] = "--scope is 'text-first', which this model does not have"
REFUSED["stereo"] = REFUSED["recare"] = REFUSED["salun-robust"]
HOW |= {"batch_size": 2, "num_samples": 0, "quiet": True}


@pytest.fixture
def model(toy_sd3_dir) -> StableDiffusion3:
    found = loading.load(toy_sd3_dir)
    assert isinstance(found, StableDiffusion3)
    return found


@pytest.fixture
def pipeline(toy_sd3_dir) -> Any:
    found = StableDiffusion3Pipeline.from_pretrained(toy_sd3_dir)
    found.set_progress_bar_config(disable=True)
    return found


def test_text_is_encoded_as_by_the_pipeline(model, pipeline):
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    found = model.encode_text(PROMPTS)
    assert found.text_states.shape == (2, 77 + 256, 24) and len(found[0:1].text_states[0]) == model.max_tokens
    torch.testing.assert_close((found.states, found.pooled), (states.detach(), pooled.detach()))


def test_the_noise_is_that_of_the_flow(model, pipeline):
    """Noisy latents are the scheduler's, and the network's velocity gives back noise and image."""
    x, eps = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t, scheduler = torch.tensor([0, 500, 999]), pipeline.scheduler
    times = scheduler.timesteps.flip(0)[t]
    noisy = model.add_noise(x, eps, t)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x, times, eps))
    c = model.encode_text(["a", "b", "c"])
    v = pipeline.transformer(noisy, c.states, c.pooled, times).sample
    torch.testing.assert_close(model(noisy, t, c), noisy + (1 - times.view(-1, 1, 1, 1) / 1000) * v)

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, **_: Any) -> Any:
            return type("Output", (), {"sample": eps - x})

    torch.testing.assert_close(model.predict(Exact(), noisy, t, c), eps, atol=1e-5, rtol=0)


def test_images_are_the_pipelines_own(model, pipeline):
    ours = model.draw(PROMPTS, [1, 2], steps=3, guidance=4.0, size=8)
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 8, "width": 8}
    theirs = pipeline(PROMPTS, generator=draws, output_type="latent", **how).images
    torch.testing.assert_close(ours, theirs)
    images = pipeline.vae.decode(theirs / 1.5 + 0.1).sample.clamp(-1, 1)
    torch.testing.assert_close(model.decode(ours), images)
    mean, _ = model.encode_images(images)
    torch.testing.assert_close(mean, (pipeline.vae.encode(images).latent_dist.mean - 0.1) * 1.5)


def test_both_samplers_follow_one_flow(model):
    """With many steps they end at the same latents, which few steps miss."""
    how: dict[str, Any] = {"guidance": 2.0, "size": 8}
    exact = model.draw(PROMPTS, [1, 2], steps=200, **how)
    near = model.draw(PROMPTS, [1, 2], steps=50, sampler="dpm++", **how)
    far = model.draw(PROMPTS, [1, 2], steps=2, **how)
    assert (near - exact).norm() < 0.1 * (far - exact).norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_another_precision_rounds_and_leaves_the_weights_alone(model, precision):
    before = delta.content_hash(model.state_of(model.network))
    how: dict[str, Any] = {"steps": 2, "guidance": 2.0, "size": 8}
    exact = model.draw(PROMPTS, [1, 2], **how)
    model.precision = precision
    rounded = model.draw(PROMPTS, [1, 2], **how)
    assert not torch.equal(rounded, exact) and (rounded - exact).abs().max() < 0.1
    assert delta.content_hash(model.state_of(model.network)) == before


@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFUSED])
def test_every_method_erases_and_the_delta_is_exact(method, toy_sd3_dir, tmp_path):
    how = fitting(method, HOW)
    if method == "oce":  # the toy's few dimensions are full of the forget prompts' directions
        how |= {"set": ("least=0.5",)}
    if method == "dp":  # and of the retained prompts
        how |= {"set": ("threshold=1000", "least=0.5")}
    run = erase_concept("church", str(toy_sd3_dir), method=method, output=str(tmp_path / "run"), **how)
    change = delta.load(run.folder / "delta.safetensors")
    assert run.record.weights.changed and all(name.startswith("transformer.") for name in change.changed)
    base, erased = (loading.load(folder) for folder in (toy_sd3_dir, run.folder))
    t, c = torch.tensor([700]), base.encode_text(["church"])
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(base(x, t, c), erased(x, t, c))
    StableDiffusion3Pipeline.from_pretrained(run.folder)
    before, after = (tensor_files.read_tensors(folder / WEIGHTS) for folder in (toy_sd3_dir, run.folder))
    applied = delta.apply(delta.of_component("transformer", before), change)
    assert delta.content_hash(delta.in_component("transformer", applied)) == delta.content_hash(after)
    removed = delta.in_component("transformer", delta.remove(applied, change))
    assert delta.content_hash(removed) == delta.content_hash(before) != delta.content_hash(after)


PREDICT = """
import sys, torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
for part in (pipeline.transformer, pipeline.vae):
    for tensor in part.requires_grad_(False).parameters():
        tensor.data = tensor.data.clone()
with torch.no_grad():
    states, _, pooled, _ = pipeline.encode_prompt(["a church"], None, None, do_classifier_free_guidance=False)
    time = pipeline.scheduler.timesteps.flip(0)[500].expand(1)
    how = {"hidden_states": x, "timestep": time, "encoder_hidden_states": states, "pooled_projections": pooled}
    v = pipeline.transformer(**how).sample
    torch.save((states, pooled, x + (1 - time / 1000) * v, pipeline.vae.decode(x).sample), sys.argv[3])
assert not any(name.split(".")[0] == "erase" for name in sys.modules)
"""


def test_stock_diffusers_in_a_fresh_process_predicts_what_the_model_in_memory_predicts(model, toy_sd3_dir, tmp_path):
    """Up to rounding: a CPU computes other bits with weights that lie elsewhere in a file."""
    draws = torch.Generator().manual_seed(2)
    x, t, c = torch.randn(1, 4, 4, 4, generator=draws), torch.tensor([500]), model.encode_text(["a church"])
    with torch.no_grad():
        before = model(x, t, c)
        for parameter in model.transformer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
        expected = c.text_states, c.pooled, model(x, t, c), model.vae.decode(x).sample
    save_pipeline(toy_sd3_dir, tmp_path / "out", model.transformer.state_dict())
    torch.save(x, tmp_path / "x.pt")
    program = [sys.executable, "-c", PREDICT, *(str(tmp_path / name) for name in ("out", "x.pt", "answer.pt"))]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another count, other roundings
    subprocess.run(program, check=True, cwd=tmp_path, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "answer.pt", weights_only=True), expected)
    assert (before - expected[2]).abs().max() > 0.01


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_without_an_answer_is_refused_before_any_image(method, toy_sd3_dir, tmp_path, cache_dir):
    with pytest.raises(EraseError, match=REFUSED[method]):
        erase_concept("church", str(toy_sd3_dir), method=method, output=str(tmp_path / "run"), **HOW)
    assert not (tmp_path / "run").exists() and not list(cache_dir.glob("latents/*"))


@pytest.mark.parametrize("attack", ["p4d", "unlearn-diff-atk", "ring-a-bell", "learnt-word"])
def test_an_attack_that_finds_words_is_refused_before_any_image(attack, toy_sd3_dir, clip_dir, tmp_path, capsys):
    how = ["--base", toy_sd3_dir, "--concept", "van_gogh", "--judge-model", f"clip={clip_dir}", "--quick"]
    with pytest.raises(SystemExit) as end:
        cli.main(
            [str(one) for one in ("attack", "--model", toy_sd3_dir, "--attack", attack, *how, "--output", tmp_path)]
        )
    assert end.value.code == 2 and "sd3 has no table of token embeddings" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.safetensors")) and not list(tmp_path.glob("**/*.json*"))


@pytest.mark.parametrize(("form", "said"), [("lora", "sd3 has no names"), ("single-file", "written as folders only")])
def test_other_forms_are_refused_before_any_image(form, said, toy_sd3_dir, tmp_path, cache_dir):
    with pytest.raises(EraseError, match=said):
        erase_concept("church", str(toy_sd3_dir), output=str(tmp_path / "run"), save=("pipeline", form), **HOW)
    assert not (tmp_path / "run").exists() and not list(cache_dir.glob("latents/*"))


@pytest.mark.parametrize("scope", StableDiffusion3.scopes)
def test_only_the_scope_changes(scope, toy_sd3_dir, tmp_path):
    output = tmp_path / "run"
    run = erase_concept(
        "church", str(toy_sd3_dir), method="relabel", scope=scope, output=str(output), save=("delta",), **HOW
    )
    within = StableDiffusion3.scopes[scope]
    names = [name.removeprefix("transformer.") for name in delta.load(run.folder / "delta.safetensors").changed]
    assert names and all(map(within, names))


def test_a_scope_of_the_text_is_what_the_text_passes_through(model):
    """Without the weights of `xattn` nothing of the prompt reaches the image."""
    with torch.no_grad():
        for name, parameter in model.trainable("xattn").items():
            if "to_add_out" not in name:
                parameter.zero_()
    t, (one, other) = torch.tensor([500]), (model.encode_text([prompt]) for prompt in PROMPTS)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x, t, one), model(x, t, other))


def test_the_blocks_of_3_5_are_in_the_scopes(toy_sd3_dir, tmp_path):
    """Norms of queries and keys, and in the first block a second attention among the image tokens."""
    folder = Path(shutil.copytree(toy_sd3_dir, tmp_path / "model"))
    toy_sd3.make_transformer(qk_norm="rms_norm", dual_attention_layers=(0,)).save_pretrained(folder / "transformer")
    model = loading.load(folder)
    second = {name for name in model.trainable("full") if ".attn2." in name}
    for scope, holds in (("attn", True), ("selfattn", True), ("noxattn", True), ("xattn", False), ("xattn-kv", False)):
        assert (second <= model.trainable(scope).keys()) is holds and second
    run = erase_concept("church", str(folder), scope="selfattn", output=str(tmp_path / "run"), **HOW)
    changed = {name.removeprefix("transformer.") for name in delta.load(run.folder / "delta.safetensors").changed}
    assert changed & second
    StableDiffusion3Pipeline.from_pretrained(run.folder)


def test_words_stand_in_both_runs_of_text_states(model):
    clip, t5 = model.token_runs("a dog")
    assert (clip.begin, clip.first, clip.stop, clip.tokens) == (0, 1, 77, model.tokens("a dog"))
    assert (t5.begin, t5.first, t5.stop) == (77, 77, 333) and model.tokenizer_3.decode(t5.tokens) == "a dog"
    states = [model.encode_text([prompt]).text_states[0] for prompt in ("a dog", "a dot")]
    moved = (states[0] != states[1]).any(1).nonzero().view(-1).tolist()
    assert min(moved) == clip.last  # nothing before the last letter, for CLIP reads from left to right
    text = prompt_states.read_text(model, Concept("dog", "object", ("a dog",), ("a cat",), retain=("a hat", "")))
    assert text.forget_at.tolist() == [[4, 77 + 5]]  # for T5 the spaces are tokens too
    assert text.retain_at.tolist() == [[4, 77 + 5], [0, 77]]
    c_e, c_a = text.pairs("last")
    assert torch.equal(c_e.T, text.forget[0, [4, 82]].double()) and torch.equal(c_a.T, text.anchor[0, [4, 82]].double())
    assert text.kept("all").shape[1] == 2 * 333 and text.pairs("all")[0].shape[1] == 332


def test_a_long_prompt_is_cut_by_clip_and_reported(model):
    assert model.truncates("word " * 60) and not model.truncates("word")


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3", "scheduler"])
def test_a_missing_part_is_one_line(part, toy_sd3_dir, tmp_path):
    folder = Path(shutil.copytree(toy_sd3_dir, tmp_path / "model"))
    shutil.rmtree(folder / part)
    with pytest.raises(EraseError, match=part):
        loading.load(folder)


def test_the_negative_prompt_is_the_pipelines_own(toy_sd3_dir, pipeline):
    """Bit for bit with one image, with the pooled states; images that continue from noise are guarded too."""
    model = generate.load_model(str(toy_sd3_dir), guard=guards.make("negative", "church"), device="cpu")
    how: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 8, "width": 8}
    how |= {"output_type": "latent", "return_dict": False}
    found = model.draw(["a dog"], [1], steps=3, guidance=4.0, size=8)
    pipeline = model.assembled(model.network, model.sampler())  # type: ignore[attr-defined]
    plain, negative = (
        pipeline("a dog", negative_prompt=text, generator=torch.Generator().manual_seed(1), **how)[0]
        for text in (None, "church")
    )
    assert torch.equal(found, negative) and not torch.allclose(found, plain, atol=1e-3)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    guarded = model.draw_from(noise, ["a dog"], start=2, steps=5, guidance=4.0)
    model.guard = None
    assert not torch.allclose(model.draw_from(noise, ["a dog"], start=2, steps=5, guidance=4.0), guarded, atol=1e-3)


@pytest.mark.parametrize("sampler", ["model", "dpm++"])
def test_sld_acts_with_either_sampler(model, sampler):
    """At the first step all is noise and nothing is guarded; DPM-Solver++ begins just below."""
    how: dict[str, Any] = {"guidance": 4.0, "size": 8, "sampler": sampler}
    plain = [model.draw(PROMPTS, [1, 2], steps=steps, **how) for steps in (1, 3)]
    model.guard = guards.SLD("church", 0, 3.0, 0.3, 0.4, 0.6)
    one, three = (model.draw(PROMPTS, [1, 2], steps=steps, **how) for steps in (1, 3))
    assert torch.allclose(one, plain[0], atol=1e-5) == (sampler == "model")
    assert not torch.allclose(three, plain[1], atol=1e-3)


def test_skip_layer_guidance_is_refused_behind_a_guard(pipeline):
    how: dict[str, Any] = {"num_inference_steps": 4, "height": 8, "width": 8, "skip_layer_guidance_stop": 1.0}
    with (
        guards.make("negative", "church").on(pipeline),
        pytest.raises(EraseError, match="a guard does not go with skip layer guidance"),
    ):
        pipeline("a dog", skip_guidance_layers=[0], **how)
