"""One model under attack: what the attack finds, and images of the attacked model, both in the arm's folder.

    found/run-0/300.safetensors   tensors that the attack found after 300 steps, such as a learned word
    found/run-0/300.json          texts that it found and further facts, with a hash

A run of the attack whose findings are all stored is not searched again. An interrupted search starts again, and finds
the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from erase import files, tensor_files
from erase.errors import EraseError
from erase.evaluation import arm, generate, jsonl, shapes
from erase.evaluation.attacks.protocol import Attack, Finding, Given, said
from erase.evaluation.tasks.protocol import Sample, SampleSet
from erase.progress import progress

FORMAT = 1  # of found/; raise it with every change that an earlier version cannot read
_SHAPE = {"format": {FORMAT}, "tensors": (str, None), "texts": {"*": str}, "facts": {"*": Any}, "hash": str}


def attack(
    given: Given, attack: Attack, task: SampleSet, folder: Path, settings: Mapping[str, Any], batch_size: int, role: str
) -> None:
    """Attack the model and generate what is missing of the arm's images.

    given: its samples are those of one run and point, in turn. settings: see `generate.effective_settings`.

    Raises:
        EraseError: the folder holds another arm, or cannot be written.
    """
    arm.open_arm(
        folder, generate.identity(generate.model_hashes(given.model), task, settings, batch_size), task.samples
    )
    absent = {sample.id for sample in arm.missing(folder)}
    by_run: dict[int, dict[str, list[Sample]]] = {}
    for sample in task.samples:
        by_run.setdefault(sample.facts["attack_seed"], {}).setdefault(sample.facts["point"], []).append(sample)
    with (
        jsonl.Appender(folder / "records-0-of-1.jsonl") as out,
        progress(len(absent), f"generate attacked images, {role} model", "images", quiet=given.quiet) as bar,
    ):
        for run, points in by_run.items():
            if not any(sample.id in absent for samples in points.values() for sample in samples):
                continue
            findings = _findings(given, attack, folder / "found" / f"run-{run}", run, list(points))
            for point, samples in points.items():
                batches = [one for one in generate.batches(samples, batch_size) if any(s.id in absent for s in one)]
                if not batches:
                    continue
                with attack.attacked(given, findings[point]):
                    for batch in batches:
                        out.write(
                            _images(given, attack, findings[point], folder, task.samples, batch, absent, settings)
                        )
                        bar.update(sum(sample.id in absent for sample in batch))


def _images(
    given: Given,
    attack: Attack,
    finding: Finding,
    folder: Path,
    samples: Sequence[Sample],
    batch: Sequence[Sample],
    absent: set[str],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    def draw(part: Sequence[Sample], size: tuple[int, int], guidance: float) -> Tensor:
        return attack.draw(given, finding, part, guidance)

    lines = generate.stored(
        given.model, folder, samples, batch, absent, settings, draw, lambda sample: said(finding, sample)
    )
    if not attack.measured:
        return lines
    by_id = {sample.id: sample for sample in batch}
    return [line | {"measured": dict(attack.recorded(given, finding, by_id[line["id"]]))} for line in lines]


def _findings(given: Given, attack: Attack, folder: Path, run: int, points: Sequence[str]) -> dict[str, Finding]:
    """What the attack found at each point; searched if it is not all stored."""
    paths = {point: folder / f"{point}.json" for point in points}
    if attack.keeps_tensors and all(path.is_file() for path in paths.values()):
        return {point: read_finding(path) for point, path in paths.items()}
    found = attack.search(given, run)
    absent = [point for point in points if point not in found]
    assert not absent, f"the attack found nothing at {absent}"
    for point, path in paths.items():
        write_finding(path, found[point], keeps_tensors=attack.keeps_tensors)
    return found


def write_finding(path: Path, finding: Finding, *, keeps_tensors: bool = True) -> None:
    """Store a finding: a JSON file, and beside it a safetensors file if it has tensors."""
    content = None
    if finding.tensors and keeps_tensors:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in finding.tensors.items()}
        content = tensor_files.content_hash(tensors)
        tensor_files.write_tensors(path.with_suffix(".safetensors"), tensors, {"format": FORMAT})
    value = {"format": FORMAT, "tensors": content, "texts": dict(finding.texts), "facts": dict(finding.facts)}
    files.write_json(path, {**value, "hash": files.text_hash(value)})


def read_finding(path: Path) -> Finding:
    """A stored finding.

    Raises:
        EraseError: a file is missing, damaged or changed.
    """
    value = files.read_json(path)
    shapes.check(value, _SHAPE, f"{path}: finding")
    again = "delete the folder found/ and run the same command again"
    if value["hash"] != files.text_hash({key: part for key, part in value.items() if key != "hash"}):
        raise EraseError(f"{path} was changed since it was written; {again}")
    tensors: dict[str, Tensor] = {}
    if value["tensors"] is not None:
        tensors = tensor_files.read_tensors(path.with_suffix(".safetensors"), copied=True)
        if tensor_files.content_hash(tensors) != value["tensors"]:
            raise EraseError(f"{path.with_suffix('.safetensors')} is not what {path.name} states; {again}")
    return Finding(tensors, value["texts"], value["facts"])


def first_run(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the first run at its first point: all others ask for the same."""
    first = samples[0].facts
    return [s for s in samples if (s.facts["attack_seed"], s.facts["point"]) == (first["attack_seed"], first["point"])]
