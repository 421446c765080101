"""What sides an image may have is asked of the model's family, before the first image, in every command."""

from pathlib import Path
from typing import Any

import pytest

from erase.data import prompt_files
from erase.errors import EraseError
from erase.evaluation import cli, generate
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.families.sd import StableDiffusion
from erase.options.settings import Settings
from erase.runs import job


@pytest.fixture
def no_images(monkeypatch) -> None:
    monkeypatch.setattr(StableDiffusion, "draw", lambda *_, **__: pytest.fail("an image was generated"))


def settings_of(model: Any, height: int | None, width: int | None) -> Any:
    samples = (Sample("a", "a cat", 0, ""), Sample("b", "a red dog", 1, "", height=height, width=width))
    return generate.effective_settings(model, SampleSet("prompts", 1, {}, samples, ()), 2, None)


@pytest.mark.parametrize("scale", [2, 8, 32])
def test_the_sides_are_multiples_of_the_vaes_scale_and_of_eight(toy_pipeline_dir, scale):
    """diffusers' pipelines take multiples of 8, whatever the VAE."""
    model = loading.load(toy_pipeline_dir)
    assert isinstance(model, StableDiffusion)
    model.vae_scale, side = scale, max(8, scale)
    settings_of(model, side, 3 * side)
    generate.effective_settings(
        model, SampleSet("prompts", 1, {}, (Sample("a", "a", 0, "", height=5),), ()), 2, None, side
    )
    for height, width in ((side + 4, side), (side, side + 4), (None, 5)):
        with pytest.raises(EraseError) as error:
            settings_of(model, height, width)
        shown = f"{width} x {height or model.resolution}"
        assert str(error.value) == (
            f"the image of 'a red dog' would be {shown}; the sides that {model.name} generates are multiples of {side}"
        )


@pytest.mark.parametrize("command", ["generate", "run"])
def test_a_prompt_file_with_another_side_is_one_line(toy_pipeline_dir, tmp_path, capsys, no_images, command):
    (tmp_path / "prompts.csv").write_text("prompt,width,height\na cat,8,8\na red dog,500,512\n")
    asked = ["--task", "prompts", "--prompts", str(tmp_path / "prompts.csv"), "--output", str(tmp_path / "out")]
    more = ["--judge", "thumbnails", "--base", str(toy_pipeline_dir)] if command == "run" else []
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--model", str(toy_pipeline_dir), *asked, *more, "--device", "cpu", "--quiet"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "the image of 'a red dog' would be 500 x 512" in line and not (tmp_path / "out").exists()


def test_a_prompt_file_is_read_without_a_model(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,width,height\na cat,500,20\n")
    (row,) = prompt_files.read(tmp_path / "prompts.csv").rows
    assert (row.width, row.height) == (500, 20)


@pytest.mark.parametrize("method", ["salun", "uce"])
def test_another_resolution_of_a_run_is_refused_before_its_folder_is_made(
    toy_pipeline_dir, tmp_path, no_images, method
):
    """A closed form sees no training image: its samples alone have the side."""
    asked: Any = {"forget": ("a cat",), "anchor": ("a dog",), "kind": "object", "device": "cpu", "resolution": 12}
    settings = Settings("cat", str(toy_pipeline_dir), method=method, output=str(tmp_path / "run"), **asked)
    with pytest.raises(EraseError) as error:
        job.run(settings, quiet=True)
    name = str(toy_pipeline_dir)
    assert str(error.value) == f"--resolution is 12; the sides that {name} generates are multiples of 8"
    assert not Path(str(settings.output)).exists()
