"""Kill a command before each of its file-system events, repeat it, and compare what it leaves with an undisturbed run.

The command runs in forks of one process that has imported everything, so that hundreds of kills take minutes.
As a program it reads a `Job` as JSON from standard input and prints a report as JSON.
"""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# events that Python reports before they happen; os.replace is a rename
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# what two undisturbed runs do not agree about either
TIMES = {"finished", "seconds", "peak_memory_bytes", "command"}


@dataclass(frozen=True)
class Job:
    """A command and the folders that it writes to.

    module, arguments: `module.main(arguments)` is the command. folders: whatever is below them counts and is compared.
    start: folder with their content before the command, under their names; None for nothing.
    every: kill at each n-th event only, beginning with the `first`.
    """

    module: str
    arguments: list[str]
    folders: list[str]
    start: str | None = None
    every: int = 1
    first: int = 0
    environment: dict[str, str] | None = None


@dataclass(frozen=True)
class Report:
    """events: of an undisturbed run. kills: how many runs were killed. failures: what was wrong after a repetition."""

    events: list[str]
    kills: int
    failures: list[str]


def sweep(job: Job) -> Report:
    """Run the job in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(job.environment or {})}
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return Report(**json.loads(done.stdout.splitlines()[-1]))


def run(job: Job) -> Report:
    """The sweep itself, in this process, which must not have trained anything: autograd does not survive a fork."""
    command = importlib.import_module(job.module).main
    code, events, said = _fork(job, command)
    assert code == 0, said
    expected, kills, failures = tree(job.folders), 0, []
    for number in range(job.first, len(events), job.every):
        code, _, said = _fork(job, command, kill_at=number)
        if code != -signal.SIGKILL:
            failures.append(f"{number}: ended with {code} before its {events[number]}: {said[-300:]}")
            continue
        kills += 1
        code, _, said = _fork(job, command, again=True)
        found = tree(job.folders)
        if code != 0:
            failures.append(f"killed before {number} ({events[number]}), repeated: exit code {code}: {said[-600:]}")
        elif found != expected:
            names = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            failures.append(f"killed before {number} ({events[number]}), repeated: differs in {sorted(names)[:5]}")
    return Report(events, kills, failures)


def tree(folders: list[str]) -> dict[str, str]:
    """The hash of every file, without times; folders have an empty one."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            found[str(path)] = "" if path.is_dir() else hashlib.sha256(_timeless(path)).hexdigest()
    return found


def _timeless(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    return json.dumps(_without_times(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _fork(
    job: Job, command: Callable[[list[str]], Any], *, kill_at: int | None = None, again: bool = False
) -> tuple[int, list[str], str]:
    """Run the command in a child: its exit code (minus the signal's number), its events, and what it printed."""
    if not again:
        for folder in map(Path, job.folders):
            shutil.rmtree(folder, ignore_errors=True)
            if job.start and (Path(job.start) / folder.name).is_dir():
                shutil.copytree(Path(job.start) / folder.name, folder, symlinks=True)
    read_end, write_end = os.pipe()
    with open(os.devnull) as nothing, os.fdopen(read_end) as reading:
        child = os.fork()
        if child == 0:
            os.close(read_end)
            for number in (1, 2):
                os.dup2(write_end, number)
            os.dup2(nothing.fileno(), 0)
            _child(job, command, kill_at, write_end)
        os.close(write_end)
        lines = reading.read().splitlines()
        _, status = os.waitpid(child, 0)
    events = [line.removeprefix("EVENT ") for line in lines if line.startswith("EVENT ")]
    return os.waitstatus_to_exitcode(status), events, "\n".join(line for line in lines if not line.startswith("EVENT "))


def _child(job: Job, command: Callable[[list[str]], Any], kill_at: int | None, out: int) -> None:
    count = 0

    def event(name: str, path: str) -> None:
        nonlocal count
        if kill_at is None:
            os.write(out, f"EVENT {name} {path}\n".encode())
        elif count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name != "open" and name not in CHANGES:
            return
        if not arguments or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        if not os.path.isabs(path) or any(path.startswith(folder) for folder in parents):
            event(name, path)

    parents = {os.path.dirname(os.path.abspath(folder)) for folder in job.folders}
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        event("os.fsync", "")
        flush(descriptor)

    code = 1
    try:
        os.fsync = fsync
        sys.addaudithook(watch)
        command(job.arguments)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).parent.parent))
    import torch

    torch.set_num_threads(1)
    for name in ("erase.runs.job", "erase.runs.forms", "erase.cli"):
        importlib.import_module(name)
    print(json.dumps(asdict(run(Job(**json.load(sys.stdin))))))
