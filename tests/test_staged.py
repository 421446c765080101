"""Images on a GPU: the denoising loop waits for nothing, and the next images' inputs are there before these are read.

On a pretended GPU, which sees every wait of the host.
"""

from pathlib import Path
from typing import Any

import diffusers
import pretend_device
import pytest
import torch
from loaded import load_sd
from test_generate import make_task
from toy_training import gathered, made

from erase import guards
from erase.evaluation import generate
from erase.families import loading, start
from erase.families.pipelined import PipelineFamily

HOW: dict[str, Any] = {"guidance": 2.0, "size": 8}
PNDM = {"skip_prk_steps": True}  # as Stable Diffusion's own


def waits(model: Any, steps: int, **more: Any) -> list[str]:
    with pretend_device.waits() as found:
        model.draw(["a cat", "a dog"], [1, 2], steps=steps, **HOW, **more)
    return found


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "dpm++"])
def test_images_wait_once_whatever_the_number_of_steps(toy_pipeline_dir, monkeypatch, sampler):
    """For the result. Control: with the scheduler's timesteps on the GPU each step waits."""
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device="cuda")
        if sampler != "dpm++":
            scheduler: Any = model.scheduler
            model.scheduler = getattr(diffusers, sampler).from_config(scheduler.config, **PNDM)
        how: dict[str, Any] = {"sampler": "dpm++" if sampler == "dpm++" else "model"}
        assert waits(model, 4, **how) == waits(model, 8, **how) == ["copy to cpu"]
        monkeypatch.setattr("erase.families.pipelined.stepping_on_host", lambda scheduler: torch.no_grad())
        assert len(waits(model, 8, **how)) > (5 if sampler in {"DDIMScheduler", "PNDMScheduler"} else 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_precision_waits_for_timesteps(toy_pipeline_dir, precision):
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device="cuda")
        model.precision = precision
        assert waits(model, 3) == ["copy to cpu"]


@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sd3_dir"])
@pytest.mark.parametrize("guard", guards.PRESETS)
def test_a_guard_waits_in_no_step(request, folder, guard):
    """Nor before the first one. Control: a text that the pipeline encodes."""
    with pretend_device.gpu():
        model: Any = loading.load(request.getfixturevalue(folder), device="cuda")
        model.guard = guards.make(guard, "a cat")
        assert waits(model, 3) == waits(model, 6) == ["copy to cpu"]
        model.guard = Encoding("a cat")
        assert len(waits(model, 3)) > 1


class Encoding(guards.NegativePrompt):
    def on(self, pipeline: Any, c_s: Any = None) -> Any:
        return super().on(pipeline)


@pytest.mark.parametrize("guard", [None, "sld-max"])
@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sd3_dir"])
def test_the_inputs_of_announced_images_are_there_before_the_wait_for_these(request, monkeypatch, folder, guard):
    """And they are copied without a wait: the text states, the guard's too, and the noise."""
    events: list[str] = []
    begin = PipelineFamily._start
    monkeypatch.setattr(
        PipelineFamily, "_start", lambda *given: events.append(f"start {given[1].seeds}") or begin(*given)
    )
    monkeypatch.setattr(pretend_device, "_saw", events.append)
    with pretend_device.gpu(), pretend_device.waits():
        model: Any = loading.load(request.getfixturevalue(folder), device="cuda")
        model.guard = guards.make(guard, "a tree") if guard else None
        events.clear()
        model.announce(["a dog"], [2], **HOW)
        model.draw(["a cat"], [1], steps=2, **HOW)
        assert events == ["start (1,)", "start (2,)", "copy to cpu"]
        events.clear()
        model.draw(["a dog"], [2], steps=2, **HOW)
        assert events == ["copy to cpu"]


def test_inputs_that_were_made_for_another_guard_are_not_used(toy_pipeline_dir):
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device="cuda")
        found = []
        for announced in (True, False):
            model.guard = guards.make("negative", "a boat")
            if announced:
                model.announce(["a dog"], [2], **HOW)
            model.draw(["a cat"], [1], steps=2, **HOW)
            model.guard = guards.make("negative", "a tree")
            found.append(model.draw(["a dog"], [2], steps=2, **HOW))
        assert torch.equal(*found)


def test_what_was_announced_and_is_not_drawn_is_not_used(toy_pipeline_dir):
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device="cuda")
        expected = [model.draw(["a dog"], [seed], steps=2, **HOW) for seed in (1, 2, 3)]
        model.announce(["a cat"], [2], **HOW)
        found = [model.draw(["a dog"], [seed], steps=2, **HOW) for seed in (1, 2, 3)]
    assert all(map(torch.equal, expected, found))


@pytest.fixture
def starts(monkeypatch) -> list[bool]:
    """Of each batch that is drawn: whether its inputs were made while the one before was computed."""
    found: list[bool] = []
    draw = PipelineFamily.draw

    def noting(self: Any, *given: Any, **how: Any) -> Any:
        found.append(self._ready is not None)
        return draw(self, *given, **how)

    monkeypatch.setattr(PipelineFamily, "draw", noting)
    return found


def silent(self: Any, *given: Any, **how: Any) -> None:
    """In place of `announce`."""


def test_training_images_are_staged_ahead_and_the_same_bits(toy_pipeline_dir, tmp_path, monkeypatch, starts):
    found = []
    for name in ("ahead", "plain"):
        with pretend_device.gpu():
            model = load_sd(toy_pipeline_dir, device="cuda")
            found.append(gathered(model, made("salun"), tmp_path / name, batch_size=1).forget.mean)
        if name == "ahead":
            assert starts == [False, True, True, True, False, True, True], "four forget images, three retain images"
            monkeypatch.setattr(PipelineFamily, "announce", silent)
            starts.clear()
    assert not any(starts) and torch.equal(*found) and found[0].std() > 0.1


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_images_for_evaluation_are_staged_ahead_and_the_same_bits(toy_pipeline_dir, tmp_path, monkeypatch, starts):
    """Batches of two sizes and guidances, also where the first folder was interrupted and continues."""
    task = make_task()
    with pretend_device.gpu():
        model = generate.load_model(str(toy_pipeline_dir))
        generate.generate(model, task, tmp_path / "ahead", batch_size=2, quiet=True)
        assert starts == [False, *[True] * (len(starts) - 1)] and len(starts) >= 4
        monkeypatch.setattr(PipelineFamily, "announce", silent)
        generate.generate(model, task, tmp_path / "plain", batch_size=2, quiet=True)
    assert images(tmp_path / "ahead") == images(tmp_path / "plain") and len(images(tmp_path / "plain")) == 7


def test_a_batch_that_does_not_fit_is_halved_and_the_next_one_is_what_it_was(toy_pipeline_dir, tmp_path, monkeypatch):
    task = make_task(4)
    with pretend_device.gpu():
        model = generate.load_model(str(toy_pipeline_dir))
        generate.generate(model, task, tmp_path / "whole", batch_size=1, quiet=True)
        plain = PipelineFamily._drawn

        def drawn(self: Any, begun: start.Start, *given: Any, **how: Any) -> Any:
            if len(begun.noise) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return plain(self, begun, *given, **how)

        monkeypatch.setattr(PipelineFamily, "_drawn", drawn)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        generate.generate(model, task, tmp_path / "halved", batch_size=2, quiet=True)
    assert images(tmp_path / "whole") == images(tmp_path / "halved")


def test_on_a_cpu_nothing_is_made_ahead(toy_pipeline_dir):
    """It would only take memory."""
    model = load_sd(toy_pipeline_dir)
    model.announce(["a dog"], [2], **HOW)
    model.draw(["a cat"], [1], steps=2, **HOW)
    assert model._ready is None


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("folder", ["toy_pipeline_dir", "toy_sdxl_dir"])
def test_the_latents_are_those_of_the_stock_pipeline(request, folder, guidance):
    """Bit for bit: noise of the same generators, text states of the same batch."""
    model: Any = loading.load(request.getfixturevalue(folder))
    side = model.resolution
    pipeline = model.assembled(model.unet, model.sampler())
    pipeline.set_progress_bar_config(disable=True)
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    stock = pipeline(["a cat", "a dog"], generator=draws, output_type="latent", return_dict=False, **how)[0]
    assert torch.equal(model.draw(["a cat", "a dog"], [1, 2], steps=3, guidance=guidance, size=side), stock)


@pytest.mark.parametrize("folder", ["toy_sdxl_dir", "toy_sd3_dir", "toy_ddpm_dir"])
def test_other_families_wait_in_no_step_either(request, folder):
    """Before the first step SDXL's pipeline copies sizes and SD3's encodes the prompts."""
    with pretend_device.gpu():
        model: Any = loading.load(request.getfixturevalue(folder), device="cuda")
        prompt, found = (model.classes or ("a cat",))[0], []
        for steps in (3, 6):
            with pretend_device.waits() as seen:
                model.draw([prompt], [1], steps=steps, guidance=2.0, size=model.resolution)
            found.append(seen)
    assert found[0] == found[1] and found[0][-1] == "copy to cpu"
