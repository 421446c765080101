"""The size of evaluated images: the model's, the samples', or one for all; on Stable Diffusion XL."""

from pathlib import Path
from typing import Any

import pytest
from bright import Bright
from PIL import Image

from erase.errors import EraseError
from erase.evaluation import arm, cli, generate, score
from erase.evaluation.judges.mini import MiniJudge
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.families import loading
from erase.options.settings import Settings

SAMPLES = (Sample("a", "a cat", 0, "forget"), Sample("b", "a dog", 1, "forget", height=16, width=24))
TASK = SampleSet("mini", 1, {}, SAMPLES, ("mini",), steps=2, guidance=3.0)


def sizes(folder: Path) -> list[tuple[int, int]]:
    found = []
    for row in arm.complete_records(folder):
        with Image.open(folder / row["file"]) as image:
            found.append(image.size)
    return found


@pytest.fixture(scope="module")
def model(toy_sdxl_dir) -> Any:
    return loading.load(toy_sdxl_dir)


def test_images_have_the_models_size_or_the_samples_or_the_one_that_is_asked_for(model, tmp_path):
    generate.generate(model, TASK, tmp_path / "own", quiet=True)
    generate.generate(model, TASK, tmp_path / "given", resolution=32, quiet=True)
    assert sizes(tmp_path / "own") == [(8, 8), (24, 16)] and sizes(tmp_path / "given") == [(32, 32)] * 2
    with pytest.raises(EraseError, match="holds other images .*size"):
        generate.generate(model, TASK, tmp_path / "own", resolution=32, quiet=True)


def test_settings_without_a_size_are_those_of_earlier_versions(model):
    """An added entry would be another identity, and finished folders would be refused."""
    assert "size_of_samples" not in generate.effective_settings(model, TASK, None, None)
    given = generate.effective_settings(model, TASK, None, None, 8)
    assert (given["size"], given["size_of_samples"]) == (8, "ignored")


def test_a_size_that_the_vae_cannot_make_is_refused(model):
    with pytest.raises(EraseError, match="--resolution is 9; the sides that .* generates are multiples of 8"):
        generate.effective_settings(model, TASK, None, None, 9)


def test_a_judge_of_one_size_is_asked_about_the_size_that_images_will_have(model):
    for resolution, is_fit in ((None, False), (MiniJudge.size, True)):
        settings = generate.effective_settings(model, TASK, None, None, resolution)
        every = [generate.size_of(sample, settings) for sample in SAMPLES]
        if is_fit:
            score.check_size(MiniJudge, every)  # pyright: ignore[reportArgumentType]
        else:
            with pytest.raises(EraseError, match="but the images will have 8 x 8"):
                score.check_size(MiniJudge, every)  # pyright: ignore[reportArgumentType]


def test_an_evaluation_generates_and_judges_at_the_size_of_the_command(toy_sdxl_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Bright, "score", lambda self, images, prompts: [
        seen.append(image.shape) or {"shows": True} for image in images
    ])  # fmt: skip
    (tmp_path / "prompts.csv").write_text("prompt,width,height\na cat,16,24\na dog,,\n")
    task = ["--task", "prompts", "--prompts", str(tmp_path / "prompts.csv"), "--judge", JUDGES.give(Bright)]
    for more, expected in (([], {(24, 16, 3), (8, 8, 3)}), (["--size", "32"], {(32, 32, 3)})):
        seen.clear()
        output = ["--output", str(tmp_path / "-".join(["out", *more])), "--steps", "2", "--quiet"]
        cli.main(["run", "--model", str(toy_sdxl_dir), "--base", str(toy_sdxl_dir), *task, *output, *more])
        assert set(seen) == expected


def test_both_commands_call_it_resolution_and_size():
    assert Settings.__dataclass_fields__["resolution"].metadata["aliases"] == ("--size",)
