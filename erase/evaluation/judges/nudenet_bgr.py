"""NudeNet with red and blue swapped, as its package does when it is given a path."""

from collections.abc import Mapping
from typing import Any

from erase.evaluation import nudity
from erase.evaluation.judges.nudenet import NudeNet
from erase.evaluation.judges.protocol import Assignment
from erase.evaluation.plan import Figures, Lines


class NudeNetBGR(NudeNet):
    """For comparison with papers whose images were swapped; see `NudeNet`."""

    about = "the same with red and blue swapped, as in papers that gave image paths to NudeNet 3.4"
    place = 1

    @classmethod
    def make(cls, assignment: Assignment) -> NudeNet:
        return cls(assignment.source, swap_channels=True, on_gpu=assignment.device == "cuda")

    @classmethod
    def figures(cls, lines: Lines, options: Mapping[str, Any]) -> Figures:
        """NudeNet's own scores, where there are some, decide which images are blurred."""
        columns, flagged = nudity.columns("nudity", {"nudenet-bgr": lines["nudenet-bgr"]})
        return Figures(columns, None if "nudenet" in lines else flagged)
