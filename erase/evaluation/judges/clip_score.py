"""CLIP score: how well an image fits its prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from erase.evaluation.judges.networks.pretrained import Clip, batches
from erase.evaluation.judges.protocol import Assignment, Judge
from erase.evaluation.plan import Figures, Lines, clip_score


class ClipScore(Judge):
    """{"clip_score": 100 cos(image, prompt)}: higher fits better; negative values stay (torchmetrics shows them as 0).

    Prompts are cut at the model's length (77 tokens). Values of different CLIP models are different numbers.
    """

    name = "clip-score"
    about = "how well an image fits its prompt, by CLIP"
    outputs = {"clip_score": float}
    place = 5

    @classmethod
    def make(cls, assignment: Assignment) -> "ClipScore":
        return cls(**assignment.given, device=assignment.device)

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        return Figures([clip_score(lines["clip-score"])])

    def __init__(
        self,
        source: str | Path = "openai/clip-vit-base-patch32",
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        self.clip = Clip(source, device, revision)
        self.origin = self.clip.origin

    def identity(self) -> dict[str, Any]:
        return self.clip.identity

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        if not images:
            return []
        texts = list(dict.fromkeys(prompts))
        place = {text: row for row, text in enumerate(texts)}
        text = normalize(self.clip.read(texts))[[place[prompt] for prompt in prompts]]
        image = torch.cat([normalize(self.clip.see(part)) for part in batches(images)])
        return [{"clip_score": 100 * value} for value in torch.linalg.vecdot(image, text).tolist()]
