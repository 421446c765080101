"""What a part of eval/on_gpu.py is given, and the JSON file of its figures."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent

Part = Iterator[dict[str, Any]]  # figures, as soon as there are some


@dataclass(frozen=True)
class Job:
    """What every part is given.

    work: a folder for models and runs, 20 GB. toy: sizes at which a CPU takes seconds. ends: when the part is stopped,
    as `time.monotonic()`. cifar10: a folder with CIFAR-10's images. known: figures of the part from an earlier slice,
    which are not measured again.
    """

    output: Path
    work: Path
    device: str
    toy: bool
    ends: float
    cifar10: Path
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return max(1.0, self.ends - time.monotonic())

    @property
    def model_name(self) -> str:
        return "toy, random weights" if self.toy else "SD v1.4, random weights"

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def cli(self, *arguments: Any, module: str = "erase.cli") -> dict[str, Any]:
        """Run a command as a user does; raises with its last line when it fails."""
        return self.process([sys.executable, "-m", module, *map(str, arguments)])

    def process(self, command: Sequence[str]) -> dict[str, Any]:
        """Wall seconds of a process that ends with exit code 0."""
        start = time.monotonic()
        done = self.try_process(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}: {last_line(done.stderr)}")
        return {"wall_seconds": round(time.monotonic() - start, 2)}

    def try_process(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        how: dict[str, Any] = {"env": offline(), "cwd": REPOSITORY, "timeout": self.seconds_left}
        return subprocess.run(list(command), capture_output=True, text=True, **how)


class Report:
    """The JSON file: {"parts": {name: figures}}; each `put` is on the disk when it returns, whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"parts": {}}

    def put(self, part: str, **figures: Any) -> None:
        from erase import files

        content = self.read()
        content["parts"].setdefault(part, {}).update(figures)
        files.write_json(self.path, content)
        print(f"{part:12} {json.dumps(figures)[:400]}", flush=True)

    def begin(self, part: str, *, anew: bool) -> None:
        """Forget what an earlier call found out about the part; if not `anew`, only that it failed or was stopped."""
        from erase import files

        content = self.read()
        kept = {} if anew else content["parts"].pop(part, {})
        content["parts"][part] = {name: kept[name] for name in kept if name not in ("error", "part_seconds")}
        files.write_json(self.path, content)

    def known(self, part: str) -> dict[str, Any]:
        """The part's figures, without those that are only an error."""
        figures = self.read()["parts"].get(part, {})
        return {name: value for name, value in figures.items() if not (isinstance(value, dict) and "error" in value)}

    def is_finished(self, part: str) -> bool:
        found = self.read()["parts"].get(part, {})
        return "part_seconds" in found and "error" not in found


def offline() -> dict[str, str]:
    """The environment of every process: this repository on PYTHONPATH, and no attempt to reach the hub."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no output"


def judged(value: float, limit: float) -> dict[str, Any]:
    """A figure that should be at most `limit`; of the real model on a GPU only."""
    return {"value": rounded(value), "target": limit, "is_met": value <= limit}


def fresh(folder: Path) -> Path:
    """The folder's path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: float) -> float:
    return float(f"{value:.4g}")
