"""Distance between two models' images of the same prompts and seeds, computed from stored thumbnails."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from erase.errors import EraseError
from erase.evaluation.judges.protocol import Judge

SIDE = 16


class Thumbnails(Judge):
    """A judge that keeps each image's 16 x 16 box average (768 bytes), so that a report needs no images."""

    name = "thumbnails"
    about = "a thumbnail of each image, for the distance between two models' images"
    outputs = {"thumbnail": str}

    def identity(self) -> dict[str, Any]:
        return {"side": SIDE, "resize": "box"}

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """{"thumbnail": base64 of uint8 [16, 16, 3]} for each uint8 image [h, w, 3]."""
        small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
        return [{"thumbnail": base64.b64encode(np.asarray(image).tobytes()).decode()} for image in small]


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float | None:
    """Mean absolute difference of two scored images' thumbnails, in [0, 1]; None where one is invalid."""
    if a["invalid"] or b["invalid"]:
        return None
    pixels = [_decode(one["thumbnail"]).astype(float) for one in (a, b)]
    return float(np.abs(pixels[0] - pixels[1]).mean() / 255)


def _decode(thumbnail: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(thumbnail, validate=True), np.uint8).reshape(SIDE, SIDE, 3)
    except ValueError as error:
        raise EraseError(f"a thumbnail is damaged ({error}); delete scores/thumbnails.jsonl and score again") from error
