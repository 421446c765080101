"""A folder of images that already exist."""

from collections.abc import Mapping, Sequence
from typing import Any

from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation import own_images
from erase.evaluation.options import Options
from erase.evaluation.plan import Lines, Plan
from erase.evaluation.tasks.protocol import IMAGES_VERSION, Sample, SampleSet, Task


class Images(Task):
    """Images that are judged as they are; nothing is generated."""

    about = "any folder of images, judged by --judge; nothing is generated"
    version = IMAGES_VERSION  # 2: an invalid image fails every rule of NudeNet; CLIP reads sentences as they are

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        raise EraseError(
            "the task images generates nothing; use eval-concept run --task images --images DIR --judge JUDGE"
        )

    def options_shape(self) -> dict[str, Any]:
        return own_images.options_shape()

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        return own_images.plan(lines, options)
