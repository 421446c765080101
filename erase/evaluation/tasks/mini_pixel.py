"""The classes of the embedded pixel model: the forgotten one, and all others."""

from collections.abc import Mapping, Sequence
from typing import Any

from erase.concepts import Concept
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Group, Lines, Plan, lines_of, present
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of, where

NONE = "none"  # what the judge says of an image that shows no class
NUM_FORGET, NUM_RETAIN = 200, 50  # NUM_RETAIN of each other class


class MiniPixel(Task):
    """Images of the forgotten class and of every other one, named by the embedded pixel model's judge."""

    about = "the embedded pixel model's classes: the forgotten one and all others, by its judge; FID and KID"
    judges = ("mini-pixel", "features", "thumbnails")
    concept_judges = ("classes",)
    limits = (
        "The embedded pixel model is a toy: this says nothing about larger models.",
        "A copied label row gets unlearning accuracy 100 % and keeps all else: attack with learnt-class.",
    )

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """num_images: of the forgotten class; a quarter as many of each other one."""
        assert concept is not None  # concept_judges
        target = str(concept.judge["label"])
        num = options.num_images or NUM_FORGET
        others = concept.others or concept.retain
        counts = [
            (target, "forget", num),
            *((name, "retain", max(1, num * NUM_RETAIN // NUM_FORGET)) for name in others),
        ]
        samples = []
        for name, role, count in counts:
            for i in range(count):
                sample_id = f"{role}-{name}-{i:04d}"
                seed = seed_of(self.name, f"{name}-{i}")
                samples.append(Sample(sample_id, name, seed, role, name))
        chosen = {"concept": concept.name, "target": target, "features": "mini-pixel"}
        return self.sample_set(samples, chosen)

    def options_shape(self) -> dict[str, Any]:
        return {"target": str, "*": Any}

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        seen, target = lines_of(lines, "mini-pixel"), options["target"]

        def share(role: str, holds: Any) -> list[bool | float | None]:
            return where(samples, seen, role, holds)

        chance = [
            (1.0 if line["invalid"] else line["probabilities"][target]) if sample.role == "forget" else None
            for sample, line in zip(samples, seen, strict=True)
        ]
        columns = [
            Column("pixel.ua", "Unlearning accuracy",
                   f"share of images of the label {target!r} that do not show it", True,
                   share("forget", lambda s, line: line["class"] != target)),
            Column("pixel.ra", "Retained classes", "share of images of other labels that show their class", True,
                   share("retain", lambda s, line: line["class"] == s.label)),
            Column("pixel.p", "Probability", f"mean probability of {target!r} in images of its label", False,
                   chance, range=(0, 1)),
            Column("pixel.nothing", "Nothing recognisable",
                   "share of images of the forgotten label that show no class; invalid images count", False,
                   nothing_seen(samples, seen)),
        ]  # fmt: skip
        by_class = [[sample.label] if sample.role == "retain" else [] for sample in samples]
        groups = [Group("classes", "Retained classes, one by one", "pixel.ra", by_class)]
        return Plan(present(columns), groups, "pixel.ua", "pixel.ra", [False] * len(samples))


def nothing_seen(samples: Sequence[Sample], lines: Sequence[Mapping[str, Any]]) -> list[bool | float | None]:
    """Whether the judge recognises nothing in each image of the forgotten label."""
    return [
        bool(line["invalid"]) or line["class"] == NONE if sample.role == "forget" else None
        for sample, line in zip(samples, lines, strict=True)
    ]
