"""Images of a task: the same for any batch size, number of processes, interruption or accident."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaded import load_sd
from PIL import Image

from erase import delta
from erase.errors import EraseError
from erase.evaluation import arm, generate, jsonl, measure
from erase.evaluation.tasks.protocol import Sample, SampleSet, seed_of
from erase.families import sd, stored_unet


def make_task(num: int = 7, **options: Any) -> SampleSet:
    """Samples of two sizes and two guidances, with prompts that could never be file names."""
    prompts = ["a church", "", "nan", "Null", "a/b\\c", "\N{SMILING FACE WITH SUNGLASSES} x", "long " * 60]
    samples = [
        Sample(
            f"s{i}",
            prompts[i % len(prompts)],
            seed_of("test", f"s{i}"),
            "forget",
            guidance=2.0 if i % 3 else None,
            height=16 if i % 4 == 3 else None,
        )
        for i in range(num)
    ]
    return SampleSet("mini", 1, options, tuple(samples), ("mini",), steps=2, guidance=3.0)


@pytest.fixture(scope="module")
def model(toy_pipeline_dir) -> sd.StableDiffusion:
    return load_sd(str(toy_pipeline_dir))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {r["id"]: np.asarray(Image.open(folder / r["file"])).astype(int) for r in arm.complete_records(folder)}


def test_the_seed_of_a_sample_never_changes():
    assert seed_of("mini", "forget-0000") == 2095980826
    assert len({seed_of("mini", f"s{i}", j) for i in range(50) for j in range(2)}) == 100


def test_a_record_says_whether_its_prompt_was_cut(model, tmp_path):
    """The toy's text encoder reads 75 letters, and the last prompt has 240 (3.2)."""
    generate.generate(model, make_task(), tmp_path / "arm", quiet=True)
    assert [record["truncated"] for record in arm.complete_records(tmp_path / "arm")] == [False] * 6 + [True]
    assert measure.num_truncated(tmp_path / "arm") == 1
    assert (
        "1 images have prompts that are longer" in measure.limits(make_task().identity(), (), 1, {"erased": {}}, 1)[-1]
    )


def test_images_are_the_same_for_any_batch_size_and_bit_equal_at_one(model, tmp_path):
    task = make_task()
    for name, size in {"a": 3, "b": 3, "c": 1, "d": 7}.items():
        generate.generate(model, task, tmp_path / name, batch_size=size, quiet=True)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    once = pixels(tmp_path / "a")
    for name in "cd":
        for sample, image in pixels(tmp_path / name).items():
            assert np.abs(image - once[sample]).max() <= 1  # rounding of other sums
    assert len({image.tobytes() for image in once.values()}) == len(once)
    assert once["s3"].shape == (16, 8, 3) and once["s0"].shape == (8, 8, 3)


def test_a_part_of_a_task_gives_the_images_of_the_whole(model, tmp_path):
    task = make_task()
    generate.generate(model, task, tmp_path / "whole", batch_size=1, quiet=True)
    part = replace(task, samples=task.samples[2:4])
    generate.generate(model, part, tmp_path / "part", batch_size=1, quiet=True)
    whole = pixels(tmp_path / "whole")
    assert all((whole[name] == image).all() for name, image in pixels(tmp_path / "part").items())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_several_processes_draw_the_union_of_one(model, tmp_path, world):
    task = make_task()
    generate.generate(model, task, tmp_path / "one", batch_size=2, quiet=True)
    for rank in reversed(range(world)):
        generate.generate(model, task, tmp_path / "many", batch_size=2, rank=rank, world=world, quiet=True)
    assert arm.complete_records(tmp_path / "one") == arm.complete_records(tmp_path / "many")
    images = [{k: v for k, v in content(tmp_path / n).items() if k.startswith("images")} for n in ("one", "many")]
    assert images[0] == images[1]


def test_an_arm_with_a_record_that_was_cut_in_half_ends_as_an_undisturbed_one(model, tmp_path):
    """As a process leaves it that is killed while it writes; test_kill.py kills before many events."""
    task = make_task(6)
    generate.generate(model, task, tmp_path / "whole", batch_size=2, quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    path = tmp_path / "torn" / "records-0-of-1.jsonl"
    first, second, *_ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-9])
    for image in sorted((tmp_path / "torn" / "images").iterdir())[1:]:
        image.unlink()
    generate.generate(model, task, tmp_path / "torn", batch_size=2, quiet=True)
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_damaged_missing_and_emptied_images_are_drawn_again(model, tmp_path):
    task = make_task()
    generate.generate(model, task, tmp_path, batch_size=2, quiet=True)
    before = {name: data for name, data in content(tmp_path).items() if name.startswith("images")}
    paths = sorted((tmp_path / "images").iterdir())
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    assert len(arm.missing(tmp_path)) == 3
    generate.generate(model, task, tmp_path, batch_size=2, quiet=True)
    assert {name: data for name, data in content(tmp_path).items() if name.startswith("images")} == before
    assert not arm.missing(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"), [({"guidance": 5.0}, "generation.guidance"), ({"steps": 3}, "generation.steps")]
)
def test_a_folder_of_other_images_is_refused_by_the_field_that_differs(model, tmp_path, change, field):
    generate.generate(model, make_task(), tmp_path, quiet=True)
    before = content(tmp_path)
    with pytest.raises(EraseError, match=rf"holds other images \({field}: .* there, .* here"):
        generate.generate(model, make_task(), tmp_path, **change, quiet=True)
    with pytest.raises(EraseError, match=r"task\.options\.subset"):
        generate.generate(model, make_task(subset="all"), tmp_path, quiet=True)
    assert content(tmp_path) == before


def test_a_folder_that_was_begun_without_a_manifest_goes_on_and_a_strangers_is_refused(model, tmp_path):
    """A process that is killed between two files, or one that starts at the same time."""
    generate.generate(model, make_task(), tmp_path / "whole", quiet=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "samples.jsonl").write_bytes((tmp_path / "whole" / "samples.jsonl").read_bytes())
    (tmp_path / "begun" / ".manifest.json.x").write_text("half")
    generate.generate(model, make_task(), tmp_path / "begun", quiet=True)
    (tmp_path / "begun" / ".manifest.json.x").unlink()
    assert content(tmp_path / "begun") == content(tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(EraseError, match="exists and is no evaluation folder"):
        generate.generate(model, make_task(), tmp_path / "other", quiet=True)


def test_settings_are_read_back_from_what_draws(model):
    task = make_task()
    settings = generate.effective_settings(model, task, None, None)
    assert (settings["steps"], settings["guidance"], settings["scheduler"]) == (2, 3.0, "DDIMScheduler")
    assert settings["precision"] == "float32" and settings["guidance_of_samples"] == "used"
    assert settings["noise"] == "one CPU generator a picture"  # part of identities on disk: never reworded
    assert generate.effective_settings(model, task, 9, 1.5)["guidance_of_samples"] == "ignored"


def test_a_gpu_without_memory_halves_the_batch_and_draws_the_same(model, tmp_path, monkeypatch):
    task = replace(make_task(6), samples=tuple(replace(s, height=None, guidance=None) for s in make_task(6).samples))
    generate.generate(model, task, tmp_path / "plenty", batch_size=6, quiet=True)
    draw = sd.StableDiffusion.draw

    def small(self: sd.StableDiffusion, prompts: Any, *rest: Any, **options: Any) -> torch.Tensor:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, prompts, *rest, **options)

    monkeypatch.setattr(sd.StableDiffusion, "draw", small)
    generate.generate(model, task, tmp_path / "little", batch_size=6, quiet=True)
    sizes = [record["batch_size"] for record in arm.complete_records(tmp_path / "little")]
    assert max(sizes) == 2
    plenty = pixels(tmp_path / "plenty")
    assert all(np.abs(p - plenty[name]).max() <= 1 for name, p in pixels(tmp_path / "little").items())


def test_a_vae_without_memory_decodes_one_by_one_and_nothing_is_drawn_again(model, tmp_path, monkeypatch):
    task = make_task(2)
    generate.generate(model, task, tmp_path / "plenty", quiet=True)
    draw, decode, drawn = sd.StableDiffusion.draw, sd.StableDiffusion.decode, []

    def counted(self: sd.StableDiffusion, prompts: Any, *rest: Any, **options: Any) -> torch.Tensor:
        drawn.extend(prompts)
        return draw(self, prompts, *rest, **options)

    def small(self: sd.StableDiffusion, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents, batch_size)

    monkeypatch.setattr(sd.StableDiffusion, "draw", counted)
    monkeypatch.setattr(sd.StableDiffusion, "decode", small)
    generate.generate(model, task, tmp_path / "little", quiet=True)
    assert len(drawn) == len(task.samples)
    plenty = pixels(tmp_path / "plenty")
    assert all(np.abs(p - plenty[name]).max() <= 1 for name, p in pixels(tmp_path / "little").items())


def test_images_that_are_not_finite_or_flat_are_an_outcome_of_their_own(model, tmp_path, monkeypatch):
    task = replace(make_task(3), samples=tuple(replace(s, height=None, guidance=None) for s in make_task(3).samples))
    decode = sd.StableDiffusion.decode

    def broken(self: sd.StableDiffusion, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        images = decode(self, latents, *rest)
        images[0], images[1] = torch.nan, -1
        return images

    monkeypatch.setattr(sd.StableDiffusion, "decode", broken)
    generate.generate(model, task, tmp_path, quiet=True)
    records = arm.complete_records(tmp_path)
    assert [record["invalid"] for record in records] == ["not finite", "flat", None]
    assert records[0]["file"] is None and not arm.missing(tmp_path)


def test_an_error_ends_the_run_and_what_was_drawn_before_stays(model, tmp_path, monkeypatch):
    task, draw, calls = make_task(), sd.StableDiffusion.draw, []

    def failing(self: sd.StableDiffusion, *rest: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("defect")
        return draw(self, *rest, **options)

    monkeypatch.setattr(sd.StableDiffusion, "draw", failing)
    with pytest.raises(RuntimeError, match="defect"):
        generate.generate(model, task, tmp_path, batch_size=1, quiet=True)
    assert len(arm.records(tmp_path)) == 2
    with pytest.raises(EraseError, match="5 of 7 images are not generated yet"):
        arm.complete_records(tmp_path)


def test_a_full_disk_is_one_clear_line_and_no_record(model, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    task = make_task()
    arm.open_arm(tmp_path / "a", generate.identity(generate.model_hashes(model), task, {}, 1), task.samples)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EraseError, match="No space left on device; free some space"):
        generate.generate(model, task, tmp_path / "b", quiet=True)
    assert not arm.records(tmp_path / "a") and not list((tmp_path / "b").rglob("*.png"))


def test_one_changed_weight_is_another_model(toy_pipeline_dir):
    model = load_sd(str(toy_pipeline_dir))
    before = generate.model_hashes(model)
    with torch.no_grad():
        next(iter(model.vae.parameters())).view(-1)[0] += 1e-3
    after = generate.model_hashes(model)
    assert before["vae"] != after["vae"] and before["unet"] == after["unet"]


def test_a_task_without_samples_is_an_error():
    with pytest.raises(EraseError, match="has no sample"):
        replace(make_task(), samples=())


def test_a_delta_is_applied_before_drawing(toy_pipeline_dir, tmp_path):
    base = stored_unet.load_unet(toy_pipeline_dir)
    before = {f"unet.{name}": tensor for name, tensor in base.state_dict().items()}
    after = {name: tensor + 0.01 for name, tensor in before.items()}
    delta.save(tmp_path / "delta.safetensors", delta.difference(before, after, {}))
    model = generate.load_model(str(toy_pipeline_dir), delta_path=str(tmp_path / "delta.safetensors"), device="cpu")
    assert generate.model_hashes(model)["unet"] == delta.content_hash(after)
    plain = generate.load_model(str(toy_pipeline_dir), device="cpu")
    assert generate.model_hashes(plain)["unet"] != generate.model_hashes(model)["unet"]


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"device": "cuda:0"}])
def test_what_this_machine_cannot_do_is_one_clear_line(toy_pipeline_dir, options):
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EraseError, match="choose fp32|sees no CUDA device"):
        generate.load_model(str(toy_pipeline_dir), **options)


def test_only_one_process_writes_to_a_file(tmp_path):
    with (
        jsonl.Appender(tmp_path / "records-0-of-1.jsonl"),
        pytest.raises(EraseError, match="being written by another process"),
        jsonl.Appender(tmp_path / "records-0-of-1.jsonl"),
    ):
        pass


def test_a_last_line_that_a_crash_cut_does_not_count_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "lines.jsonl"
    with jsonl.Appender(path) as out:
        out.write([{"id": "a"}, {"id": "b", "x": 1}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert jsonl.read_lines(path) == [{"id": "a"}]
        with jsonl.Appender(path) as out:
            out.write([{"id": "b", "x": 1}])
        assert path.read_bytes() == whole
    path.write_bytes(b"{broken\n" + whole)
    with pytest.raises(EraseError, match="line 1: .* the file is damaged"):
        jsonl.read_lines(path)
