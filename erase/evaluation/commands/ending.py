"""How commands end: the line that was typed, exit code 3, and notes."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def typed() -> str:
    """The command as it was typed, for reports."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def require(results: Sequence[dict[str, Any]], requirements: Sequence[str]) -> None:
    """Say that all rules of --require are met, or end with exit code 3 and a line for each one that is not."""
    from erase.evaluation import gate

    failures = gate.unmet_of_all(results, requirements)
    for line in failures:
        print(f"eval-concept: {line}", file=sys.stderr)
    if failures:
        raise SystemExit(3)
    if requirements:
        note(f"--require is met: {', '.join(requirements)}")


def note(text: str) -> None:
    """A line for the user, on stderr."""
    print(f"eval-concept: {text}", file=sys.stderr)
