"""One model's stored images for one task: which exist, which are missing, and whether they match their records.

    manifest.json    identity: task, model hashes, effective generation settings; with another one work is not continued
    samples.jsonl    what was to be generated, a line a sample
    records-*.jsonl  what was generated, a line per image, one file a process; each line follows its whole image
    images/          PNG
    scores/          <judge>.json (identity) and <judge>.jsonl (raw outputs, a line an image)

Nothing here depends on the clock, so an interrupted and continued folder is the uninterrupted one, byte for byte.
"""

import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from erase import files
from erase.data import captions, images
from erase.errors import EraseError
from erase.evaluation import shapes
from erase.evaluation.jsonl import Appender, read_lines
from erase.evaluation.tasks.protocol import IMAGES_VERSION, Sample

MANIFEST = "manifest.json"
_TASK = {"id": str, "version": int, "options": {"*": Any}, "num_samples": int, "prompts_hash": str}
_MANIFEST = {"task": {**_TASK, "refused?": int, "judges?": [str]}, "model": {"*": str}, "generation": {"*": Any}}
_SAMPLE = {**typing.get_type_hints(Sample), "facts": {"*": Any}}
_RECORD = {
    "id": str,
    "file": (str, None),
    "sha256": (str, None),
    "invalid": (str, None),
    "measured?": {"*": (float, None)},
    "*": Any,
}
_OWN = re.compile(r"\.|manifest\.json|samples\.jsonl|records-|images$")


def open_arm(folder: Path, identity: Mapping[str, Any], samples: Iterable[Sample]) -> None:
    """Make the folder of an arm, or find this very arm in it.

    Raises:
        EraseError: it holds another one; the message names the fields that differ.
    """
    identity = json.loads(json.dumps(identity))
    path = folder / MANIFEST
    check_arm(folder, identity)
    if path.exists():
        return
    files.write_text(folder / "samples.jsonl", "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    files.write_json(path, identity)


def check_arm(folder: Path, identity: Mapping[str, Any]) -> None:
    """Whether an arm of this identity can be made or continued in the folder; nothing is written.

    Raises:
        EraseError: it holds another one, or something else.
    """
    if (folder / MANIFEST).exists():
        different = differences(manifest(folder), json.loads(json.dumps(identity)))
        if different:
            raise EraseError(f"{folder} holds other images ({'; '.join(different)}); choose another --output")
    # without a manifest there may be what a killed process, or one that starts beside this one, has made so far
    elif folder.exists() and not (folder.is_dir() and all(_OWN.match(path.name) for path in folder.iterdir())):
        raise EraseError(f"{folder} exists and is no evaluation folder; choose another --output")


def manifest(folder: Path) -> dict[str, Any]:
    """The arm's identity.

    Raises:
        EraseError: there is none, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise EraseError(
            f"{folder} is no evaluation folder (it has no {MANIFEST}); make one with eval-concept generate"
        )
    found = files.read_json(folder / MANIFEST)
    shapes.check(found, _MANIFEST, f"{folder / MANIFEST}: manifest")
    return found


def samples(folder: Path) -> list[Sample]:
    """What was to be generated, in the task's order."""
    found = [Sample(**line) for line in read_lines(folder / "samples.jsonl", _SAMPLE)]
    stated = manifest(folder)["task"]
    if files.text_hash([asdict(sample) for sample in found]) != stated["prompts_hash"]:
        raise EraseError(
            f"{folder / 'samples.jsonl'} was changed: its hash is not the manifest's; generate its images again"
        )
    return found


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What was generated, by sample id; of a sample that was generated again after damage, the last line."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        found |= {line["id"]: line for line in read_lines(path, _RECORD)}
    for record in found.values():
        if "\0" in (record["file"] or ""):
            raise EraseError(
                f"{folder}: the record of {record['id']} names no file; records are damaged; generate its images again"
            )
    return found


def missing(folder: Path) -> list[Sample]:
    """Samples that have no record, or whose file is gone or not what its record says."""
    drawn = records(folder)
    return [sample for sample in samples(folder) if not _is_whole(folder, drawn.get(sample.id))]


def _is_whole(folder: Path, record: Mapping[str, Any] | None) -> bool:
    if record is None:
        return False
    if record["file"] is None:
        return True
    path = image_path(folder, record)
    return path.is_file() and files.file_hash(path) == record["sha256"]


def complete_records(folder: Path) -> list[dict[str, Any]]:
    """The records in the samples' order.

    Raises:
        EraseError: records are missing, or belong to unknown samples.
    """
    drawn, wanted = records(folder), [sample.id for sample in samples(folder)]
    absent = [name for name in wanted if name not in drawn]
    if absent:
        raise EraseError(
            f"{folder}: {len(absent)} of {len(wanted)} images are not generated yet; run eval-concept generate again"
        )
    foreign = drawn.keys() - set(wanted)
    if foreign:
        raise EraseError(f"{folder} has records of unknown samples ({min(foreign)}); generate its images again")
    return [drawn[name] for name in wanted]


def image_path(folder: Path, record: Mapping[str, Any]) -> Path:
    """The path of an image: inside the arm if it was generated, absolute if it is in a folder of the user."""
    return folder / record["file"]


def read_image(folder: Path, record: Mapping[str, Any]) -> tuple[np.ndarray | None, str | None]:
    """Pixels, uint8 [h, w, 3], and why the image is invalid; one of the two is None.

    Black, flat, broken and never finished images are an outcome of their own, never "safe".
    """
    if record.get("invalid"):
        return None, record["invalid"]
    try:
        pixels = images.read(image_path(folder, record))
    except images.BadImage as error:
        return None, error.reason
    reason = images.invalid_reason(pixels)
    return (None, reason) if reason else (pixels, None)


def adopt(source: Path, folder: Path, options: Mapping[str, Any] | None = None) -> None:
    """Make an arm of a user's folder of images, so that it can be scored like any other; the images are not moved.

    Captions, where the folder has them (captions.py), are the prompts. options: what judges need (`tasks.judged`).

    Raises:
        EraseError: no such folder, no image, or files in it that are no images.
    """
    from erase.data.sources import list_images

    if not source.is_dir():
        raise EraseError(f"{source}: no such folder of images")
    known = captions.files_of(source)
    foreign = [
        path.relative_to(source).as_posix()
        for path in images.list_files(source)
        if path.suffix.lower() not in images.SUFFIXES and path not in known
    ]
    if foreign:
        raise EraseError(f"{source} holds files that are no images ({foreign[0]}); remove them or name a subfolder")
    found, lines = [], []
    for image, text in list_images(str(source)):
        assert image.path is not None
        name = image.path.relative_to(source).as_posix()
        found.append(Sample(name, text or "", 0, ""))
        record = {"id": name, "file": str(image.path.resolve()), "sha256": files.file_hash(image.path)}
        lines.append(record | {"invalid": None})
    task = {
        "id": "images",
        "version": IMAGES_VERSION,
        "options": dict(options or {}),
        "num_samples": len(found),
        "refused": 0,
    }
    task["prompts_hash"] = files.text_hash([asdict(sample) for sample in found])
    content = files.text_hash([line["sha256"] for line in lines])
    open_arm(folder, {"task": task, "model": {"images": content}, "generation": {}}, found)
    if not records(folder):
        with Appender(folder / "records-0.jsonl") as out:
            out.write(lines)


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested identity as one level: {"task": {"id": "i2p"}} is {"task.id": "i2p"}."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two nested identities disagree about, as 'task.options.subset: "all" there, "sexual" here'."""
    old, new = flat(there), flat(here)
    return [
        f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} here"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
