"""What a GPU that generates is spared: threads write images and judge them, batches fit its memory; pretended here."""

import threading
from dataclasses import replace
from typing import Any

import pretend_device
import pytest
import torch
from loaded import load_sd
from test_generate import make_task, pixels

from erase import device
from erase.errors import EraseError
from erase.evaluation import arm, beside, generate, score
from erase.evaluation.judges.registry import JUDGES
from erase.families import modes, sd
from erase.training import memory


class Watching:
    """A judge of brightness; the first image is not judged before the second batch is begun."""

    name, size, runs_beside = "nudenet", None, True

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.second_batch = threading.Event()

    def score(self, images: Any, prompts: Any) -> list[dict[str, Any]]:
        assert self.second_batch.wait(60), "the judge waited for the end of all batches"
        self.threads.append(threading.current_thread().name)
        return [{"max": float(image.mean())} for image in images]

    def identity(self) -> dict[str, Any]:
        return {"judge": "brightness"}


def alike(num: int) -> Any:
    task = make_task(num)
    return replace(task, samples=tuple(replace(s, height=None, guidance=None) for s in task.samples))


def generated(folder: Any, toy: Any, monkeypatch: Any, where: str, judge: Watching, num: int = 6) -> Any:
    plain, calls = sd.StableDiffusion.draw, [0]

    def draw(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            judge.second_batch.set()
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sd.StableDiffusion, "draw", draw)
        model = load_sd(toy, device=where)
        return generate.generate(model, alike(num), folder, batch_size=2, quiet=True, judges=[judge])  # pyright: ignore


def test_images_are_written_and_judged_while_the_next_ones_are_generated(toy_pipeline_dir, tmp_path, monkeypatch):
    """The same files as on a CPU, where nothing is judged before the end; scores are stored without a second look."""
    watching, waiting = Watching(), Watching()
    with pretend_device.gpu():
        early = generated(tmp_path / "gpu", toy_pipeline_dir, monkeypatch, "cuda", watching)
    assert generated(tmp_path / "cpu", toy_pipeline_dir, monkeypatch, "cpu", waiting) == {} and not waiting.threads
    ours, theirs = (arm.complete_records(tmp_path / name) for name in ("gpu", "cpu"))
    assert [r["file"] for r in ours] == [r["file"] for r in theirs]
    assert len(watching.threads) == 6 and threading.main_thread().name not in watching.threads
    images = arm.image_path(tmp_path / "gpu", ours[0])
    assert images.is_file() and early["nudenet"].keys() == {record["id"] for record in ours}
    monkeypatch.setattr(JUDGES, "stated", lambda *_: type("Any", (), {"outputs": {"max": float}, "identity_shape": {}}))
    score.score(tmp_path / "gpu", watching, quiet=True, early=early["nudenet"])  # pyright: ignore
    lines = score._stored(score.score_file(tmp_path / "gpu", "nudenet", ".jsonl"), "nudenet")
    assert len(watching.threads) == 6, "no image was judged twice"
    expected = {name: float(image.mean()) for name, image in pixels(tmp_path / "gpu").items()}
    assert {line["id"]: line["max"] for line in lines} == expected


def test_a_judge_that_fails_beside_ends_the_run(toy_pipeline_dir, tmp_path, monkeypatch):
    class Failing(Watching):
        def score(self, images: Any, prompts: Any) -> list[dict[str, Any]]:
            raise EraseError("no model")

    with pretend_device.gpu(), pytest.raises(EraseError, match="no model"):
        generated(tmp_path / "gpu", toy_pipeline_dir, monkeypatch, "cuda", Failing())


def test_a_batch_is_as_given_as_begun_or_what_free_memory_holds(toy_pipeline_dir, tmp_path):
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device="cuda")
    each = 2 * memory.activations(model, 1, model.resolution, torch.float32, checkpointing=False)
    for free, expected in ((0, 8), (each, 8), (18 * each, 16), (36 * each, 32), (10**15, 32)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "free_memory", lambda where, free=free: free)
            assert generate.together(None, model, tmp_path / "new") == expected
            assert generate.together(3, model) == 3
    generate.generate(load_sd(toy_pipeline_dir), alike(2), tmp_path / "old", batch_size=5, quiet=True)
    assert generate.together(None, model, tmp_path / "old") == 5


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_many_images_are_worth_compiling_and_a_last_short_batch_is_not(toy_pipeline_dir, tmp_path, monkeypatch, where):
    compiled: list[int] = []

    def compile(forward: Any) -> Any:
        def counted(**named: Any) -> Any:
            compiled.append(len(named["sample"]))
            return forward(**named)

        return counted

    monkeypatch.setattr(modes.torch, "compile", compile)
    monkeypatch.setattr(generate, "COMPILE_FROM", 10)
    with pretend_device.gpu():
        model = load_sd(toy_pipeline_dir, device=where)
        model.precision = "bf16"
        settings = generate.effective_settings(model, alike(5), None, None)
        generate.generate(model, alike(5), tmp_path / "five", batch_size=2, quiet=True)
        assert ("compiled" in settings) == (where == "cuda")
        steps = settings["steps"]
        assert compiled == ([4] * 2 * steps if where == "cuda" else []), "two images, with and without words"
        compiled.clear()
        generate.generate(model, alike(1), tmp_path / "one", batch_size=2, quiet=True)
        assert not compiled and "forward" not in vars(model.network)


def test_a_compiler_that_fails_is_said_once_and_images_are_made(toy_pipeline_dir, tmp_path, monkeypatch):
    def compile(forward: Any) -> Any:
        def fails(*values: Any, **named: Any) -> Any:
            raise RuntimeError("no C compiler")

        return fails

    monkeypatch.setattr(modes.torch, "compile", compile)
    monkeypatch.setattr(generate, "COMPILE_FROM", 1)
    with pretend_device.gpu(), pytest.warns(UserWarning, match="cannot be compiled .no C compiler") as said:
        generate.generate(load_sd(toy_pipeline_dir, device="cuda"), alike(4), tmp_path, batch_size=2, quiet=True)
    assert len(said) == 1 and not arm.missing(tmp_path)


@pytest.mark.parametrize(("given", "expected"), [("1", 1), ("", None), ("many", None)])
def test_threads_are_those_that_the_user_allows(monkeypatch, given, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert beside.num_threads() == (expected or beside.num_threads()) >= 1
    assert beside.mapped(lambda x: 2 * x, [1, 2, 3]) == [2, 4, 6]
