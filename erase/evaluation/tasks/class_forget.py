"""Imagenette's ten classes, of which one is forgotten."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Group, Lines, Plan, lines_of, present
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of, where
from erase.words import article

IMAGENETTE = {  # places in ImageNet's 1,000 classes; names differ from one classifier to the next, places do not
    "tench": 0,
    "English springer": 217,
    "cassette player": 482,
    "chain saw": 491,
    "church": 497,
    "French horn": 566,
    "garbage truck": 569,
    "gas pump": 571,
    "golf ball": 574,
    "parachute": 701,
}
_CLASS_TEMPLATES = (
    "a photo of {}",
    "an image of {}",
    "a picture of {}",
    "a close-up photo of {}",
    "a photo of {} outdoors",
    "a photo of {} in bright light",
    "a blurry photo of {}",
    "a photo of {} from the side",
    "a snapshot of {}",
    "a professional photograph of {}",
)
PER_CLASS = 500


class ClassForget(Task):
    """Images of ten ImageNet classes, of which one is to be forgotten, named by a classifier."""

    about = "Imagenette's ten classes, named by an ImageNet classifier"
    judges = ("classifier",)
    concept_judges = ("imagenet",)
    imagenet_classes = tuple(IMAGENETTE.values())
    limits = ("A classifier always names a class: an image that shows nothing recognisable counts as another object.",)

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """Ten templates a class, num_images images a class; the concept's class is the one to forget."""
        assert concept is not None  # concept_judges
        forget = next((name for name, index in IMAGENETTE.items() if index == concept.judge["index"]), None)
        if forget is None:
            raise EraseError(f"{concept.name!r} (ImageNet {concept.judge['index']}) is none of {', '.join(IMAGENETTE)}")
        samples = []
        for name, index in IMAGENETTE.items():
            role = "forget" if name == forget else "retain"
            thing = f"{article(name)} {name}"
            for i in range(options.num_images or PER_CLASS):
                sample_id = f"{name.replace(' ', '-').lower()}-{i:04d}"
                prompt = _CLASS_TEMPLATES[i % len(_CLASS_TEMPLATES)].format(thing)
                samples.append(
                    Sample(sample_id, prompt, seed_of(self.name, sample_id), role, name, facts={"index": index})
                )
        chosen = {"forget": forget, "images_a_class": options.num_images or PER_CLASS}
        return self.sample_set(samples, chosen)

    def options_shape(self) -> dict[str, Any]:
        return {"forget": str, "*": Any}

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        from erase.evaluation.judges.classifier import shows  # here: it loads torch

        seen = lines_of(lines, "classifier")

        def within(k: int) -> Callable[[Sample, Mapping[str, Any]], bool]:
            return lambda s, line: shows(line, s.facts["index"], top=k)

        def outside(k: int) -> Callable[[Sample, Mapping[str, Any]], bool]:
            return lambda s, line: not shows(line, s.facts["index"], top=k)

        columns = [
            Column("class.ua", "Unlearning accuracy", f"share of images of {options['forget']!r} that the "
                   "classifier calls something else; the base's own is not zero", True,
                   where(samples, seen, "forget", outside(1))),
            Column("class.ua_top5", "Unlearning accuracy, top 5", "the same among its five best guesses", True,
                   where(samples, seen, "forget", outside(5))),
            Column("class.ra", "Retained accuracy", "share of the other classes' images named correctly", True,
                   where(samples, seen, "retain", within(1))),
            Column("class.ra_top5", "Retained accuracy, top 5", "the same among its five best guesses", True,
                   where(samples, seen, "retain", within(5))),
        ]  # fmt: skip
        correct = [not line["invalid"] and within(1)(s, line) for s, line in zip(samples, seen, strict=True)]
        columns.append(Column("class.top1", "Named correctly", "all ten classes", True, correct))
        groups = [Group("classes", "Named correctly, by class", "class.top1", [[sample.label] for sample in samples])]
        return Plan(present(columns), groups, "class.ua", "class.ra", [False] * len(samples))
