"""A guard that would change no image is refused in one line before anything is generated, in every command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from erase import guards
from erase.errors import EraseError
from erase.evaluation import cli, generate
from erase.evaluation.attacks.completion import Completion
from erase.evaluation.attacks.noise import Noise
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.guards import SLD, NegativePrompt

IDLE = "sld-medium acts after its first 10 network passes, and 10 are made for an image"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions.csv").write_text("prompt\na tree\n")
    return tmp_path / "captions.csv"


def commands(model: Path, captions: Path, output: Path) -> dict[str, list[str]]:
    shared = ["--model", str(model), "--guard-text", "church", "--output", str(output), "--device", "cpu", "--quiet"]
    asked = ["--task", "prompts", "--prompts", str(captions)]
    return {
        "generate": ["generate", *shared, *asked],
        "run": ["run", *shared, *asked, "--judge", "thumbnails"],
        "attack": ["attack", *shared, "--concept", "church", "--judge", "nudenet", "--attack", "learnt-word"],
    }


@pytest.mark.parametrize("command", ["generate", "run", "attack"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guard", "sld-medium", "--steps", "10"], IDLE),
        (["--guard", "sld-weak", "--steps", "3"], "sld-weak acts after its first 15 network passes, and 3 are made"),
        (["--guard", "negative", "--guidance", "1"], "a guard needs guidance above 1, and --guidance-scale is 1"),
    ],
)
def test_an_idle_guard_is_one_line_and_leaves_nothing(
    toy_pipeline_dir, captions, tmp_path, capsys, command, options, message
):
    if command == "attack":
        pytest.importorskip("nudenet")
    given = [*commands(toy_pipeline_dir, captions, tmp_path / "out")[command], *options]
    with pytest.raises(SystemExit, match="2"):
        cli.main(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_one_step_after_the_warm_up_is_enough(toy_pipeline_dir, captions, tmp_path):
    given = commands(toy_pipeline_dir, captions, tmp_path / "out")["generate"]
    cli.main([*given, "--guard", "sld-medium", "--steps", "11"])
    assert list((tmp_path / "out" / "images").iterdir())


def settings_of(model: Any, *scales: float | None) -> Any:
    samples = tuple(Sample(str(i), "a cat", i, "", guidance=scale) for i, scale in enumerate(scales or (None,)))
    return generate.effective_settings(model, SampleSet("prompts", 1, {}, samples, ()), 10, None)


@pytest.mark.parametrize(
    ("scheduler", "passes"), [(DDIMScheduler, 10), (PNDMScheduler, 11), (HeunDiscreteScheduler, 19)]
)
def test_what_counts_is_how_often_the_sampler_asks_the_network(toy_pipeline_dir, scheduler, passes):
    """PNDM's ten steps are eleven network passes, Heun's nineteen."""
    model: Any = loading.load(toy_pipeline_dir)
    how = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    model.scheduler = scheduler.from_config(model.scheduler.config, **how)
    model.guard = SLD("church", passes - 1)
    settings_of(model)
    model.guard = SLD("church", passes)
    with pytest.raises(EraseError, match=f"first {passes} network passes, and {passes} are made for an image; take"):
        settings_of(model)


def test_the_guidance_of_the_model_and_of_each_sample_counts(toy_pipeline_dir):
    """A distilled model's own guidance may be 0, and a prompt file may say 1 for one prompt."""
    model: Any = loading.load(toy_pipeline_dir)
    model.guard = NegativePrompt("church")
    settings_of(model, None, 1.5)
    with pytest.raises(EraseError, match="needs guidance above 1, and that of an image is 1;"):
        settings_of(model, None, 1.0)
    model.defaults = {**model.defaults, "guidance_scale": 0.0}
    with pytest.raises(EraseError, match="needs guidance above 1, and that of an image is 0;"):
        settings_of(model, None, 7.5)
    settings_of(model, 7.5)
    model.guard = None
    settings_of(model)


def test_a_scale_of_the_guard_below_one_is_idle():
    with pytest.raises(EraseError, match=r"SLD's guidance is 0.5, and below 1 it guards nothing"):
        guards.require_acting(SLD("church", 0, 0.5), 50)
    guards.require_acting(SLD("church", 0, 1.0), 1)


def test_attacks_that_leave_out_steps_leave_fewer_to_the_guard(toy_pipeline_dir, tmp_path, capsys):
    """The warm-up counts from the first step that the attacked model takes."""
    assert Noise(percents=(30, 50)).fewest_steps(20) == 6 and Noise(percents=(1,)).fewest_steps(20) == 1
    assert Completion(percents=(0, 20)).fewest_steps(20) == 16
    pytest.importorskip("nudenet")
    given = commands(toy_pipeline_dir, tmp_path, tmp_path / "out")["attack"]
    given[given.index("learnt-word")] = "noise"
    with pytest.raises(SystemExit, match="2"):
        cli.main([*given, "--guard", "sld-strong", "--steps", "20"])
    assert "first 7 network passes, and 6 are made for an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_fewest_steps_of_noise_are_those_that_are_taken(toy_pipeline_dir):
    model: Any = loading.load(toy_pipeline_dir)
    times = model.times(20)
    for percent in (1, 30, 100):
        assert len(times) - Noise(percents=(percent,)).start(20, percent) == Noise(percents=(percent,)).fewest_steps(20)
