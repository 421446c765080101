"""Laws of progress: a bar on a terminal, lines elsewhere, nothing when quiet; and of what is printed from elsewhere."""

import re
import sys
from typing import Any

import pytest

from erase import commandline, erase_concept, progress
from erase.concepts import Concept
from erase.errors import EraseError, missing, printable


@pytest.fixture
def no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: False, raising=False)


@pytest.fixture
def terminal(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)


def work(**options) -> None:
    with progress.progress(3, "train", "steps", **options) as bar:
        for _ in range(3 - options.get("done", 0)):
            bar.note(loss="0.5")
            bar.update()


def test_without_a_terminal_a_phase_prints_its_start_and_then_lines(capsys, no_terminal):
    """The last of the lines says that nothing is left. (4.6)"""
    work()
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "train: 0 of 3 steps"
    assert len(rest) == 3 and all(
        re.fullmatch(r"train: [123] of 3 steps, \S+ a second, 0 s left, loss 0.5", r) for r in rest
    )


def test_lines_are_a_minute_apart(capsys, no_terminal, monkeypatch):
    """Steps of 20 seconds: a line at the start, at 60 s and at 120 s, each with the rate since the start. (4.6)"""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "LINE_SECONDS", 60.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for _ in progress.each(range(8), "mask", "batches"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "mask: 0 of 8 batches",
        "mask: 3 of 8 batches, 0.05 a second, 100 s left",
        "mask: 6 of 8 batches, 0.05 a second, 40 s left",
    ]


def test_a_continued_phase_starts_where_it_stopped(capsys, no_terminal):
    work(done=2)
    assert capsys.readouterr().err.startswith("train: 2 of 3 steps\ntrain: 3 of 3 steps")


@pytest.mark.parametrize("seconds, text", [(59, "59 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h")])
def test_the_time_left_has_a_unit_that_can_be_read(seconds, text):
    assert progress._duration(seconds) == text


def test_with_a_terminal_there_is_a_bar(capsys, terminal):
    work()
    err = capsys.readouterr().err
    assert "\r" in err and "100%" in err and "loss=0.5" in err


@pytest.mark.parametrize("options", [{"quiet": True}, {"done": 3}])
def test_quiet_work_and_finished_work_print_nothing(options, capsys, no_terminal):
    work(**options)
    assert capsys.readouterr() == ("", "")


def test_only_the_bars_of_loading_are_hidden():
    """The libraries' switches are as before afterwards, also after an error. (4.6)"""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.enable_progress_bar()
    with pytest.raises(ZeroDivisionError), progress.loading():
        assert not of_diffusers.is_progress_bar_enabled() and not of_transformers.is_progress_bar_enabled()
        raise ZeroDivisionError
    assert of_diffusers.is_progress_bar_enabled() and of_transformers.is_progress_bar_enabled()


def test_loading_a_model_shows_no_bar(tiny_pipeline_dir, capfd):
    """The control: transformers shows one by itself. (4.6)"""
    from transformers import CLIPTextModel

    from erase.families import loading

    loading.load(tiny_pipeline_dir)
    assert capfd.readouterr().err == ""
    CLIPTextModel.from_pretrained(tiny_pipeline_dir / "text_encoder")
    assert "Loading weights" in capfd.readouterr().err


def test_writing_a_pipeline_shows_no_bar(toy_pipeline_dir, tmp_path, capfd):
    """A single file becomes a folder in the cache before the work begins. The control: transformers' own bar. (4.6)"""
    from diffusers import StableDiffusionPipeline

    from erase.families import pipeline_folder

    with progress.loading():
        pipeline: Any = StableDiffusionPipeline.from_pretrained(toy_pipeline_dir)
    pipeline_folder.write_pipeline(pipeline, tmp_path / "folder")
    assert capfd.readouterr() == ("", "")
    pipeline.save_pretrained(tmp_path / "other")
    assert "Writing model shards" in capfd.readouterr().err


def test_quiet_hides_downloads(monkeypatch):
    from huggingface_hub import utils

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    commandline.silence_libraries()
    assert not utils.are_progress_bars_disabled()
    try:
        commandline.silence_libraries(quiet=True)
        assert utils.are_progress_bars_disabled()
    finally:
        utils.enable_progress_bars()


def test_the_hint_for_a_missing_package_installs_it():
    assert str(missing("nudenet")) == "nudenet is not installed; pip install nudenet"
    assert str(missing("datasets", "d is read with datasets")) == "d is read with datasets; pip install datasets"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Van Gogh, é 猫 🍼", "Van Gogh, é 猫 🍼"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("abc\u202edef\u200b", r"abc\u202edef\u200b"),
        (3, "3"),
    ],
)
def test_text_from_elsewhere_is_printed_without_control_characters(text, expected):
    assert printable(text) == expected


def test_a_run_reports_its_phases_and_a_quiet_one_prints_nothing(toy_pipeline_dir, tmp_path, capfd, monkeypatch):
    """Through the libraries too: what they print goes past Python's stderr. (4.6)"""
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "cache"))
    concept = Concept("cat", "object", ("a cat",), ("a dog",), ("a tree",))
    options: dict[str, Any] = dict(num_forget=1, num_retain=1, num_inference_steps=1, num_train_steps=1, batch_size=1)
    options |= dict(num_samples=0, save=("delta",), device="cpu")
    erase_concept(concept, str(toy_pipeline_dir), output=str(tmp_path / "loud"), **options)
    phases = [line.partition(":")[0] for line in capfd.readouterr().err.splitlines()]
    assert phases == ["forget images", "retain images", "mask", "train"]
    monkeypatch.setenv("ERASE_CACHE", str(tmp_path / "other cache"))
    erase_concept(concept, str(toy_pipeline_dir), output=str(tmp_path / "quiet"), quiet=True, **options)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named_before_the_first_image(toy_pipeline_dir, tmp_path, capfd, monkeypatch):
    """A long run does not generate its images only to end there, and leaves no folder behind. (4.1, 4.2)"""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    concept = Concept("cat", "object", ("a cat",), ("a dog",), ("a tree",))
    with pytest.raises(EraseError, match="^bitsandbytes is not installed; pip install bitsandbytes$"):
        erase_concept(concept, str(toy_pipeline_dir), output=str(tmp_path / "run"), moments="8bit", device="cpu")
    assert "images" not in capfd.readouterr().err and not (tmp_path / "run").exists()
