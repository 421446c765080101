"""Guards against an obvious loop and the pipeline's own negative prompt; what they touch is put back as found."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from diffusers import StableDiffusionPipeline as Pipeline
from torch import Tensor

from erase import guards
from erase.errors import EraseError
from erase.evaluation import arm, cli, generate
from erase.evaluation.options import GUARDS
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.guards import SLD, NegativePrompt

TEXT = "a nude person"
LOUD = {"guidance": 3.0, "threshold": 0.3, "momentum_scale": 0.4, "momentum_beta": 0.6}  # every branch has its cases


@pytest.fixture(scope="module")
def pipeline(toy_pipeline_dir) -> Any:
    made: Any = Pipeline.from_pretrained(toy_pipeline_dir, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompts: tuple[str, ...] = ("a cat", "a dog"), *, steps: int = 5, **options: Any) -> Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"height": 8, "width": 8, "guidance_scale": 4.0, "output_type": "latent", "return_dict": False, **options}
    return pipeline(list(prompts), num_inference_steps=steps, generator=seeds, **given)[0]


@torch.no_grad()
def by_hand(pipeline: Any, sld: SLD, prompts: tuple[str, ...], steps: int, scale: float = 4.0) -> Tensor:
    """The paper's loop, one image and one forward at a time, in plain numbers and with nothing shared."""
    found = []
    for number, prompt in enumerate(prompts):
        c_p, c_s, c_0 = (pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (prompt, sld.text, ""))
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(number)) * scheduler.init_noise_sigma
        nu = torch.zeros_like(x)
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            p, s, o = (pipeline.unet(seen, t, encoder_hidden_states=c).sample for c in (c_p, c_s, c_0))
            unit = 1.0
            if scheduler.config.prediction_type == "v_prediction":
                unit = float(scheduler.alphas_cumprod[int(t)]) ** 0.5
            gamma = torch.zeros_like(x)
            for place in range(x.numel()):
                d = unit * float(p.flatten()[place] - s.flatten()[place])
                mu = min(1.0, sld.guidance * abs(d)) if d < sld.threshold else 0.0
                away = unit * float(s.flatten()[place] - o.flatten()[place])
                gamma.view(-1)[place] = mu * away + sld.momentum_scale * nu.flatten()[place]
            nu = sld.momentum_beta * nu + (1 - sld.momentum_beta) * gamma
            eps = o + scale * (p - o - (gamma / unit if i >= sld.warmup else 0))
            x = scheduler.step(eps, t, x, return_dict=False)[0]
        found.append(x)
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' Euler scheduler under numpy 2
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sld_is_the_obvious_loop(pipeline, warmup, scheduler, prediction):
    """Rounding alone differs: a batch of six against single forwards."""
    usual = pipeline.scheduler
    try:
        pipeline.scheduler = scheduler.from_config(usual.config, prediction_type=prediction)
        sld = SLD(TEXT, warmup, **LOUD)
        prompts = ("a cat", "a dog")
        expected = by_hand(pipeline, sld, prompts, 5)
        plain = draw(pipeline, prompts)
        with sld.on(pipeline):
            guarded = draw(pipeline, prompts)
    finally:
        pipeline.scheduler = usual
    scale = plain.abs().max()
    assert (guarded - expected).abs().max() < 1e-4 * scale < 3e-4 * scale < (guarded - plain).abs().max()


def test_where_noise_is_all_there_is_nothing_to_steer(pipeline):
    """With zero terminal SNR alpha is 0 at the first step: differences of v are none in noise, and none is divided."""
    usual, options = pipeline.scheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        config = {**usual.config, "prediction_type": "v_prediction", **options}
        scheduler: Any = DDIMScheduler.from_config(config)
        assert scheduler.alphas_cumprod[-1] == 0
        pipeline.scheduler = scheduler
        plain, one = draw(pipeline), draw(pipeline, steps=1)
        with SLD(TEXT, 0, **LOUD).on(pipeline):
            assert torch.allclose(draw(pipeline, steps=1), one, atol=1e-5)
            guarded = draw(pipeline)
        assert guarded.isfinite().all() and not torch.allclose(guarded, plain)
    finally:
        pipeline.scheduler = usual


def test_the_presets_are_the_authors():
    told = {name: (s.warmup, s.guidance, s.threshold, s.momentum_scale, s.momentum_beta)
            for name, make in guards.PRESETS.items() if isinstance(s := make("x"), SLD)}  # fmt: skip
    assert told == {
        "sld-weak": (15, 20, 0, 0, 0),
        "sld-medium": (10, 1000, 0.01, 0.3, 0.4),
        "sld-strong": (7, 2000, 0.025, 0.5, 0.7),
        "sld-max": (0, 5000, 1.0, 0.5, 0.7),
    }
    assert guards.PRESETS.keys() == set(GUARDS)


@pytest.mark.parametrize("options", [{"guidance": 0.99}, {"guidance": 0.0}, {"warmup": 99, **LOUD}])
def test_a_guard_that_guards_nothing_changes_no_pixel(pipeline, options):
    """With s_S below 1 the UNet is not even asked; a warm-up that never ends costs another batch size's rounding."""
    plain = draw(pipeline, output_type="np")
    with SLD(TEXT, **options).on(pipeline):
        guarded = draw(pipeline, output_type="np")
    assert abs(guarded - plain).max() < (1e-12 if options["guidance"] < 1 else 1e-5)
    with SLD(TEXT, 0, **LOUD).on(pipeline):
        assert abs(draw(pipeline, output_type="np") - plain).max() > 1e-3


def test_momentum_begins_anew_with_every_image(pipeline):
    with SLD(TEXT, 0, **LOUD).on(pipeline):
        first = draw(pipeline)
        second = draw(pipeline)
        with pytest.raises(ZeroDivisionError):  # a run that is cut short leaves nothing behind either
            draw(pipeline, callback_on_step_end=lambda *_: 1 / 0)
        third = draw(pipeline)
        single = draw(pipeline, steps=1), draw(pipeline, steps=1)
    assert torch.equal(first, second) and torch.equal(first, third) and torch.equal(*single)


def test_one_forward_a_step_of_three_rows_an_image(pipeline, monkeypatch):
    rows = []
    forward = pipeline.unet.forward

    def counting(sample: Tensor, *rest: Any, **more: Any) -> Any:
        rows.append(len(sample))
        return forward(sample, *rest, **more)

    monkeypatch.setattr(pipeline.unet, "forward", counting)
    with SLD(TEXT, 0, **LOUD).on(pipeline):
        draw(pipeline, steps=4)
    assert rows == [6] * 4


def test_the_negative_prompt_is_the_pipelines_own(pipeline):
    expected = draw(pipeline, negative_prompt=[TEXT] * 2)
    with NegativePrompt(TEXT).on(pipeline):
        guarded = draw(pipeline)
        replaced = draw(pipeline, negative_prompt=["a boat"] * 2)
    assert torch.equal(guarded, expected) and torch.equal(replaced, expected)
    assert not torch.allclose(draw(pipeline), expected)


@pytest.mark.parametrize("name", guards.PRESETS)
def test_everything_is_put_back_as_it_was_found(pipeline, name):
    """A hook that had put its own forward on the instance keeps it; after an error too."""
    plain, own = draw(pipeline), dict(vars(pipeline.unet))
    for hooked in (False, True):
        if hooked:
            pipeline.unet.forward = own["forward"] = pipeline.unet.forward
        try:
            with pytest.raises(ZeroDivisionError), guards.make(name, TEXT).on(pipeline):
                assert vars(pipeline.unet).get("forward") is not own.get("forward")
                assert "check_inputs" in vars(pipeline)
                raise ZeroDivisionError
            assert vars(pipeline.unet).get("forward") is own.get("forward")
            assert "check_inputs" not in vars(pipeline)
            assert torch.equal(draw(pipeline), plain)
        finally:
            vars(pipeline.unet).pop("forward", None)


def test_it_works_with_another_pipeline_of_diffusers(pipeline):
    other: Any = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 8, 8)

    def change() -> Tensor:
        draws = torch.Generator().manual_seed(0)
        given: Any = {"output_type": "latent", "return_dict": False}
        return other("a cat", image, 0.8, num_inference_steps=5, guidance_scale=4.0, generator=draws, **given)[0]

    plain = change()
    with SLD(TEXT, 0, **LOUD).on(other):
        assert not torch.allclose(change(), plain)
    assert torch.equal(change(), plain)


def test_no_guidance_no_guard(pipeline):
    for name in (name for name in guards.PRESETS if name != "nag"):
        with (
            guards.make(name, TEXT).on(pipeline),
            pytest.raises(EraseError, match="a guard needs guidance_scale above 1"),
        ):
            draw(pipeline, guidance_scale=1.0)


def test_a_wrong_name_or_an_empty_text_is_one_clear_line():
    with pytest.raises(EraseError, match=r"unknown guard 'sld-stron'; did you mean sld-strong\? \(sld-weak"):
        guards.make("sld-stron", TEXT)
    with pytest.raises(EraseError, match="needs a text to steer away from"):
        guards.make("negative", " ")


# --- evaluated ------------------------------------------------------------------------------------------------------


def test_a_guards_text_is_checked_as_a_prompt_is():
    """The text goes through the text encoder as any prompt does (2.11)."""
    with pytest.raises(EraseError, match=r"minors in a sexual context \('girl' in the guard's text\)"):
        guards.make("negative", "nude g1rl")
    assert guards.make("negative", "nudity, nude, naked").text


def test_a_guarded_model_draws_other_images_and_is_another_model(toy_pipeline_dir, tmp_path):
    samples = tuple(Sample(f"s{i}", "a cat", i, "forget") for i in range(2))
    task = SampleSet("mini", 1, {}, samples, ("mini",), steps=3, guidance=4.0)
    plain = generate.load_model(str(toy_pipeline_dir), device="cpu")
    guarded = generate.load_model(str(toy_pipeline_dir), device="cpu", guard=SLD(TEXT, 0, **LOUD))
    for name, model in (("plain", plain), ("guarded", guarded)):
        generate.generate(model, task, tmp_path / name, quiet=True)
    images = [[r["pixels"] for r in arm.complete_records(tmp_path / n)] for n in ("plain", "guarded")]
    assert images[0] != images[1]
    hashes = [arm.manifest(tmp_path / n)["model"] for n in ("plain", "guarded")]
    assert hashes[1] == {**hashes[0], "guard": repr(guarded.guard)} and TEXT in hashes[1]["guard"]
    assert arm.manifest(tmp_path / "plain")["generation"] == arm.manifest(tmp_path / "guarded")["generation"]
    with pytest.raises(EraseError, match="holds other images .*model.guard"):
        generate.generate(guarded, task, tmp_path / "plain", quiet=True)


def test_a_guarded_embedded_model_is_reported_beside_itself(tmp_path, monkeypatch, capsys):
    """The guard's text is the concept with its synonyms."""
    monkeypatch.chdir(tmp_path)
    small = ["--num-images", "1", "--limit", "4", "--steps", "2", "--quiet", "--device", "cpu"]
    command = ["run", "--model", "mini", "--concept", "circle", "--task", "mini", "--guard", "negative", *small]
    cli.main(command)
    folder = tmp_path / "runs" / "evaluation" / "mini-negative" / "mini"
    assert arm.manifest(folder)["model"]["guard"] == "NegativePrompt(text='circle, disc')"
    (base,) = (tmp_path / "runs" / "evaluation" / "shared").glob("mini-mini-*/manifest.json")
    assert "guard" not in arm.manifest(base.parent)["model"]
    assert "report.html: written" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "run", "attack"])
def test_free_text_that_the_embedded_model_does_not_know_is_one_line(tmp_path, capsys, command):
    what = ["--attack", "learnt-word"] if command == "attack" else ["--task", "mini"]
    given = [*what, "--concept", "red bicycle", "--output", str(tmp_path / "out"), "--quiet"]
    for kind in ([], ["--kind", "object"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main([command, "--model", "mini", *given, *kind])
        (line,) = capsys.readouterr().err.splitlines()
        assert "the embedded model does not know 'bicycle'" in line and "checked, circle, cross" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guard", "sld-weak"], "give --concept or --guard-text"),
        (["--guard", "slow", "--guard-text", "x"], "--guard is 'slow'; choose sld-weak"),
        (["--guard-text", "x"], "--guard-text goes with --guard"),
    ],
)
def test_a_guard_without_a_target_is_refused(toy_pipeline_dir, tmp_path, capsys, arguments, message):
    (tmp_path / "captions.csv").write_text("prompt\na tree\n")
    task = ["--task", "quality", "--prompts", str(tmp_path / "captions.csv"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "--model", str(toy_pipeline_dir), *task, *arguments])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_models_own_loader_takes_no_guard_by_itself(toy_pipeline_dir):
    assert loading.load(toy_pipeline_dir).guard is None
