"""Judges by name: one a file in this folder, and those of other packages (entry points `erase.judges`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.evaluation.judges.protocol import Assignment, Judge
from erase.evaluation.tasks import registry as tasks
from erase.registry import Registry, in_folder

JUDGES: Registry[Judge] = Registry(
    "judge", base=Judge, group="erase.judges", own=in_folder("erase.evaluation.judges", Path(__file__).parent)
)


def make(name: str, task: Mapping[str, Any], *, source: str | None = None, device: str = "cpu") -> Judge:
    """The judge of this name for a task.

    task: its id and options, as `SampleSet.identity` has them. source: the judge's weights, a hub id, folder or file;
        None for its default.

    Raises:
        EraseError: unknown name, its package or weights are missing, or it cannot judge the task's concept.
    """
    classes = tasks.stated(task["id"], "the task of these images").imagenet_classes
    judge = JUDGES.load(name).make(Assignment(task["options"], classes, source, device))
    judge.name = name
    return judge


def sources(given: Sequence[str]) -> dict[str, str]:
    """--judge-model, each PATH (for every judge of the task) or JUDGE=PATH, as a source for each judge."""
    found: dict[str, str] = {}
    names = JUDGES.names()
    for text in given:
        name, equals, path = text.partition("=")
        found |= {name: path} if equals and (name in names or ":" in name) else dict.fromkeys(names, text)
    return found
