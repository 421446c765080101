"""`eval-concept list`: the tasks, the judges and the attacks."""

from erase.commandline import Parser
from erase.evaluation.attacks.registry import ATTACKS
from erase.evaluation.judges import registry as judging
from erase.evaluation.tasks.registry import TASKS


def run(arguments: list[str]) -> None:
    Parser("eval-concept list", "Show all tasks, judges and attacks, also those of other packages.").parse_args(
        arguments
    )
    parts = {
        "tasks": {f"{name}@{TASKS.load(name).version}": TASKS.load(name).about for name in TASKS.names()},
        "judges": {name: judging.JUDGES.load(name).about for name in judging.JUDGES.names()},
        "attacks": {name: ATTACKS.load(name).about for name in ATTACKS.names()},
    }
    for kind, lines in parts.items():
        print(f"{kind}:")
        for name, about in lines.items():
            print(f"  {name:16} {about}")
