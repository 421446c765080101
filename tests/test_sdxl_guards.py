"""Guards on Stable Diffusion XL: every branch has the pooled text and the sizes that belong to its text states."""

from typing import Any

import pytest
import torch
from bright import Bright
from diffusers import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import Tensor

from erase import guards
from erase.errors import EraseError
from erase.evaluation import arm, attacked, cli, generate
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.guards import SLD, NegativePrompt

TEXT, PROMPTS = "a nude person", ("a cat", "a dog")
LOUD = {"guidance": 3.0, "threshold": 0.3, "momentum_scale": 0.4, "momentum_beta": 0.6}  # every branch has its cases
SIZES: dict[str, Any] = {"original_size": (32, 16), "crops_coords_top_left": (2, 4), "target_size": (16, 8)}


@pytest.fixture(scope="module")
def pipeline(toy_sdxl_dir) -> Any:
    made: Any = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_dir, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompts: tuple[str, ...] = PROMPTS, **options: Any) -> Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"height": 8, "width": 8, "guidance_scale": 4.0, "output_type": "latent", "return_dict": False, **options}
    return pipeline(list(prompts), num_inference_steps=4, generator=seeds, **given)[0]


@torch.no_grad()
def by_hand(pipeline: Any, sld: SLD, *, pooled_of: str) -> Tensor:
    """The paper's loop, one image and one forward at a time. pooled_of: whose pooled text the third branch has."""
    found = []
    encode: Any = pipeline.encode_prompt
    sizes = torch.tensor([[*SIZES["original_size"], *SIZES["crops_coords_top_left"], *SIZES["target_size"]]]).float()
    for number, prompt in enumerate(PROMPTS):
        p, zero, pooled, zero_pooled = encode(prompt, device="cpu", do_classifier_free_guidance=True)
        s, _, unsafe, _ = encode(sld.text, device="cpu", do_classifier_free_guidance=False)
        third = (s, unsafe if pooled_of == "text" else pooled)
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(number)) * scheduler.init_noise_sigma
        nu = torch.zeros_like(x)
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            eps_p, eps_s, eps_0 = (
                pipeline.unet(
                    seen, t, encoder_hidden_states=c, added_cond_kwargs={"text_embeds": q, "time_ids": sizes}
                ).sample
                for c, q in ((p, pooled), third, (zero, zero_pooled))
            )
            gamma, nu = sld.away(eps_0, eps_p, eps_s, nu)
            eps = eps_0 + 4.0 * (eps_p - eps_0 - (gamma if i >= sld.warmup else 0))
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        found.append(x)
    return torch.cat(found)


@pytest.mark.parametrize("warmup", [0, 2])
def test_sld_is_the_obvious_loop_with_the_pooled_text_of_the_guard(pipeline, warmup):
    sld = SLD(TEXT, warmup, **LOUD)
    expected, other = (by_hand(pipeline, sld, pooled_of=name) for name in ("text", "prompt"))
    plain = draw(pipeline, **SIZES)
    with sld.on(pipeline):
        guarded = draw(pipeline, **SIZES)
        assert not torch.allclose(guarded, draw(pipeline))  # control: sizes reach every branch
    scale = plain.abs().max()
    assert (guarded - expected).abs().max() < 1e-5 * scale
    for wrong in (other, plain):
        assert (guarded - wrong).abs().max() > 1e-4 * scale


@pytest.mark.parametrize("zeros", [True, False])
def test_the_negative_prompt_is_the_pipelines_own(pipeline, zeros):
    """Bit for bit with one image; a batch of two texts encodes with other rounding than one text."""
    before = pipeline.config.force_zeros_for_empty_prompt
    try:
        pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
        for prompts, tolerance in ((PROMPTS[:1], 0.0), (PROMPTS, 1e-4)):
            expected = draw(pipeline, prompts, negative_prompt=[TEXT] * len(prompts))
            with NegativePrompt(TEXT).on(pipeline):
                guarded = draw(pipeline, prompts)
                replaced = draw(pipeline, prompts, negative_prompt=["a boat"] * len(prompts))
            assert (guarded - expected).abs().max() <= tolerance and (replaced - expected).abs().max() <= tolerance
            assert (draw(pipeline, prompts) - expected).abs().max() > 0.01
    finally:
        pipeline.register_to_config(force_zeros_for_empty_prompt=before)


@pytest.mark.parametrize("name", guards.PRESETS)
def test_it_works_with_another_pipeline_and_puts_everything_back(pipeline, name):
    parts = {part: model for part, model in pipeline.components.items() if part not in ("image_encoder",)}
    other: Any = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    other.set_progress_bar_config(disable=True)

    def change() -> Tensor:
        given: Any = {"strength": 0.9, "num_inference_steps": 20, "guidance_scale": 4.0, "output_type": "latent"}
        image, draws = torch.zeros(1, 3, 8, 8), torch.Generator().manual_seed(0)
        return other("a cat", image=image, generator=draws, return_dict=False, **given)[0]

    plain, own = change(), dict(vars(pipeline.unet))
    with guards.make(name, TEXT).on(other):
        assert not torch.allclose(change(), plain)
    assert torch.equal(change(), plain) and vars(pipeline.unet) == own


def test_a_guard_needs_guidance(pipeline):
    for name in (name for name in guards.PRESETS if name != "nag"):
        with guards.make(name, TEXT).on(pipeline), pytest.raises(EraseError, match="guidance_scale above 1"):
            draw(pipeline, guidance_scale=0.0)


def test_another_kind_of_network_is_refused_by_its_name(toy_pipeline_dir):
    other: Any = StableDiffusionPipeline.from_pretrained(toy_pipeline_dir)
    other.unet.register_to_config(addition_embed_type="image")
    with pytest.raises(EraseError, match="guards know .* not the UNet of this StableDiffusionPipeline .*'image'"):
        guards.make("negative", TEXT).on(other).__enter__()


@pytest.mark.parametrize("name", ["sld-max", "negative"])
def test_the_family_generates_and_predicts_through_a_guard(toy_sdxl_dir, pipeline, name):
    """A learned word's prediction e makes eps(0) + s (e - eps(0)) what the pipeline computes behind the guard."""
    model, how = loading.load(toy_sdxl_dir), {"steps": 4, "guidance": 4.0, "size": 8}
    plain = model.draw(PROMPTS, [0, 1], **how)
    model.guard = guards.make(name, TEXT)
    guarded = model.draw(PROMPTS, [0, 1], **how)
    with model.guard.on(pipeline):
        assert (guarded - draw(pipeline)).abs().max() < 1e-3  # of up to 14; SLD's thresholds enlarge rounding
    assert (guarded - plain).abs().max() > 0.01

    x, t, s = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([500, 900]), 5.0
    c, c_s, empty = model.encode_text(PROMPTS), model.encode_text([TEXT] * 2), model.unconditional().expand(2)
    with torch.no_grad():
        eps, eps_s, eps_0 = (model(x, t, one) for one in (c, c_s, empty))
        found = eps_0 + s * (predict(model, x, t, c) - eps_0)
    expected = eps_s + s * (eps - eps_s)
    if isinstance(model.guard, SLD):
        expected = eps_0 + s * (eps - eps_0 - model.guard.away(eps_0, eps, eps_s, torch.zeros(()))[0])
    assert (found - expected).abs().max() < 1e-3  # SLD's factor of 5000 enlarges rounding
    assert (found - eps_0 - s * (eps - eps_0)).abs().max() > 0.01


def test_an_evaluation_behind_a_guard_generates_other_images(toy_sdxl_dir, tmp_path):
    samples = tuple(Sample(f"s{i}", "a cat", i, "forget") for i in range(2))
    task = SampleSet("mini", 1, {}, samples, ("mini",), steps=3, guidance=4.0)
    for name, guard in (("plain", None), ("guarded", SLD(TEXT, 0, **LOUD))):
        model = generate.load_model(str(toy_sdxl_dir), device="cpu", guard=guard)
        generate.generate(model, task, tmp_path / name, quiet=True)
    images = [[row["pixels"] for row in arm.complete_records(tmp_path / name)] for name in ("plain", "guarded")]
    assert all(one != other for one, other in zip(*images, strict=True))


def test_a_guarded_model_is_attacked_through_the_guard(toy_sdxl_dir, tmp_path):
    """The word is another one than without the guard, and images are generated behind it."""
    few = ["--attack-seeds=1", "--num-images=2", "--budget=2", "--set=batch_size=2", "--set=num_shown=2", "--steps=2"]
    what = ["--concept", "church", "--judge", JUDGES.give(Bright), "--attack", "learnt-word", *few, "--quiet"]
    cli.main(["attack", "--model", str(toy_sdxl_dir), "--guard", "negative", *what, "--output", str(tmp_path)])
    (base,) = (path.parent for path in (tmp_path / "shared").glob("*-attack-learnt-word-*/manifest.json"))
    folder = tmp_path / "base-negative" / "attack-learnt-word"
    words = [attacked.read_finding(one / "found" / "run-0" / "2.json").tensors["word"] for one in (base, folder)]
    assert not torch.equal(*words)
    arms = [sorted((one / "images").iterdir()) for one in (base, folder)]
    assert [p.read_bytes() for p in arms[0]] != [p.read_bytes() for p in arms[1]]
