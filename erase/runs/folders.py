"""A run folder: begin it, find the same run in it, clear it, finish it, and verify its files against run.json."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from erase import files
from erase.errors import EraseError
from erase.runs import record as run_json
from erase.runs.identity import differences
from erase.runs.record import DELTA, RunRecord, Started

RECORD = "run.json"
MASK, UNET, LORA = (
    "mask.safetensors",
    "unet.safetensors",
    "pytorch_lora_weights.safetensors",
)
SAMPLES, CARD = "samples.png", "README.md"
KNOWN = (DELTA, MASK, UNET, LORA, SAMPLES, CARD, "model_index.json", "erase_defaults.json")


def read(folder: Path) -> Started | RunRecord:
    """The record of a run, of any format; see `record.read`."""
    return run_json.read(folder / RECORD)


def read_finished(folder: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        EraseError: it is no run folder, the run is not finished, or see `record.read`.
    """
    if not (folder / RECORD).is_file():
        raise EraseError(f"{folder} is not a run folder (it has no {RECORD}); give the output of a run")
    found = read(folder)
    if isinstance(found, Started):
        raise EraseError(f"{folder} holds an unfinished run; repeat its command first")
    return found


def begin(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    outputs: Iterable[str],
    default: Callable[[str], Any],
    overwrite: bool = False,
    resume: bool = False,
) -> Started | RunRecord:
    """Make the run folder with the record of a started run, or find this very run in it; returns the record.

    outputs: names of the files that the run will write.

    Raises:
        EraseError: the folder holds another run or other files, a link to a folder lies in it, or `resume` finds
            nothing to continue.
    """
    path = folder / RECORD
    started = Started(identity, tuple(sorted(outputs)))
    if path.is_file():
        files.refuse_links(folder)
        record = read(folder)
        if overwrite:
            clear(folder, record)
        else:
            different = differences(record.identity, identity, default)
            if different:
                raise EraseError(
                    f"{folder} holds another run (it differs in {', '.join(different)}); "
                    "choose another --output, or --overwrite to delete it"
                )
            return record
    elif folder.exists() and (not folder.is_dir() or any(not files.is_partial(left) for left in folder.iterdir())):
        hint = "delete it yourself if you mean it" if overwrite else "choose another --output"
        raise EraseError(f"{folder} exists and is not a run folder (it has no {RECORD}); {hint}")
    if resume:
        raise EraseError(f"--resume, but {folder} holds no unfinished run; leave it out to start one")
    run_json.write(path, started)
    return started


def clear(folder: Path, record: Started | RunRecord) -> None:
    """Delete what a run made in its folder, except the record itself; any other file stays."""
    files.refuse_links(folder)
    own = [folder / name for name in (*_names(record), *KNOWN)]
    for path in own:
        files.partial(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for made in (folder / "work", folder / "logs" / "erase-concept"):
        if made.is_dir():
            shutil.rmtree(made)
    for parent in sorted({path.parent for path in own} | {folder / "logs"}, reverse=True):
        if parent != folder and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def finish(folder: Path, record: RunRecord, outputs: Iterable[str]) -> RunRecord:
    """Write the record of a finished run with the hashes of its files; returns it.

    Temporary files that an interrupted command left beside them are deleted.
    """
    for path in [path for path in folder.rglob(".*.partial") if path.is_file()]:
        path.unlink()
    hashes = {name: files.file_hash(folder / name) for name in sorted(outputs) if (folder / name).is_file()}
    finished = record.finished or datetime.now(UTC).isoformat(timespec="seconds")
    record = replace(record, finished=finished, files=hashes)
    run_json.write(folder / RECORD, record)
    return record


def verify(folder: Path, record: RunRecord) -> None:
    """Nothing, if the files of a finished run are those that it wrote; its README.md and samples.png may be edited.

    Raises:
        EraseError: some are missing or were altered; the message names them.
    """
    problems = []
    for name, digest in record.files.items():
        path = folder / name
        if name in (SAMPLES, CARD):
            continue
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif files.file_hash(path) != digest:
            problems.append(f"{name} was altered")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        told = f"{folder} holds a run that was finished{when(record)}, but {', '.join(problems[:3])}{more}"
        raise EraseError(f"{told}; bring the files back, or make them again with --overwrite")


def when(record: RunRecord) -> str:
    """ " on 2026-03-01 12:00 UTC", or "" where the record does not say."""
    return "" if record.finished is None else f" on {datetime.fromisoformat(record.finished):%Y-%m-%d %H:%M} UTC"


def _names(record: Started | RunRecord) -> list[str]:
    """The files of a run by its record.

    Raises:
        EraseError: a name leads out of the folder.
    """
    names = list(record.outputs if isinstance(record, Started) else record.files)
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise EraseError(f"{RECORD} is damaged: it names the file {name!r}")
    return names
