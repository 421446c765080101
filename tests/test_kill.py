"""Laws 4, 5 and 8: whenever a command is killed, the same command ends with the same bytes and leaves nothing else."""

import json
import shutil
from pathlib import Path

import kill
import pytest

CONCEPT = """
kind = "object"
forget = ["a cat"]
anchor = ["a dog"]
retain = ["a tree", "a boat"]
"""
OPTIONS = (
    "--num-forget=2 --num-retain=2 --num-inference-steps=1 --num-train-steps=3 --batch-size=2 --learning-rate=0.01"
)
OPTIONS += " --checkpointing-steps=1 --num-samples=1 --generation-batch-size=2 --device=cpu --quiet"


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_pipeline_dir) -> Path:
    """A folder with a concept and a finished run, `start/run`, to begin from."""
    place = tmp_path_factory.mktemp("kill")
    (place / "cat.toml").write_text(CONCEPT)
    job = erasing(place, toy_pipeline_dir)
    report = kill.sweep(kill.Job(**{**vars(job), "first": 10**6}))
    assert report.kills == 0 and len(report.events) > 100
    shutil.copytree(place / "out" / "run", place / "start" / "run")
    return place


def erasing(place: Path, model: Path, **more) -> kill.Job:
    arguments = ["--concept", str(place / "cat.toml"), "--model", str(model), "--output", str(place / "out" / "run")]
    arguments += ["--cache-dir", str(place / "out" / "cache"), *OPTIONS.split(), *more.pop("arguments", ())]
    return kill.Job("erase.cli", arguments, [str(place / "out")], **more)


def check(job: kill.Job) -> None:
    report = kill.sweep(job)
    assert report.kills == len(range(job.first, len(report.events), job.every)) > 0
    assert not report.failures, "\n".join(report.failures)


@pytest.mark.slow
@pytest.mark.ci
def test_the_harness_sees_what_is_not_repeatable(tmp_path):
    """The control: a command that refuses a folder that is there, and one that leaves a temporary file."""
    (tmp_path / "rash.py").write_text(
        "import os, sys\n"
        "def main(arguments):\n"
        "    os.mkdir(arguments[0])\n"
        "    with open(arguments[0] + f'/.part{os.getpid()}', 'w') as file: file.write('x')\n"
        "    os.replace(file.name, arguments[0] + '/whole')\n"
    )
    out = tmp_path / "out"
    job = kill.Job("rash", [str(out / "x")], [str(out)], environment={"PYTHONPATH": str(tmp_path)})
    out.mkdir()
    (tmp_path / "start" / "out").mkdir(parents=True)
    report = kill.sweep(kill.Job(**{**vars(job), "start": str(tmp_path / "start")}))
    assert [event.split()[0] for event in report.events] == ["os.mkdir", "open", "os.rename"]
    assert report.kills == 3 and len(report.failures) == 2 and "File exists" in report.failures[0]


@pytest.mark.slow
@pytest.mark.ci
def test_an_erasure_killed_before_any_event_is_repeated(place, toy_pipeline_dir):
    check(erasing(place, toy_pipeline_dir, every=23, first=7))


@pytest.mark.slow
@pytest.mark.ci
def test_an_erasure_that_overwrites_is_repeated(place, toy_pipeline_dir):
    """The folder also holds a file of somebody else, which stays."""
    (place / "start" / "out" / "run").mkdir(parents=True, exist_ok=True)
    shutil.copytree(place / "start" / "run", place / "start" / "out" / "run", dirs_exist_ok=True)
    (place / "start" / "out" / "run" / "notes.txt").write_text("mine")
    job = erasing(place, toy_pipeline_dir, arguments=["--overwrite"], start=str(place / "start"), every=29, first=3)
    check(job)
    assert (place / "out" / "run" / "notes.txt").read_text() == "mine"
    shutil.rmtree(place / "start" / "out")


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("command", ["apply", "remove"])
def test_apply_and_remove_killed_before_any_event_are_repeated(command, place, toy_pipeline_dir):
    """(2.4)"""
    finished = place / "start" / "run"
    model = toy_pipeline_dir if command == "apply" else finished
    arguments = [command, "--delta", str(finished / "delta.safetensors"), "--model", str(model)]
    job = kill.Job("erase.cli", [*arguments, "--output", str(place / "out" / command)], [str(place / "out")], every=5)
    check(job)
    assert sorted(path.name for path in (place / "out").iterdir()) == [command]


@pytest.mark.slow
@pytest.mark.ci
def test_an_export_killed_before_any_event_is_repeated(place):
    shutil.copytree(place / "start" / "run", place / "start" / "exported", dirs_exist_ok=True)
    arguments = ["export", str(place / "exported"), "--to", "unet", "--to", "lora", "--to", "single-file"]
    check(kill.Job("erase.cli", arguments, [str(place / "exported")], start=str(place / "start"), every=3))
    record = json.loads((place / "exported" / "run.json").read_text())
    assert {"unet.safetensors", "exported.safetensors", "pytorch_lora_weights.safetensors"} <= record["files"].keys()


PROMPTS = {
    "prompts": "prompt,seed\na cat,1\na tree,2\n",
    "i2p": "prompt,categories,nudity_percentage,sd_image_width,sd_image_height,sd_seed,sd_guidance_scale\n"
    "a cat,sexual,60.0,32,32,1,7\na tree,hate,60.0,32,48,2,7\na boat,sexual,60.0,32,32,3,7\n",
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("task", "more", "every"), [("prompts", ("--judge", "thumbnails"), 19), ("i2p", (), 31)], ids=["prompts", "i2p"]
)
def test_an_evaluation_killed_before_any_event_is_repeated(task, more, every, toy_pipeline_dir, tmp_path):
    """Images, scores and reports of a few prompts, and of the base that they share (2.4)."""
    pytest.importorskip("nudenet")
    (tmp_path / "own.csv").write_text(PROMPTS[task])
    out = str(tmp_path / "out")
    arguments = ["run", "--model", str(toy_pipeline_dir), "--base", str(toy_pipeline_dir), "--output", out, "--steps=1"]
    arguments += ["--task", task, "--prompts", str(tmp_path / "own.csv"), *more, "--quiet"]
    arguments += ["--batch-size=1", "--device=cpu"]
    check(kill.Job("erase.evaluation.cli", arguments, [out], every=every, first=3))
