"""Normalized attention guidance against attention processors that do what the paper says, on every architecture."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FluxPipeline,
    ModularPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging
from torch import Tensor

from erase import guards, guiders
from erase.errors import EraseError
from erase.evaluation import arm, generate
from erase.evaluation.attacks.guarded import predict
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.guards import NAG

TEXT, PROMPTS = "a nude person", ["a cat", "a dog"]
STRONG = NAG(TEXT, scale=8.0, tau=1.2, alpha=0.7)  # some norms are cut and some are not
FAMILIES = ["sd", "sdxl", "sd3"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def folders(toy_pipeline_dir, toy_sdxl_dir, toy_sd3_dir) -> dict[str, Any]:
    return {"sd": toy_pipeline_dir, "sdxl": toy_sdxl_dir, "sd3": toy_sd3_dir}


@pytest.fixture(params=FAMILIES)
def pipeline(request, folders) -> Any:
    made: Any = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}
    extra = {"sdxl": {"add_watermarker": False}}.get(request.param, {})
    found = made[request.param].from_pretrained(folders[request.param], **extra)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipeline: Any, **options: Any) -> Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    given = {"height": 8, "width": 8, "guidance_scale": 4.0, "output_type": "latent", "return_dict": False, **options}
    return pipeline(PROMPTS, num_inference_steps=3, generator=seeds, **given)[0]


def plain_guided(nag: NAG, z_p: Tensor, z_s: Tensor) -> Tensor:
    """Token by token."""
    found = torch.empty_like(z_p)
    for row in range(z_p.shape[0]):
        for token in range(z_p.shape[1]):
            g = nag.scale * z_p[row, token] - (nag.scale - 1) * z_s[row, token]
            ratio = g.abs().sum() / z_p[row, token].abs().sum()
            g = g * min(ratio.item(), nag.tau) / ratio
            found[row, token] = nag.alpha * g + (1 - nag.alpha) * z_p[row, token]
    return found


def test_norms_beyond_tau_are_cut_and_smaller_ones_are_not():
    z_p, z_s = torch.randn(2, 3, 50, 4, generator=torch.Generator().manual_seed(0))
    grown = (8 * z_p - 7 * z_s).abs().sum(-1) / z_p.abs().sum(-1)
    nag = NAG("x", 8.0, grown.median().item(), 0.7)
    assert 0 < (grown > nag.tau).float().mean() < 1
    torch.testing.assert_close(nag.guided(z_p, z_s), plain_guided(nag, z_p, z_s))
    torch.testing.assert_close(NAG("x", 1.0).guided(z_p, z_s), z_p)


class Guided:
    """Attention of the conditional rows to the prompt and, once more, to c_S; no row is added to the pass itself."""

    def __init__(self, nag: NAG, text: Tensor, guidance: bool):
        self.nag, self.text, self.guidance = nag, text, guidance

    def heads(self, attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    def mixed(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = F.scaled_dot_product_attention(self.heads(attn, q), self.heads(attn, k), self.heads(attn, v))
        return z.transpose(1, 2).flatten(2)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        num = len(hidden_states)
        start = num // 2 if self.guidance else 0
        text = encoder_hidden_states
        away = self.text.expand(num - start, -1, -1)
        z_p = self.mixed(attn, attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        z_s = self.mixed(attn, attn.to_q(hidden_states[start:]), attn.to_k(away), attn.to_v(away))
        z = torch.cat([z_p[:start], plain_guided(self.nag, z_p[start:], z_s)])
        return attn.to_out[1](attn.to_out[0](z))


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_it_is_what_processors_of_cross_attention_give(folders, family, guidance):
    made: Any = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipeline = made.from_pretrained(folders[family])
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, guidance_scale=guidance)
    with STRONG.on(pipeline):
        guarded = draw(pipeline, guidance_scale=guidance)
    text = pipeline.encode_prompt(TEXT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    own = Guided(STRONG, text, guidance > 1)
    pipeline.unet.set_attn_processor(
        {name: own if ".attn2." in name else old for name, old in pipeline.unet.attn_processors.items()}
    )
    expected = draw(pipeline, guidance_scale=guidance)
    scale = plain.abs().max()
    assert (guarded - expected).abs().max() < 1e-4 * scale < 1e-3 * scale < (guarded - plain).abs().max()


class Joint:
    """The texts of prompt and c_S each go through all blocks; image tokens, of which there is one set, see both."""

    def __init__(self, nag: NAG):
        self.nag = nag
        self.images: list[Tensor] = []

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        n, length = len(hidden_states) // 2, hidden_states.shape[1]
        assert torch.equal(hidden_states[:n], hidden_states[n:])
        image, text = hidden_states, encoder_hidden_states
        parts = zip((attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), strict=True)
        q, k, v = (
            torch.cat([own(image), added(text)], 1).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for own, added in parts
        )
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        one = plain_guided(self.nag, z[:n, :length], z[n:, :length])
        texts = z[:, length:] if attn.context_pre_only else attn.to_add_out(z[:, length:])
        return attn.to_out[0](torch.cat([one, one])), texts


def test_on_stable_diffusion_3_image_tokens_see_two_streams_of_text(folders):
    """A network with its rows doubled, behind processors of joint attention, in the loop of the pipeline."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folders["sd3"])
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, guidance_scale=1.0)
    with STRONG.on(pipeline):
        guarded = draw(pipeline, guidance_scale=1.0)
    how: Any = {"do_classifier_free_guidance": False}
    away = pipeline.encode_prompt(TEXT, None, None, **how)[0]
    states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, **how)
    pipeline.transformer.set_attn_processor(Joint(STRONG))
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(3)
    x = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    for t in scheduler.timesteps:
        with torch.no_grad():
            v = pipeline.transformer(
                hidden_states=x.repeat(2, 1, 1, 1),
                timestep=t.expand(4),
                encoder_hidden_states=torch.cat([states, away.expand(2, -1, -1)]),
                pooled_projections=pooled.repeat(2, 1),
            ).sample[:2]
        x = scheduler.step(v, t, x, return_dict=False)[0]
    scale = plain.abs().max()
    assert (guarded - x).abs().max() < 1e-4 * scale < 1e-3 * scale < (guarded - plain).abs().max()


def test_with_guidance_only_rows_of_the_prompt_are_guarded(pipeline):
    """With a prompt for the unconditional branch that is c_S's, that branch would change if it were guarded."""
    seen = []
    network = guards.network_of(pipeline)
    handle = network.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    plain = draw(pipeline, guidance_scale=4.0)
    free = seen[0]
    seen.clear()
    with STRONG.on(pipeline):
        guarded = draw(pipeline, guidance_scale=4.0)
    handle.remove()
    assert not torch.allclose(plain, guarded, atol=1e-3)
    first = seen[0]
    torch.testing.assert_close(first[:2], free[:2], rtol=1e-4, atol=1e-4)
    assert len(first) == 4 and (first[2:] - free[2:]).abs().max() > 1e-3


def test_scale_1_changes_nothing_and_everything_is_put_back(pipeline):
    network = guards.network_of(pipeline)
    before, plain = dict(vars(network)), draw(pipeline)
    with NAG(TEXT, scale=1.0).on(pipeline):
        assert (draw(pipeline) - plain).abs().max() < 1e-4
    with STRONG.on(pipeline), pytest.raises(ZeroDivisionError):
        draw(pipeline, callback_on_step_end=lambda *_: 1 / 0)
    assert vars(network).keys() == before.keys() and torch.equal(draw(pipeline), plain)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_as_a_guider_it_is_the_classic_pipeline_behind_the_guard(folders, family, guidance):
    made: Any = {"sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}[family]
    classic = made.from_pretrained(folders[family])
    classic.set_progress_bar_config(disable=True)
    plain = draw(classic, guidance_scale=guidance)
    with STRONG.on(classic):
        expected = draw(classic, guidance_scale=guidance)
    modular: Any = ModularPipeline.from_pretrained(str(folders[family]))
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    guider = guiders.make(STRONG, guidance)
    guider.attach(modular)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    how: Any = {"height": 8, "width": 8, "num_inference_steps": 3, "output": "latents"}
    found, scale = modular(prompt=PROMPTS, generator=seeds, **how), plain.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale < 1e-3 * scale < (found - plain).abs().max()
    assert "forward" not in vars(guards.network_of(modular)) and guider.num_conditions == 1 + (guidance > 1)


def test_a_model_without_guidance_is_evaluated_and_attacked_behind_it(folders, tmp_path):
    task = SampleSet("mini", 1, {}, (Sample("s", "a cat", 0, "forget"),), ("mini",), steps=3, guidance=0.0)
    plain = generate.load_model(str(folders["sdxl"]), device="cpu")
    model = generate.load_model(str(folders["sdxl"]), device="cpu", guard=STRONG)
    images = []
    for name, one in (("plain", plain), ("guarded", model)):
        generate.generate(one, task, tmp_path / name, quiet=True)
        images.append([row["pixels"] for row in arm.complete_records(tmp_path / name)])
    assert images[0] != images[1]
    x, t, c = torch.randn(2, 4, 4, 4), torch.tensor([500, 500]), model.encode_text(PROMPTS)
    assert torch.equal(predict(plain, x, t, c), plain(x, t, c))
    assert not torch.allclose(predict(model, x, t, c), plain(x, t, c), atol=1e-4)
    c.text_states.requires_grad_(True)
    predict(model, x, t, c).square().sum().backward()
    assert c.text_states.grad is not None and c.text_states.grad.any()


def test_flux_is_refused_by_name():
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    absent: Any = dict.fromkeys(parts)
    with pytest.raises(EraseError, match="guards know .* 1, 2, XL and 3, not the transformer of this FluxPipeline"):
        STRONG.on(FluxPipeline(**absent)).__enter__()
