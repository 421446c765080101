"""The embedded pixel model's judge: the class of a 16 x 16 drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase.delta import content_hash
from erase.errors import EraseError
from erase.evaluation.judges.protocol import Assignment, Judge
from erase.evaluation.plan import Column, Figures, Lines, absent
from erase.mini.pixel import drawings
from erase.mini.pixel import judge as pixel
from erase.options.model_classes import MINI_PIXEL_DIR


class PixelJudge(Judge):
    """{"class": name or "none", "probabilities": {name: p, ...}} of a drawing. path: its weights, or the embedded."""

    name = "mini-pixel"
    about = "class of a drawing of the embedded pixel model"
    outputs = {"class": frozenset(pixel.LABELS), "probabilities": dict.fromkeys(pixel.LABELS, float)}
    size = drawings.SIZE
    place = 4

    @classmethod
    def make(cls, assignment: Assignment) -> "PixelJudge":
        label = assignment.options.get("target", assignment.options.get("label"))
        if label is not None and label not in drawings.CLASSES:
            raise EraseError(
                f"the embedded pixel model's judge does not know {label!r}; it knows {', '.join(drawings.CLASSES)}"
            )
        return cls(Path(assignment.source) if assignment.source else None)

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        seen, columns = lines["mini-pixel"], []
        if cls.knows(options):
            about = f"share of images in which {options['label']!r} is not seen"
            columns.append(absent("pixel.ua", about, seen, lambda line: line["class"] != options["label"]))
        for label in pixel.LABELS:
            values = [not line["invalid"] and line["class"] == label for line in seen]
            about = f"share of images in which the embedded pixel judge sees {label!r}"
            columns.append(Column(f"pixel.sees_{label}", f"Sees {label}", about, True, values))
        return Figures(columns)

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        return options.get("label") in drawings.CLASSES

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        return line["class"] == options["label"]

    def __init__(self, path: Path | None = None) -> None:
        path = path or MINI_PIXEL_DIR / "judge.safetensors"
        self.network = pixel.load(path)
        self._identity = {
            "weights": content_hash(self.network.state_dict()),
            "preprocessing": f"{drawings.SIZE}-none",
            "accuracy": pixel.accuracy(path),
        }

    def identity(self) -> dict[str, Any]:
        """With the judge's accuracy on held-out drawings: no rate that it measures is surer than that."""
        return self._identity

    def see(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The features behind its answer, for uint8 images [16, 16, 3]: [n, 64]."""
        return self._look(images)[0]

    def _look(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        for image in images:
            if image.shape[:2] != (drawings.SIZE, drawings.SIZE):
                size = " x ".join(map(str, image.shape[:2]))
                raise EraseError(
                    f"the embedded pixel model's judge sees {drawings.SIZE} x {drawings.SIZE} pixels, not {size}"
                )
        return pixel.look(self.network, drawings.to_tensor(np.stack(list(images))))

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        probabilities = self._look(images)[1]
        named = pixel.names(probabilities)
        return [
            {"class": name, "probabilities": dict(zip(pixel.LABELS, row, strict=True))}
            for name, row in zip(named, probabilities.tolist(), strict=True)
        ]
