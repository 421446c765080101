"""CLIP's choice among labels in free text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from erase.errors import EraseError
from erase.evaluation.judges.networks.pretrained import Clip, batches
from erase.evaluation.judges.protocol import Assignment, Judge
from erase.evaluation.plan import Figures, Lines, absent

# a label that begins so is a sentence already
SENTENCE = re.compile(r"\s*((a|an|the|some)\s+\w|(photo|image|picture|painting|drawing|portrait)s?\s+(of|in)\b)", re.I)


class ClipZeroShot(Judge):
    """CLIP's choice among labels in free text: {"probabilities": {label: p}, "best": label}.

    p = softmax(s cos(image, label)), s the model's own scale (about 100). A label's embedding is the mean over the
    templates of unit vectors (Radford et al. 2021, section 3.1.4). A label that is a sentence already, such as "a
    painting in the style of Claude Monet", is read as it is.

    labels: the target and its alternatives, two at least.
    templates: one or more texts with {} in the label's place.
    """

    name = "clip"
    about = "which of the concept and its alternatives CLIP finds most likely"
    outputs = {"probabilities": {"*": float}, "best": str}
    place = 3

    @classmethod
    def make(cls, assignment: Assignment) -> "ClipZeroShot":
        options = assignment.options
        if "alternatives" not in options:
            raise EraseError(
                "the judge clip needs a concept with alternatives: --concept NAME with --kind object or style, "
                "or a preset such as van_gogh"
            )
        return cls([options["target"], *options["alternatives"]], **assignment.given, device=assignment.device)

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        target = options["target"]
        about = f"share of images that CLIP does not call {target!r}"
        return Figures([absent("clip.ua", about, lines["clip"], lambda line: line["best"] != target)])

    @classmethod
    def knows(cls, options: Mapping[str, Any]) -> bool:
        return "alternatives" in options

    @classmethod
    def shows(cls, line: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        return line["best"] == options["target"]

    def __init__(
        self,
        labels: Sequence[str],
        source: str | Path = "openai/clip-vit-base-patch32",
        templates: str | Sequence[str] = "a photo of {}",
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        self.labels = list(labels)
        self.templates = [templates] if isinstance(templates, str) else list(templates)
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise EraseError(f"labels are {self.labels}; give two or more, each once")
        if not self.templates or not all("{}" in template for template in self.templates):
            raise EraseError(f"templates are {self.templates}; each needs {{}} in the place of the label")
        self.clip = Clip(source, device, revision)
        self.origin = self.clip.origin
        self.texts = [texts_of(label, self.templates) for label in self.labels]
        self.text = normalize(torch.stack([normalize(self.clip.read(texts)).mean(0) for texts in self.texts]))
        self.scale = self.clip.network.logit_scale.exp().item()

    def identity(self) -> dict[str, Any]:
        return {**self.clip.identity, "labels": self.labels, "texts": self.texts}

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        scores = []
        for part in batches(images):
            logits = self.scale * normalize(self.clip.see(part)) @ self.text.T
            for row in logits.softmax(1).tolist():
                probabilities = dict(zip(self.labels, row, strict=True))
                scores.append({"probabilities": probabilities, "best": max(self.labels, key=probabilities.__getitem__)})
        return scores


def texts_of(label: str, templates: Sequence[str]) -> list[str]:
    """What CLIP reads for a label: the label in each template, or the label alone if it is a sentence."""
    return [label] if SENTENCE.match(label) else [text.replace("{}", label) for text in templates]
