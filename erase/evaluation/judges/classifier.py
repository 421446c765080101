"""Any ImageNet classifier: the classes that it finds most likely."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase.delta import content_hash
from erase.errors import EraseError
from erase.evaluation.judges.networks.pretrained import batches, load, load_processor, locate, pixels, rule
from erase.evaluation.judges.protocol import Assignment, Judge
from erase.evaluation.plan import Figures, Lines, absent


def shows(score: Mapping[str, Any], index: int, *, top: int = 1) -> bool:
    """Is the class among the `top` (at most 5) that the classifier holds most likely?"""
    return index in [seen for seen, _ in score["top5"][:top]]


class Classifier(Judge):
    """Any transformers image classifier: {"top5": [[class index, probability], ...]}, the most likely first.

    source: hub id or folder. A model with fewer than five classes gives them all.
    origin: where it came from, {"model": ..., "revision": ...}.
    """

    name = "classifier"
    about = "the five ImageNet classes that a classifier finds most likely"
    outputs = {"top5": [[int, float]]}
    place = 2

    @classmethod
    def make(cls, assignment: Assignment) -> "Classifier":
        judge = cls(**assignment.given, device=assignment.device)
        if assignment.imagenet_classes:
            judge.require(assignment.imagenet_classes)
        elif "index" in assignment.options:
            judge.require([assignment.options["index"]])
        else:
            raise EraseError("the judge classifier needs a concept with an ImageNet class, such as --concept church")
        return judge

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        seen, index = lines["classifier"], options["index"]
        about = f"share of images that the classifier does not call {options.get('concept')!r} (ImageNet {index})"
        top5 = f"{about}, among its five best guesses"
        return Figures(
            [
                absent("class.ua", about, seen, lambda line: not shows(line, index)),
                absent("class.ua_top5", top5, seen, lambda line: not shows(line, index, top=5)),
            ]
        )

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        return "index" in options

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        return shows(line, options["index"])

    def __init__(
        self, source: str | Path = "microsoft/resnet-50", device: str = "cpu", revision: str | None = None
    ) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder, self.origin = locate(source, revision)
        self.device = device
        self.network = load(AutoModelForImageClassification, folder).to(device)
        self.processor = load_processor(AutoImageProcessor, folder, backend="pil")
        self._identity = {
            "network": type(self.network).__name__,
            "weights": content_hash(self.network.state_dict()),
            "preprocessing": rule(self.processor),
        }

    @property
    def num_classes(self) -> int:
        return self.network.config.num_labels

    def identity(self) -> dict[str, Any]:
        return self._identity

    def require(self, indices: Iterable[int]) -> None:
        """Raises EraseError: the classifier has no class of such an index."""
        beyond = [index for index in indices if not 0 <= index < self.num_classes]
        if beyond:
            raise EraseError(
                f"the task asks for class {max(beyond)} but this classifier has {self.num_classes}, from 0 to "
                f"{self.num_classes - 1}; give one trained on the task's classes (microsoft/resnet-50 for ImageNet)"
            )

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        scores = []
        for part in batches(images):
            logits = self.network(pixels(self.processor, part).to(self.device)).logits
            best = logits.softmax(1).topk(min(5, self.num_classes))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            scores += [{"top5": [list(pair) for pair in zip(*both, strict=True)]} for both in pairs]
        return scores
