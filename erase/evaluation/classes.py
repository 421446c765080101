"""What a picture shows, as a judge names it: an image classifier, CLIP over free-text labels, the embedded judge."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from erase.delta import content_hash
from erase.errors import EraseError
from erase.evaluation.pretrained import Clip, batches, load, load_processor, locate, pixels, rule
from erase.mini import judge as mini
from erase.mini import world


def shows(score: Mapping[str, Any], index: int, *, top: int = 1) -> bool:
    """Is the class among the `top` (at most 5) that the classifier holds most likely?"""
    return index in [seen for seen, _ in score["top5"][:top]]


class Classifier:
    """Any transformers image classifier: {"top5": [[class index, probability], ...]}, the most likely first.

    source: hub id or folder. A model with fewer than five classes gives them all.
    origin: where it came from, {"model": ..., "revision": ...}.
    """

    name = "classifier"

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


class ClipZeroShot:
    """CLIP's choice among labels in free text: {"probabilities": {label: p}, "best": label}.

    p = softmax(s cos(image, label)), s the model's own scale (about 100). A label's embedding is the mean over the
    templates of unit vectors (Radford et al. 2021, section 3.1.4).

    labels: the target and its alternatives, two at least.
    templates: one or more texts with {} in the label's place.
    """

    name = "clip"

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
        texts = [template.replace("{}", label) for label in self.labels for template in self.templates]
        of_each = normalize(self.clip.read(texts)).unflatten(0, (len(self.labels), len(self.templates)))
        self.text = normalize(of_each.mean(1))
        self.scale = self.clip.network.logit_scale.exp().item()

    def identity(self) -> dict[str, Any]:
        return {**self.clip.identity, "labels": self.labels, "templates": self.templates}

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        scores = []
        for part in batches(images):
            logits = self.scale * normalize(self.clip.see(part)) @ self.text.T
            for row in logits.softmax(1).tolist():
                probabilities = dict(zip(self.labels, row, strict=True))
                scores.append({"probabilities": probabilities, "best": max(self.labels, key=probabilities.__getitem__)})
        return scores


class MiniJudge:
    """The embedded world's judge: {"object": ..., "colour": ..., "style": ..., "probabilities": {"object": p, ...}}.

    path: its weights; by default those of the embedded model.
    """

    name = "mini"
    size = world.SIZE

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
        """The features behind its three answers, for uint8 pictures [64, 64, 3]: [n, d].

        Raises:
            EraseError: a picture has another size.
        """
        for image in images:
            if image.shape[:2] != (world.SIZE, world.SIZE):
                size = " x ".join(map(str, image.shape[:2]))
                raise EraseError(
                    f"the embedded model's judge sees {world.SIZE} x {world.SIZE} pixels, not {size}; "
                    "it is for pictures of the embedded model"
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
