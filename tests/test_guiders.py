"""Guards as guiders of modular pipelines, against the classic pipeline (XL) and an obvious loop (SD 3)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FluxModularPipeline,
    ModularPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from torch import Tensor

from erase import guards, guiders
from erase.errors import EraseError
from erase.guards import SLD, NegativePrompt
from erase.guiders import NegativePromptGuider, SLDGuider

TEXT, PROMPTS, SCALE = "a nude person", ("a cat", "a dog"), 4.0
LOUD = {"guidance": 3.0, "threshold": 0.3, "momentum_scale": 0.4, "momentum_beta": 0.6}  # every branch has its cases
GUARDS = [SLD(TEXT, 1, **LOUD), NegativePrompt(TEXT)]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """diffusers reports components that a folder does not have, and that guiders are experimental."""
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def opened(toy_sdxl_dir, toy_sd3_dir) -> Callable[[str], Any]:
    def opened(family: str) -> Any:
        pipeline: Any = ModularPipeline.from_pretrained(str({"sdxl": toy_sdxl_dir, "sd3": toy_sd3_dir}[family]))
        pipeline.load_components()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return opened


def draw(pipeline: Any, prompts: tuple[str, ...] = PROMPTS, **options: Any) -> Tensor:
    """Latents of 4 steps with the pipeline's guider."""
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"height": 8, "width": 8, "num_inference_steps": 4, "output": "latents", **options}
    return pipeline(prompt=list(prompts), generator=seeds, **given)


def plain(pipeline: Any, **options: Any) -> Tensor:
    """With the guidance of diffusers; Stable Diffusion 3 needs a negative prompt for it."""
    before = pipeline.guider
    pipeline.update_components(guider=ClassifierFreeGuidance(SCALE))
    try:
        return draw(pipeline, **{"negative_prompt": "", **options})
    finally:
        pipeline.update_components(guider=before)


def attach(pipeline: Any, guard: guards.Guard) -> Any:
    guider = guiders.make(guard, SCALE)
    guider.attach(pipeline)
    assert pipeline.guider is guider
    return guider


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guard", GUARDS, ids=["sld", "negative"])
def test_on_sdxl_a_guider_is_the_classic_pipeline_behind_the_guard(toy_sdxl_dir, opened, guard, prediction):
    """Rounding alone differs: three forwards of n rows against one of 3 n."""
    classic: Any = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_dir, add_watermarker=False)
    classic.set_progress_bar_config(disable=True)
    pipeline = opened("sdxl")
    scheduler = type(classic.scheduler).from_config(classic.scheduler.config, prediction_type=prediction)
    classic.scheduler = scheduler
    pipeline.update_components(scheduler=type(scheduler).from_config(scheduler.config))
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    given: Any = {"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "latent", "return_dict": False}
    with guard.on(classic):
        expected = classic(list(PROMPTS), height=8, width=8, generator=seeds, **given)[0]
    attach(pipeline, guard)
    scale = expected.abs().max()
    assert (draw(pipeline) - expected).abs().max() < 1e-5 * scale
    unguarded = plain(pipeline, negative_prompt=None)
    assert (unguarded - expected).abs().max() > 1e-4 * scale


@torch.no_grad()
def by_hand(classic: Any, sld: SLD, prompt: str, seed: int) -> Tensor:
    """SLD on a rectified flow: a difference of two velocities is (1 - s) of it in noise, and none at s = 1."""

    def encode(text: str) -> dict[str, Tensor]:
        states, _, pooled, _ = classic.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    c_p, c_s, c_0 = (encode(text) for text in (prompt, sld.text, ""))
    scheduler = type(classic.scheduler).from_config(classic.scheduler.config)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    nu = torch.zeros_like(x)
    for i, t in enumerate(scheduler.timesteps):
        p, s, o = (classic.transformer(hidden_states=x, timestep=t.expand(1), **c).sample for c in (c_p, c_s, c_0))
        unit = 1 - float(scheduler.sigmas[i])
        gamma, nu = sld.away(unit * o, unit * p, unit * s, nu)
        v = o + SCALE * (p - o - (gamma / unit if i >= sld.warmup and unit else 0))
        x = scheduler.step(v, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("warmup", [0, 2])
def test_on_sd3_sld_is_the_obvious_loop_in_units_of_noise(toy_sd3_dir, opened, warmup):
    """Without a negative prompt diffusers gives both branches the prompt; the guider has the empty text itself."""
    classic: Any = StableDiffusion3Pipeline.from_pretrained(toy_sd3_dir)
    pipeline, sld = opened("sd3"), SLD(TEXT, warmup, **LOUD)
    expected = torch.cat([by_hand(classic, sld, prompt, seed) for seed, prompt in enumerate(PROMPTS)])
    attach(pipeline, sld)
    found, scale = draw(pipeline), expected.abs().max()
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    given: Any = {"num_inference_steps": 4, "guidance_scale": SCALE, "output_type": "latent", "return_dict": False}
    with sld.on(classic):
        in_classic = classic(list(PROMPTS), height=8, width=8, generator=seeds, **given)[0]
    assert (in_classic - expected).abs().max() < 1e-4 * scale
    assert (found - expected).abs().max() < 1e-4 * scale
    assert (found - draw(pipeline, negative_prompt="")).abs().max() < 1e-4 * scale
    assert (plain(pipeline) - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_sld_that_moves_nothing_is_the_guidance_of_diffusers(opened, family):
    """No difference is below the threshold, so mu and gamma are 0; s_S below 1 saves the third forward too."""
    pipeline = opened(family)
    expected = plain(pipeline)
    pipeline.update_components(guider=ClassifierFreeGuidance(1.0))  # a guider that has no use for the empty text
    for options in ({"threshold": -math.inf}, {"guidance": 0.0}):
        attach(pipeline, SLD(TEXT, 0, **{**LOUD, **options}))
        assert pipeline.guider.num_conditions == (2 if "guidance" in options else 3)
        assert torch.equal(draw(pipeline, negative_prompt=""), expected)
    attach(pipeline, SLD(TEXT, 0, **LOUD))
    assert not torch.allclose(draw(pipeline, negative_prompt=""), expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_negative_prompt_is_the_pipelines_own(opened, family):
    """Bit for bit with one image; a batch of two texts encodes with other rounding than one text."""
    pipeline = opened(family)
    for prompts, tolerance in ((PROMPTS[:1], 0.0), (PROMPTS, 1e-4)):
        expected = plain(pipeline, prompts=prompts, negative_prompt=[TEXT] * len(prompts))
        attach(pipeline, NegativePrompt(TEXT))
        for own in (None, "a boat"):
            given = None if own is None else [own] * len(prompts)
            assert (draw(pipeline, prompts, negative_prompt=given) - expected).abs().max() <= tolerance
        assert (plain(pipeline, prompts=prompts) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_momentum_begins_anew_with_every_image(opened, family):
    pipeline = opened(family)
    guider = attach(pipeline, SLD(TEXT, 0, **LOUD))
    first = draw(pipeline)
    assert guider.nu.any() and torch.equal(draw(pipeline), first)
    guider.set_state = lambda step, **more: type(guider).set_state(guider, step + 1, **more)
    assert not torch.allclose(draw(pipeline), first)  # control: without a first step the momentum stays


@pytest.mark.parametrize("guard", GUARDS, ids=["sld", "negative"])
def test_a_saved_guider_keeps_its_settings_and_is_attached_again(opened, guard, tmp_path):
    pipeline = opened("sdxl")
    guider = attach(pipeline, guard)
    expected = draw(pipeline)
    guider.save_pretrained(tmp_path)
    for again in (type(guider).from_pretrained(tmp_path), guider.new()):
        assert again.guard == guard and again.guidance_scale == SCALE
        pipeline.update_components(guider=again)
        with pytest.raises(EraseError, match=r"has no encoded text; use guider.attach\(pipeline\)"):
            draw(pipeline)
        again.attach(pipeline)
        assert torch.equal(draw(pipeline), expected)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("guard", GUARDS, ids=["sld", "negative"])
def test_a_guider_cannot_be_switched_off_silently(opened, guard, family):
    """Pipelines switch guidance off for UNets of latent consistency models."""
    pipeline = opened(family)
    with pytest.raises(EraseError, match="a guard cannot be disabled; give the pipeline another guider"):
        attach(pipeline, guard).disable()
    if family == "sdxl":
        pipeline.unet.register_to_config(time_cond_proj_dim=8)
        with pytest.raises(EraseError, match="cannot be disabled.* a latent consistency model, which has no guidance"):
            draw(pipeline)


def test_a_guard_needs_guidance_and_a_text_that_is_not_refused():
    for guard in GUARDS:
        with pytest.raises(EraseError, match="a guard needs guidance_scale above 1, not 1"):
            guiders.make(guard, 1)
    for made in (SLDGuider, NegativePromptGuider):
        with pytest.raises(EraseError, match=r"minors in a sexual context \('girl' in the guard's text\)"):
            made(text="nude g1rl")
        with pytest.raises(EraseError, match="needs a text to steer away from"):
            made(text=" ")


def test_too_few_steps_for_the_warm_up_are_refused(opened):
    pipeline = opened("sdxl")
    attach(pipeline, guards.make("sld-strong", TEXT))
    with pytest.raises(EraseError, match="sld-strong acts after its first 7 network passes, and 4 are made"):
        draw(pipeline)
    assert draw(pipeline, num_inference_steps=8).isfinite().all()


def test_other_pipelines_are_refused_by_name(toy_sdxl_dir):
    guider = guiders.make(NegativePrompt(TEXT))
    with pytest.raises(EraseError, match="FluxModularPipeline has no guider; guards know the modular pipelines of"):
        guider.attach(FluxModularPipeline())
    with pytest.raises(
        EraseError, match=r"StableDiffusionXLPipeline is not a modular pipeline; use guard.on\(pipeline\)"
    ):
        guider.attach(StableDiffusionXLPipeline.from_pretrained(toy_sdxl_dir, add_watermarker=False))
    with pytest.raises(EraseError, match=r"has no text encoder; call pipeline.load_components\(\) first"):
        guider.attach(ModularPipeline.from_pretrained(str(toy_sdxl_dir)))
