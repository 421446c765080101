"""Tasks by name: one a file in this folder, and those of other packages (entry points `erase.tasks`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from erase.concepts import Concept
from erase.errors import EraseError
from erase.evaluation.options import Options
from erase.evaluation.tasks.protocol import Sample, SampleSet, Task
from erase.registry import Registry, in_folder

TASKS: Registry[Task] = Registry(
    "task", base=Task, group="erase.tasks", own=in_folder("erase.evaluation.tasks", Path(__file__).parent)
)


def make(name: str) -> Task:
    """The task of this name.

    Raises:
        EraseError: there is none, or it cannot be loaded.
    """
    return TASKS.load(name)(name)


def stated(name: str, where: str) -> Task:
    """The task that a file names; see `Registry.stated`."""
    return TASKS.stated(name, where)(name)


def build(
    name: str, concept: Concept | None, options: Options | None = None, also_erased: Sequence[Concept] = ()
) -> SampleSet:
    """The samples of the task of this name, for a concept.

    also_erased: other concepts that were erased from the model; samples that ask for them are left out.

    Raises:
        EraseError: unknown task, a concept that the task cannot judge, or prompts that cannot be read.
    """
    options, task = options or Options(), make(name)
    task.concept_needed(concept)
    built = task.build(concept, options)
    if also_erased:
        kept = tuple(s for s in built.samples if s.role != "retain" or not any(_shows(s, one) for one in also_erased))
        named = sorted(one.name for one in also_erased)
        built = replace(built, samples=kept, options={**built.options, "also_erased": named})
    if options.limit is not None:
        chosen = _spread(built.samples, options.limit)
        built = replace(built, samples=chosen, options={**built.options, "limit": options.limit})
    return built


def _shows(sample: Sample, concept: Concept) -> bool:
    """Whether a sample asks for a concept, by what the concept's judge looks for."""
    judge = concept.judge
    wanted = {"mini": judge.get("label"), "imagenet": judge.get("index"), "clip": judge.get("target")}
    wanted["classes"] = judge.get("label")
    asked = {
        "mini": sample.facts.get(judge.get("head", "")),
        "imagenet": sample.facts.get("index"),
        "clip": sample.label,
        "classes": sample.label,
    }
    kind = judge.get("type")
    return kind in wanted and asked[kind] == wanted[kind]


def _spread(samples: Sequence[Sample], num: int) -> tuple[Sample, ...]:
    """`num` samples, evenly from the whole list, so that every role and class stays in it."""
    if num < 1:
        raise EraseError(f"--limit is {num}; it must be at least 1")
    num = min(num, len(samples))
    return tuple(samples[i * len(samples) // num] for i in range(num))
