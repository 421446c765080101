"""A run folder's record, run.json: which run it holds, whether it is whole, and which files are the run's own."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from erase import files
from erase.concepts import Concept
from erase.errors import EraseError
from erase.options.declare import MIXED_PRECISION, flag
from erase.options.settings import Settings

RECORD = "run.json"
FORMAT = 2  # 1, which had no number, is what version 0.1.0 wrote
DELTA, MASK, UNET, LORA = (
    "delta.safetensors",
    "mask.safetensors",
    "unet.safetensors",
    "pytorch_lora_weights.safetensors",
)
SAMPLES, CARD = "samples.png", "README.md"
KNOWN = (DELTA, MASK, UNET, LORA, SAMPLES, CARD, "model_index.json", "erase_defaults.json")

# Settings that do not decide the weights, or that the rest of an identity holds in another form.
_FREE = {"unet", "concept", "kind", "forget", "anchor", "retain", "model", "base", "config", "revision", "allow_pickle"}
_FREE |= {"output", "save", "lora_rank", "num_samples", "overwrite", "resume", "device", "cache_dir", "report_to"}
_FREE |= {"checkpointing_steps", "low_memory"}


def identity(
    settings: Settings,
    concepts: Sequence[Concept],
    *,
    base_hash: str,
    mask_hash: str | None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What decides the weights of a run, and nothing else; two runs of the same identity are one.

    settings: resolved. concepts: the one that is trained, then its parts. base: the earlier run's account of itself.
    """
    of = {
        "format": FORMAT,
        "base_hash": base_hash,
        "concept": _prompts_hash([asdict(concept) for concept in concepts]),
        "settings": _deciding(asdict(settings), mask_hash),
        "mask": mask_hash,
    }
    return of if base is None else {**of, "base": dict(base)}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], default: Callable[[str], Any]) -> list[str]:
    """Names of what two identities disagree about, as a user knows them.

    default: the value that a setting has without its option; an identity that lacks the setting was made with it.
    """
    names = {"base_hash": "the model", "concept": "concept", "mask": "mask", "base": "--base"}
    different = [told for name, told in names.items() if there.get(name) != here.get(name)]
    old, new = there["settings"], here["settings"]
    for name in dict.fromkeys([*new, *old]):
        if name not in new:
            is_same = old[name] in (None, False, [], "no")  # an option that there is no longer, and that was not used
        else:
            is_same = _plain(old[name] if name in old else default(name)) == _plain(new[name])
        different += [] if is_same else [flag(name)]
    return different


def read(folder: Path) -> dict[str, Any]:
    """The record of a run, of any format, in today's.

    Raises:
        EraseError: it cannot be read, is no run's, or is of a later version.
    """
    path = folder / RECORD
    record = files.read_json(path)
    if record.get("status") not in ("running", "done") or not isinstance(record.get("identity"), dict):
        raise EraseError(f"{path} is not the record of an erasure; choose another folder")
    found = record["identity"].get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
        raise EraseError(f"{path} has format {found}, which a later version wrote; this one reads up to {FORMAT}")
    try:
        if found == 1:
            record = {**record, "identity": _from_format_1(record)}
        _require_types(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EraseError(f"{path} is damaged ({error!r}); delete {folder} or choose another --output") from error
    return record


def begin(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    outputs: Iterable[str],
    default: Callable[[str], Any],
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Make the run folder with a record that says "running", or find this very run in it; returns the record.

    outputs: names of the files that the run will write.

    Raises:
        EraseError: the folder holds another run or other files, a link to a folder lies in it, or `resume` finds
            nothing to continue.
    """
    path = folder / RECORD
    running = {"status": "running", "identity": dict(identity), "outputs": sorted(outputs)}
    if path.is_file():
        files.refuse_links(folder)
        record = read(folder)
        if overwrite:
            clear(folder, record)
        else:
            different = differences(record["identity"], identity, default)
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
    files.write_json(path, running)
    return running


def clear(folder: Path, record: Mapping[str, Any]) -> None:
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


def finish(folder: Path, record: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
    """Write the record of a run that is done, with the hashes of its files; returns it.

    Temporary files that an interrupted command left beside them are deleted.
    """
    for path in [path for path in folder.rglob(".*.partial") if path.is_file()]:
        path.unlink()
    hashes = {name: files.file_hash(folder / name) for name in sorted(outputs) if (folder / name).is_file()}
    finished = record.get("finished") or datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(folder / RECORD, {**record, "status": "done", "finished": finished, "files": hashes})
    return files.read_json(folder / RECORD)


def verify(folder: Path, record: Mapping[str, Any]) -> None:
    """Nothing, if the files of a finished run are those that it wrote; its README.md and samples.png may be edited.

    Raises:
        EraseError: some are missing or were altered; the message names them.
    """
    problems = []
    for name, digest in record["files"].items():
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


def when(record: Mapping[str, Any]) -> str:
    """ " on 2026-03-01 12:00 UTC", or "" where the record does not say."""
    finished = record.get("finished")
    return "" if finished is None else f" on {datetime.fromisoformat(finished):%Y-%m-%d %H:%M} UTC"


def _names(record: Mapping[str, Any]) -> list[str]:
    """The files of a run by its record.

    Raises:
        EraseError: a name leads out of the folder.
    """
    names = [*record.get("outputs", ()), *record.get("files", ())]
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise EraseError(f"{RECORD} is damaged: it names the file {name!r}")
    return names


def _deciding(settings: Mapping[str, Any], mask_hash: str | None) -> dict[str, Any]:
    decide = {name: value for name, value in settings.items() if name not in _FREE}
    return decide | ({} if mask_hash is None else {"mask": "file"})  # its hash decides, not its path


def _prompts_hash(concepts: Sequence[Mapping[str, Any]]) -> str:
    """Of what is trained on; names, judges and synonyms do not decide the weights."""
    return files.text_hash([[concept[key] for key in ("forget", "anchor", "retain", "others")] for concept in concepts])


def _from_format_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a run of version 0.1.0; an unfinished one does not say what its concept is."""
    old = record["identity"]
    settings = {name: value for name, value in old["settings"].items() if name != "mixed_precision"}
    settings["precision"] = MIXED_PRECISION[old["settings"].get("mixed_precision", "no")]
    concepts = [record["concept"], *record["concepts"]] if "concept" in record else None
    return {
        **old,
        "format": FORMAT,
        "concept": concepts and _prompts_hash(concepts),
        "settings": _deciding(settings, old["mask"]),
    }


def _require_types(record: Mapping[str, Any]) -> None:
    """Raise a TypeError, KeyError or ValueError for a record that lacks what readers rely on."""
    is_done = record["status"] == "done"
    needs: list[tuple[Any, type]] = [(record["identity"]["settings"], dict), (record["identity"]["base_hash"], str)]
    if is_done:
        needs += [(record[name], dict) for name in ("files", "settings", "model", "weights", "seconds")]
        needs += [(record["model"][name], str) for name in ("name", "base_hash", "result_hash")]
        needs += [(value, str) for value in record["files"].values()]
        needs += [(record["weights"][name], int) for name in ("total", "changed")]
        needs += [(record["files"][DELTA], str)]  # every run has one
        if "finished" in record:
            datetime.fromisoformat(record["finished"])
    else:
        needs += [(name, str) for name in record.get("outputs", ())]
    for value, kind in needs:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:40]!r} is no {kind.__name__}")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
