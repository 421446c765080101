"""The embedded pixel model: its data, training, judge and quality, its task, and the attack on labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erase import cli, concepts
from erase.errors import EraseError
from erase.evaluation import cli as evaluation
from erase.evaluation.attacks.learnt_class import LearntClass, label_of
from erase.evaluation.attacks.protocol import CONTROL, Given, Shown
from erase.evaluation.judges.mini_pixel import PixelJudge
from erase.families import loading
from erase.mini.pixel import drawings, judge
from erase.mini.pixel.train import DEFAULTS, Budget, train
from erase.options.model_classes import MINI_PIXEL_DIR

TINY = Budget(num_drawings=1000, judge_steps=4, judge_batch=4, unet_steps=4, unet_batch=4)


def images_of(model: Any, names: list[str], first_seed: int = 0) -> list[np.ndarray]:
    from erase.data.pixels import to_pixels

    seeds = [*range(first_seed, first_seed + len(names))]
    latents = model.draw(names, seeds, steps=25, guidance=2.0, size=16)
    return [*to_pixels(model.decode(latents)).permute(0, 2, 3, 1).numpy()]


def seen(images: list[np.ndarray]) -> list[str]:
    return [line["class"] for line in PixelJudge().score(images, [""] * len(images))]


def test_drawings_are_the_same_for_the_same_seed_and_leave_out_what_they_should():
    one, two = (drawings.sample(40, np.random.default_rng(3), ["circle", "star"]) for _ in range(2))
    assert np.array_equal(one[0], two[0]) and one[0].shape == (40, 16, 16, 3) and one[0].dtype == np.uint8
    assert {drawings.CLASSES[label] for label in one[1]} == {"circle", "star"}


def test_the_judge_recognises_new_drawings_and_refuses_other_sizes():
    images, labels = drawings.sample(200, np.random.default_rng(12345))
    right = [name == drawings.CLASSES[label] for name, label in zip(seen([*images]), labels, strict=True)]
    assert sum(right) >= 196
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    assert seen([*noise]).count(judge.NONE) >= 18
    with pytest.raises(EraseError, match="sees 16 x 16 pixels, not 8 x 8"):
        PixelJudge().score([noise[0, :8, :8]], [""])


def test_the_model_generates_its_classes():
    names = [name for name in drawings.CLASSES for _ in range(6)]
    right = [a == b for a, b in zip(seen(images_of(loading.load("mini-pixel"), names)), names, strict=True)]
    assert sum(right) >= 0.85 * len(names)


def test_a_training_is_continued_opens_and_is_not_taken_for_another(tmp_path):
    folder = train(tmp_path / "model", seed=3, without="circle", budget=TINY, quiet=True)
    model: Any = loading.load(folder)
    assert model.classes == drawings.CLASSES and model.prediction_type == "v_prediction"
    assert len(model.class_vectors) == 11 and model.defaults == json.loads(json.dumps(DEFAULTS))
    (folder / "work" / "unet.safetensors").unlink()
    train(folder, seed=3, without="circle", budget=TINY, quiet=True)
    again: Any = loading.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.unet.parameters(), again.unet.parameters(), strict=True))
    with pytest.raises(EraseError, match="holds another training"):
        train(folder, seed=4, without="circle", budget=TINY, quiet=True)
    with pytest.raises(EraseError, match="has no class 'dog'"):
        train(tmp_path / "other", without="dog", budget=TINY)
    reused = train(tmp_path / "reused", budget=TINY, parts_from=MINI_PIXEL_DIR, quiet=True)
    assert (reused / "judge.safetensors").read_bytes() == (MINI_PIXEL_DIR / "judge.safetensors").read_bytes()


def test_the_embedded_folder_holds_what_the_code_says():
    assert json.loads((MINI_PIXEL_DIR / "erase_defaults.json").read_text()) == json.loads(json.dumps(DEFAULTS))
    files = [path for path in MINI_PIXEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6


def test_both_commands_run_end_to_end(tmp_path, capsys):
    run = tmp_path / "run"
    few = ["--num-forget", "4", "--num-retain", "4", "--batch-size", "2", "--num-train-steps", "2", "--quiet"]
    cli.main(["--concept", "circle", "--model", "mini-pixel", "--output", str(run), "--steps", "2", *few])
    record = json.loads((run / "run.json").read_text())
    assert record["concept"]["anchor"] == ["square"] and (run / "samples.png").is_file()
    output = ["--output", str(tmp_path / "out"), "--quiet"]
    task = ["--task", "mini-pixel", "--num-images", "8", "--num-inference-steps", "2"]
    evaluation.main(["run", "--model", str(run), *task, *output])
    results = json.loads(next((tmp_path / "out").rglob("results.json")).read_text())
    names = {row["name"].split("/")[0] for row in results["scores"]}
    assert {"pixel.ua", "pixel.ra", "pixel.p", "pixels.drift"} <= names and results["primary"] == "pixel.ua"
    attack = ["--attack", "learnt-class", "--quick", "--num-images", "2"]
    evaluation.main(["attack", "--model", str(run), *attack, *output])
    assert "attack.learnt-class" in capsys.readouterr().out


def test_an_attack_on_labels_is_refused_for_a_model_of_text(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["attack", "--model", "mini", "--concept", "circle", "--base", "mini", "--attack",
                         "learnt-class", "--quick", "--output", str(tmp_path)])  # fmt: skip
    assert "sd takes text and has no class labels" in capsys.readouterr().err


def test_task_and_judge_refuse_classes_that_they_do_not_know(toy_ddpm_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["run", "--model", str(toy_ddpm_dir), "--base", str(toy_ddpm_dir), "--concept", "cat",
                         "--task", "mini-pixel", "--output", str(tmp_path)])  # fmt: skip
    assert "judge does not know 'cat'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ci
def test_a_learned_class_vector_brings_the_class_of_a_copied_row_back_and_a_random_one_does_not():
    """The row copy hides a label only, so that an attack which does not bring its class back shows nothing."""
    model: Any = loading.load("mini-pixel")
    concept = concepts.of_class("circle", model.classes)
    shown = model.draw(["circle"] * 64, [*range(64)], steps=25, guidance=2.0, size=16)
    with torch.no_grad():
        model.class_vectors[label_of(model, "circle")] = model.class_vectors[label_of(model, "square")]
    assert seen(images_of(model, ["circle"] * 20)).count("circle") <= 1  # before
    given = Given(model=model, open_base=lambda: model, concept=concept, shown=Shown(shown, ("circle",) * 64),
                  others=Shown(shown[:0], ()), samples=(), steps=25, guidance=2.0, size=16, quiet=True)  # fmt: skip
    attack = LearntClass()
    found, counts = attack.search(given, 0), {}
    for point in ("150", CONTROL):
        with attack.attacked(given, found[point]):
            counts[point] = seen(images_of(model, ["circle"] * 40, 100)).count("circle")
    assert counts["150"] >= 24 and counts[CONTROL] <= 16


def test_drawings_are_written_in_a_folder_for_each_class(tmp_path: Path):
    from erase.mini.__main__ import main

    main(["drawings", "--output", str(tmp_path / "real"), "--num-each", "2", "--without", "moon"])
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == sorted({*drawings.CLASSES} - {"moon"})
    assert len([*(tmp_path / "real").rglob("*.png")]) == 18


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "erase.mini: interrupted; the same command continues"),
        (EraseError("wrong"), 2, "erase.mini: wrong"),
        (FileNotFoundError(2, "No such file or directory", "parts"), 2, "erase.mini: parts: No such file or directory"),
    ],
)
def test_a_training_that_is_interrupted_or_given_bad_input_ends_with_one_line(
    raised, code, said, monkeypatch, tmp_path, capsys
):
    from erase.mini.__main__ import main
    from erase.mini.pixel import train

    def stopped(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(train, "train", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", "mini-pixel", "--output", str(tmp_path)])
    assert stop.value.code == code and capsys.readouterr().err.strip() == said
