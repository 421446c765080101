"""The embedded world's judge: object, colour and style of a drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erase.delta import content_hash
from erase.errors import EraseError
from erase.evaluation.judges.networks.pretrained import batches
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.plan import Column, Figures, Lines, absent
from erase.mini import judge as mini
from erase.mini import world


class MiniJudge(Judge):
    """The embedded world's judge: {"object": ..., "colour": ..., "style": ..., "probabilities": {"object": p, ...}}.

    path: its weights; by default those of the embedded model.
    """

    name = "mini"
    about = "object, colour and style of a drawing of the embedded model"
    outputs = {
        **{head: frozenset(names) for head, names in mini.HEADS.items()},
        "probabilities?": {"*": float},
    }
    size = world.SIZE
    place = 4

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        columns, seen = [], lines["mini"]
        if "head" in options:
            head, label = options["head"], options["label"]
            about = f"share of images in which {label!r} is not seen"
            columns.append(absent("mini.ua", about, seen, lambda line: line[head] != label))
        for label in mini.HEADS["object"]:
            about = f"share of images in which the embedded judge sees {label!r}"
            values = [not line["invalid"] and line["object"] == label for line in seen]
            columns.append(Column(f"mini.sees_{label.replace(' ', '_')}", f"Sees {label}", about, True, values))
        return Figures(columns)

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        return "head" in options

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        return line[options["head"]] == options["label"]

    def __init__(self, path: Path | None = None) -> None:
        path = path or Path(mini.__file__).with_name("weights") / "judge.safetensors"
        self.network = mini.load(path)
        self._identity = {
            "weights": content_hash(self.network.state_dict()),
            "preprocessing": f"{world.SIZE}-none",
            "accuracy": mini.accuracy(path),
        }

    def identity(self) -> dict[str, Any]:
        """With the judge's accuracy on held-out drawings: no rate that it measures is surer than that."""
        return self._identity

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The features behind its three answers, for uint8 images [64, 64, 3]: [n, d].

        Raises:
            EraseError: an image has another size.
        """
        for image in images:
            if image.shape[:2] != (world.SIZE, world.SIZE):
                size = " x ".join(map(str, image.shape[:2]))
                raise EraseError(
                    f"the embedded model's judge sees {world.SIZE} x {world.SIZE} pixels, not {size}; "
                    "it is for images of the embedded model"
                )
        return self.network.trunk(mini.to_tensor(images))

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        scores = []
        for part in batches(images):
            features = self.see(part)
            best = {head: layer(features).softmax(1).max(1) for head, layer in self.network.heads.items()}
            for row in range(len(part)):
                seen: dict[str, Any] = {head: mini.HEADS[head][int(best[head].indices[row])] for head in mini.HEADS}
                scores.append({**seen, "probabilities": {head: best[head].values[row].item() for head in mini.HEADS}})
        return scores
