"""Features of an image, of which FID and KID are made."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from erase.errors import EraseError
from erase.evaluation.judges.mini import MiniJudge
from erase.evaluation.judges.mini_pixel import PixelJudge
from erase.evaluation.judges.networks.inception import SIZE, Inception
from erase.evaluation.judges.networks.pretrained import Clip, batches
from erase.evaluation.judges.protocol import Assignment, Judge
from erase.mini.pixel.judge import NUM_FEATURES


class Features(Judge):
    """What FID and KID compare, one vector an image: {"features": float32 as base64 text}; `decode` reads it.

    kind: "inception2015" is the network that FID is defined by; "clip" a CLIP model's image embedding; "mini" and
        "mini-pixel" the judges of the embedded models.
    source: for inception2015 the weights file (else from torch.hub's cache), for clip a hub id or folder, for mini
        the judge's file (else the embedded one).
    """

    name = "features"
    about = "a feature vector for each image, for FID and KID"
    outputs = {"features": str}
    identity_shape = {"kind": str, "resize": str, "*": Any}

    @classmethod
    def make(cls, assignment: Assignment) -> "Features":
        kind = assignment.options.get("features", "clip")
        return cls(kind, **assignment.given, device=assignment.device)

    @classmethod
    def agrees(cls, stored: Any, again: Any) -> bool:
        """Numbers are compared, not the text that holds them."""
        if isinstance(stored, dict) and isinstance(again, dict) and "features" in stored and "features" in again:
            stored, again = ({**one, "features": decode(one).tolist()} for one in (stored, again))
        return super().agrees(stored, again)

    def __init__(
        self,
        kind: Literal["inception2015", "clip", "mini", "mini-pixel"],
        source: str | Path | None = None,
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        self.origin: dict[str, str] = {}
        if kind == "inception2015":
            self.eye = Inception(source, device)
            self.dimension = 2048
            details = {"kind": kind, "resize": f"{SIZE}-bilinear-tf1", **self.eye.identity}
        elif kind == "clip":
            self.eye = Clip(source or "openai/clip-vit-base-patch32", device, revision)
            self.origin = self.eye.origin
            self.dimension = int(self.eye.network.config.projection_dim)
            details = {"kind": f"clip-{self.eye.weights[:8]}", "resize": self.eye.resize, **self.eye.identity}
        elif kind == "mini-pixel":
            self.eye = PixelJudge(Path(source) if source else None)
            self.size, self.dimension = self.eye.size, NUM_FEATURES
            details = self.eye.identity()
            details = {"kind": f"mini-pixel-{details['weights'][:8]}", "resize": details["preprocessing"], **details}
        elif kind == "mini":
            self.eye = MiniJudge(Path(source) if source else None)
            self.size = self.eye.size
            self.dimension = int(self.eye.network.heads["object"].in_features)  # pyright: ignore
            details = self.eye.identity()
            details = {"kind": f"mini-{details['weights'][:8]}", "resize": details["preprocessing"], **details}
        else:
            raise EraseError(f"unknown features {kind!r}; there are inception2015, clip, mini and mini-pixel")
        self._identity = details

    def identity(self) -> dict[str, Any]:
        """With "kind" and "resize", of which `metric_id` makes a name."""
        return self._identity

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        rows = [row for part in batches(images) for row in self.eye.see(part).numpy()]
        return [{"features": base64.b64encode(row.astype("<f4").tobytes()).decode()} for row in rows]


def decode(score: Mapping[str, Any]) -> np.ndarray:
    """The vector that `Features` stored for an image: float32, [d]."""
    try:
        return np.frombuffer(base64.b64decode(score["features"], validate=True), "<f4")
    except ValueError as error:
        raise EraseError(f"features are damaged ({error}); delete scores/features.jsonl and score again") from error
