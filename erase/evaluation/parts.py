"""Tasks, judges and attacks of other packages that a folder was made with, loaded because the user names them."""

import argparse
from pathlib import Path

from erase.commandline import Parser
from erase.errors import EraseError
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.judges.registry import JUDGES
from erase.evaluation.tasks.registry import TASKS

REGISTRIES = {"task": TASKS, "judge": JUDGES, "attack": ATTACKS}


def part_options(parser: Parser, *kinds: str) -> None:
    """An option for each kind of `REGISTRIES`; a folder does not choose the modules that are imported."""
    for kind in kinds:
        text = f"{kind} of another package, if the folder was made with one; may be repeated"
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="MODULE:CLASS", help=text)


def load_parts(folder: Path, given: argparse.Namespace, *kinds: str) -> None:
    """Import the parts that the options of `part_options` name.

    Raises:
        EraseError: the folder was made without such a part, or it cannot be loaded.
    """
    for kind in kinds:
        for name in getattr(given, kind):
            used = _used(folder)[kind]
            if name not in used:
                raise EraseError(f"{folder} has no {kind} {name}" + (f"; it has {', '.join(used)}" if used else ""))
            REGISTRIES[kind].load(name)


def _used(folder: Path) -> dict[str, list[str]]:
    """The names of the parts that a folder was made with."""
    from erase.evaluation import arm, score

    task = arm.manifest(folder)["task"]
    attack, judge = task["options"].get("attack"), task["options"].get("judge")
    judges = [*score.scored_by(folder), *task.get("judges", []), *([judge] if judge else [])]
    return {"task": [task["id"]], "judge": list(dict.fromkeys(judges)), "attack": [attack] if attack else []}
