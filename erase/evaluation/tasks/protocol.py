"""The contract of a task: the samples to generate, and the figures from its judges' outputs."""
# pyright: strict

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from erase import files
from erase.concepts import Concept, refusal
from erase.errors import EraseError
from erase.evaluation.options import Options
from erase.evaluation.plan import Column, Lines, Plan

IMAGES_VERSION = 2  # of the task images, whose folders `arm.adopt` makes


@dataclass(frozen=True)
class Sample:
    """One image to generate.

    id: stable name, unique in its task. role: "forget", "synonym", "retain", or "" for own prompts. label: what the
    prompt asks for, in the judge's words. cluster: for intervals; samples of one prompt are one cluster.
    guidance, height, width: None for the task's own. facts: further values for groups and figures.
    """

    id: str
    prompt: str
    seed: int
    role: str
    label: str = ""
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    @property
    def cluster(self) -> str:
        return self.prompt

    @property
    def run(self) -> str:
        """The run of an attack that the image belongs to; "" without an attack."""
        return str(self.facts.get("attack_seed", ""))


@dataclass(frozen=True)
class SampleSet:
    """A fixed list of samples and the judges that its figures need.

    judges: empty for tasks that leave the choice to the user. options: the options that it was built from; part of the
    protocol. steps, guidance: None for the model's own.
    note: a line for the user about a prompt file that was read; not part of the identity.
    """

    id: str
    version: int
    options: Mapping[str, Any]
    samples: tuple[Sample, ...]
    judges: tuple[str, ...]
    steps: int | None = None
    guidance: float | None = None
    refused: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if not self.samples:
            raise EraseError(f"the task {self.id} has no sample with these options ({dict(self.options)})")
        refusal.refuse([sample.prompt for sample in self.samples], f"the task {self.id}")
        ids = [sample.id for sample in self.samples]
        assert len(set(ids)) == len(ids), "sample ids must be unique"

    def identity(self) -> dict[str, Any]:
        """Everything that must be equal for results to be comparable: prompts, seeds and options."""
        return {
            "id": self.id,
            "version": self.version,
            "options": dict(self.options),
            "num_samples": len(self.samples),
            "refused": self.refused,
            "judges": list(self.judges),
            "prompts_hash": files.text_hash([asdict(sample) for sample in self.samples]),
        }


def seed_of(task: str, sample: str, image: int = 0) -> int:
    """A seed in [0, 2^32) that depends on the arguments only."""
    digest = hashlib.sha256(f"{task}/{sample}/{image}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class Task(ABC):
    """A task: it builds the samples for a concept, and computes outcomes from the judges' outputs.

    name: the name that the task is registered under; its id in files.
    """

    about: ClassVar[str] = ""  # one line for `eval-concept list`
    version: ClassVar[int] = 1  # raise it with every change that could change a figure
    judges: ClassVar[tuple[str, ...]] = ()  # names of the judges that it needs; empty: the user chooses with --judge
    steps: ClassVar[int | None] = None  # sampling steps; None: the model's own
    guidance: ClassVar[float | None] = None  # for samples without their own; None: the model's own
    concept_judges: ClassVar[tuple[str, ...]] = ()  # types of `Concept.judge` that it accepts; empty: needs no concept
    imagenet_classes: ClassVar[tuple[int, ...]] = ()  # classes that an ImageNet classifier must have
    limits: ClassVar[tuple[str, ...]] = ()  # sentences for the report: what this task does not test

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def build(self, concept: Concept | None, options: Options) -> SampleSet:
        """The samples for a concept. Use `sample_set` for the result.

        concept: one that fits `concept_judges`; None if the task needs none and none is given.

        Raises:
            EraseError: an option is wrong, or prompts cannot be read.
        """

    @abstractmethod
    def plan(self, samples: Sequence[Sample], lines: Lines, options: Mapping[str, Any]) -> Plan:
        """The outcome columns of the samples, and which of them decide the verdict.

        lines: each judge's output for each sample. That of an invalid image has only "invalid"; it is never a success.
        options: those of the sample set.
        """

    def recorded(
        self, samples: Sequence[Sample], records: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> list[Column]:
        """Columns of figures that were recorded when the images were generated; none by default.

        records: of each sample; empty ones before there are images.
        """
        return []

    def limits_of(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Sentences for the report: what these samples do not test. options: those of the sample set."""
        return self.limits

    def options_shape(self) -> dict[str, Any]:
        """The shape of the options that `plan` needs (see `shapes`); checked when they are read from a file."""
        return {"*": Any}

    def sample_set(
        self,
        samples: Sequence[Sample],
        options: Mapping[str, Any],
        *,
        judges: tuple[str, ...] | None = None,
        refused: int = 0,
        note: str = "",
    ) -> SampleSet:
        """These samples as this task's.

        judges: None for the task's. refused: prompts that were left out. note: see `SampleSet`.
        """
        judges = self.judges if judges is None else judges
        made = tuple(samples)
        return SampleSet(self.name, self.version, options, made, judges, self.steps, self.guidance, refused, note)

    def concept_needed(self, concept: Concept | None) -> None:
        """Raise an EraseError if the task needs a concept and this is none that it can judge."""
        if not self.concept_judges:
            return
        if concept is None:
            raise EraseError(
                f"the task {self.name} needs a concept: give --concept NAME, or as the model a run folder, "
                "whose run.json names it"
            )
        kind = concept.judge.get("type")
        if kind not in self.concept_judges:
            raise EraseError(
                f"the task {self.name} cannot judge {concept.name!r}, whose judge is {kind!r} "
                f"and not {' or '.join(map(repr, self.concept_judges))}; eval-concept list shows the tasks"
            )


def where(
    samples: Sequence[Sample],
    lines: Sequence[Mapping[str, Any]],
    role: str,
    holds: Callable[[Sample, Mapping[str, Any]], bool],
) -> list[bool | float | None]:
    """Whether it holds, for samples of a role; never for an invalid image, None for other roles."""
    return [
        (not line["invalid"] and holds(sample, line)) if sample.role == role else None
        for sample, line in zip(samples, lines, strict=True)
    ]


def is_kept(sample: Sample) -> bool:
    """Whether its image should stay as the base's is, as far as the task knows."""
    return sample.role not in {"forget", "synonym"}
