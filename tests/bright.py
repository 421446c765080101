"""A judge without weights, for evaluations of toy models."""

from typing import Any

import numpy as np

from erase.evaluation.judges.protocol import Judge


class Bright(Judge):
    """Sees the concept in an image whose first pixel is brighter than its last."""

    about = "brightness"
    outputs = {"shows": bool}

    def identity(self) -> dict[str, Any]:
        return {"version": 1}

    def score(self, images, prompts) -> list[dict[str, Any]]:
        return [{"shows": bool(np.mean(image[0, 0]) > np.mean(image[-1, -1]))} for image in images]

    @classmethod
    def knows(cls, options: Any) -> bool:
        return True

    @classmethod
    def shows(cls, line: Any, options: Any) -> bool:
        return line["shows"]
