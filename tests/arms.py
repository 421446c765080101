"""Small arms with known contents, and a judge that reads them, for tests of what is made of scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erase import files
from erase.evaluation import arm, jsonl, score
from erase.evaluation.judges import thumbnails
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.tasks.protocol import Sample, SampleSet

BASE: dict[str, Any] = dict(forget=["circle"] * 19 + ["square"], retain=["square"] * 19 + ["none"])
MANY = 130  # prompts of one image each: enough to show that a loss is below 3 points
WIDE: dict[str, Any] = dict(forget=["circle"] * MANY, retain=["square"] * MANY)


class Stub(Judge):
    """A judge of name "mini" that says what the image's red value stands for."""

    name = "mini"
    WORDS = ("circle", "square", "none")

    def __init__(self, weights: str = "w"):
        self.weights = weights

    def identity(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"object": self.WORDS[int(i[0, 0, 0]) // 100], "colour": "red", "style": "solid"} for i in images
        ]  # fmt: skip


def make_arm(
    folder: Path, forget: Sequence[str], retain: Sequence[str], *, unet: str = "u", prompts: int | None = None
) -> Path:
    """A drawn and scored arm whose images show these words ("black": flat) on circle and square prompts.

    prompts: of each of the two, in turn; None for three, or for one per image of arms of `MANY` images or more.
    """
    prompts = prompts or (3 if len(forget) < MANY else len(forget))
    samples = [
        Sample(
            f"{role}-{i}",
            f"{name} {i % prompts}",
            i,
            role,
            name,
            facts={"object": name, "colour": "red", "style": "solid"},
        )
        for role, name, words in (("forget", "circle", forget), ("retain", "square", retain))
        for i in range(len(words))
    ]
    options = {"concept": "circle", "head": "object", "target": "circle"}
    task = SampleSet("mini", 1, options, tuple(samples), ("mini", "thumbnails"))
    identity = {"task": task.identity(), "model": {"unet": unet}, "generation": {"steps": 2, "batch_size": 3}}
    arm.open_arm(folder, identity, samples)
    lines = []
    for number, (sample, word) in enumerate(zip(samples, [*forget, *retain], strict=True)):
        pixels = np.random.default_rng(number).integers(0, 90, (8, 8, 3), dtype=np.uint8)
        pixels[0, 0, 0] = 100 * Stub.WORDS.index(word) if word != "black" else 0
        pixels = pixels * 0 if word == "black" else pixels
        name = f"images/{number:05d}.png"
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        line = {"id": sample.id, "file": name, "sha256": files.file_hash(folder / name), "invalid": None}
        lines.append(line)
    with jsonl.Appender(folder / "records-0-of-1.jsonl") as out:
        out.write(lines)
    for judge in (Stub(), thumbnails.Thumbnails()):
        score.score(folder, judge, quiet=True)
    return folder
