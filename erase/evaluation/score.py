"""Raw outputs of a judge, per image, into the arm's folder; every figure of a report is computed from them later."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from erase import files
from erase.errors import EraseError
from erase.evaluation import arm, jsonl, shapes
from erase.evaluation.judges.protocol import Judge
from erase.evaluation.judges.registry import JUDGES
from erase.progress import each, progress
from erase.registry import file_name, name_of_file

BATCH = 32  # images in memory at a time


def check_size(judge: Judge, sizes: Iterable[tuple[int, int]]) -> None:
    """Refuse images that the judge cannot look at, before there are any.

    sizes: height and width of the images, in pixels.

    Raises:
        EraseError: the judge sees one size only, and an image has another.
    """
    seen = judge.size
    for height, width in sizes if seen else ():
        if (height, width) != (seen, seen):
            raise EraseError(
                f"the judge {judge.name} sees {seen} x {seen} pixels, but the images will have {width} x {height}; "
                "it is for images of the embedded model"
            )


def score(
    folder: Path,
    judge: Judge,
    *,
    quiet: bool = False,
    role: str = "",
    early: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Score every image of the arm that has no score yet; invalid ones are recorded as such.

    role: of the model, for the line of progress. early: what the judge said when the images were generated, by sample.

    Raises:
        EraseError: images are missing or were changed since, or another judge of this name was here.
    """
    records = arm.complete_records(folder)
    prompts = {sample.id: sample.prompt for sample in arm.samples(folder)}
    identity_path = score_file(folder, judge.name, ".json")
    if identity_path.exists():
        different = arm.differences(identity(folder, judge.name), identity_of(judge))
        if different:
            raise EraseError(
                f"{identity_path} was written by another judge ({'; '.join(different)}); delete it and the .jsonl to "
                "score again"
            )
    else:
        files.write_json(identity_path, identity_of(judge))
    path = score_file(folder, judge.name, ".jsonl")
    done = {line["id"] for line in _stored(path, judge.name)}
    todo = [record for record in records if record["id"] not in done]
    with (
        jsonl.Appender(path) as out,
        progress(len(todo), f"score {judge.name}{role and f', {role} model'}", "images", quiet=quiet) as bar,
    ):
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            out.write(_lines(folder, judge, part, prompts, early or {}))
            bar.update(len(part))


def _lines(
    folder: Path,
    judge: Judge,
    records: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, str],
    early: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    read = {record["id"]: arm.read_image(folder, record) for record in records}
    for record in records:
        if record["file"] and files.file_hash(arm.image_path(folder, record)) != record["sha256"]:
            raise EraseError(f"{arm.image_path(folder, record)} was changed since it was generated; generate again")
    valid = [name for name, (pixels, _) in read.items() if pixels is not None]
    new = [name for name in valid if name not in early]
    said = judge.score([_pixels(read[n]) for n in new], [prompts[n] for n in new]) if new else []
    outputs = {name: early[name] for name in valid if name in early} | dict(zip(new, said, strict=True))
    return [{"id": name, "invalid": reason, **outputs.get(name, {})} for name, (_, reason) in read.items()]


def _pixels(read: tuple[np.ndarray | None, str | None]) -> np.ndarray:
    assert read[0] is not None
    return read[0]


def load(folder: Path, judge: str) -> list[dict[str, Any]]:
    """The judge's lines in the samples' order.

    Raises:
        EraseError: the arm is not scored, or not to the end.
    """
    lines = {line["id"]: line for line in _stored(score_file(folder, judge, ".jsonl"), judge)}
    wanted = [sample.id for sample in arm.samples(folder)]
    absent = [name for name in wanted if name not in lines]
    if absent:
        raise EraseError(
            f"{folder}: {len(absent)} of {len(wanted)} images have no score of {judge}; run eval-concept score"
        )
    return [lines[name] for name in wanted]


def _stored(path: Path, judge: str) -> list[dict[str, Any]]:
    """The lines of a file of scores, each of the shape of what its judge says.

    Raises:
        EraseError: there is no such judge, or the file is damaged.
    """
    outputs = JUDGES.stated(judge, str(path)).outputs
    lines = jsonl.read_lines(path, {"id": str, "invalid": (str, None), "*": Any})
    for number, line in enumerate(lines, start=1):
        if not line["invalid"]:
            said = {key: value for key, value in line.items() if key not in {"id", "invalid"}}
            shapes.check(said, outputs, f"{path}, line {number}: the score")
    return lines


def identity(folder: Path, judge: str) -> dict[str, Any]:
    """What the judge was that scored the folder.

    Raises:
        EraseError: it was not scored by this judge, or the file is damaged.
    """
    path = score_file(folder, judge, ".json")
    found = files.read_json(path)
    shapes.check(found, JUDGES.stated(judge, str(path)).identity_shape, f"{path}: judge")
    return found


def identity_of(judge: Judge) -> dict[str, Any]:
    """The judge's identity as its file has it: JSON has lists for tuples."""
    return json.loads(json.dumps(judge.identity()))


def score_file(folder: Path, judge: str, suffix: str) -> Path:
    """The file of a judge's identity (.json) or outputs (.jsonl)."""
    return folder / "scores" / f"{file_name(judge)}{suffix}"


def scored_by(folder: Path) -> list[str]:
    """The judges that scored a folder, by name; none is allowed."""
    return sorted(name_of_file(path.stem) for path in (folder / "scores").glob("*.json"))


def judges(folder: Path) -> list[str]:
    """The judges that scored a folder, by name.

    Raises:
        EraseError: none did.
    """
    names = scored_by(folder)
    if not names:
        raise EraseError(f"{folder} is not scored yet; run eval-concept score {folder}")
    return names


def verify(folder: Path, judges: Sequence[Judge], num: int, *, quiet: bool = False) -> list[str]:
    """What is wrong with an arm: files read and hashed again, and an even sample of `num` of them scored again.

    A score may differ by 1e-4 (another machine's rounding); a changed image or record may not.
    """
    problems = []
    records = arm.complete_records(folder)
    for record in each(records, "verify", "images", quiet=quiet):
        if record["file"] is None:
            continue
        path = arm.image_path(folder, record)
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif files.file_hash(path) != record["sha256"]:
            problems.append(f"{path} is not what was generated: its hash differs")
    num = min(num, len(records))
    chosen = [records[i * len(records) // num] for i in range(num)]
    prompts = {sample.id: sample.prompt for sample in arm.samples(folder)}
    for judge in judges:
        different = arm.differences(identity(folder, judge.name), identity_of(judge))
        if different:
            problems.append(f"the judge {judge.name} has changed ({'; '.join(different)})")
            continue
        if any(str(arm.image_path(folder, record)) in problem for record in chosen for problem in problems):
            continue
        stored = {line["id"]: line for line in load(folder, judge.name)}
        for line in _lines(folder, judge, chosen, prompts):
            if not judge.agrees(stored[line["id"]], line):
                problems.append(f"{line['id']}: {judge.name} now gives another output")
    return problems
