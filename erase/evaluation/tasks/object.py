"""Any object, which CLIP distinguishes from its alternatives."""

from collections.abc import Mapping, Sequence
from typing import Any

from erase.concepts import Concept
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Group, Lines, Plan, lines_of, present
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task, seed_of, where


class Object(Task):
    """The target and its alternatives, which CLIP distinguishes."""

    about = "any object; CLIP distinguishes it from its alternatives"
    version = 2  # 2: CLIP reads labels that are sentences as they are
    judges = ("clip",)
    concept_judges = ("clip",)
    limits = ("CLIP always chooses a label: an image that shows nothing recognisable counts as something else.",)

    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """The target's prompt and each alternative's, num_images (50) images each.

        The concept's own forget prompts are used too, in turn, so that a style is seen on several subjects.
        """
        assert concept is not None  # concept_judges
        target, alternatives = str(concept.judge["target"]), [str(a) for a in concept.judge["alternatives"]]
        num, samples = options.num_images or 50, []
        for number, label in enumerate((target, *alternatives)):
            role = "retain" if number else "forget"
            prompts = (label,) if number else tuple(dict.fromkeys((label, *concept.forget)))
            for i in range(num):
                sample_id = f"{role}-{number:02d}-{i:04d}"
                samples.append(Sample(sample_id, prompts[i % len(prompts)], seed_of(self.name, sample_id), role, label))
        chosen = {"target": target, "alternatives": alternatives, "images_a_label": num}
        return self.sample_set(samples, chosen)

    def options_shape(self) -> dict[str, Any]:
        return {"target": str, "alternatives": [str], "*": Any}

    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        seen, target = lines_of(lines, "clip"), options["target"]
        columns = [
            Column("clip.ua", "Unlearning accuracy",
                   f"share of the concept's images that CLIP does not call {target!r}", True,
                   where(samples, seen, "forget", lambda s, line: line["best"] != target)),
            Column("clip.ra", "Retained accuracy",
                   "share of the alternatives' images that CLIP calls by their own label", True,
                   where(samples, seen, "retain", lambda s, line: line["best"] == s.label)),
        ]  # fmt: skip
        by_label = [[sample.label] if sample.role == "retain" else [] for sample in samples]
        groups = [Group("alternatives", "Retained, by alternative", "clip.ra", by_label)]
        return Plan(present(columns), groups, "clip.ua", "clip.ra", [False] * len(samples))
