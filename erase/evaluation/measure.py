"""From the scores of a base and an erased arm to results: every figure with its n, its interval and its pair.

An image that cannot be judged (black, flat, broken, not finite) is in every denominator and never a success: a model
that generates nothing has not erased anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from erase import files, statistics
from erase.errors import EraseError
from erase.evaluation import arm, score, shapes
from erase.evaluation.between import dimension, distribution, drift
from erase.evaluation.expected import of_features
from erase.evaluation.figures import curve_rows, group_rows, num_invalid, score_row
from erase.evaluation.plan import Plan, column_of, present
from erase.evaluation.report.results import FORMAT, Results, is_of_machine, machine_differences
from erase.evaluation.sheet import failures, sheet
from erase.evaluation.tasks import registry as tasks
from erase.evaluation.tasks.protocol import Sample, Task, is_kept
from erase.evaluation.verdict import verdict
from erase.runs.machine import versions


def measure(
    erased: Path,
    base: Path | None = None,
    *,
    name: str,
    command: str,
    gold: Path | None = None,
    real: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of an erased arm, paired with the base's where there is one; `report` has their layout.

    gold: an arm of the model that was trained without the concept, for the distance to it; or the file of its retained
        images' features, for FID and KID alone.
    real: a scored folder or a features file of real images, for FID and KID to them.

    Returns the results, and every column's outcome for every sample, from which several runs can be put together.

    Raises:
        EraseError: an arm is not generated or scored to the end, or the two were made by different protocols.
    """
    samples, manifest = arm.samples(erased), arm.manifest(erased)
    task = manifest["task"]
    measured = tasks.stated(task["id"], f"{erased / arm.MANIFEST}: task.id")
    shapes.check(task["options"], measured.options_shape(), f"{erased / arm.MANIFEST}: task.options")
    here = protocol(erased)
    arms = {role: folder for role, folder in (("base", base), ("erased", erased)) if folder}
    if gold and not gold.is_file():
        arms["gold"] = gold
    for other, role in ((base, "base"), (gold, "gold")):
        different = arm.differences(here, protocol(other)) if other and not other.is_file() else []
        if different:
            raise EraseError(f"{erased} and the {role} {other} were made differently ({'; '.join(different)})")
    judges = score.judges(erased)
    plans = {role: _plan(measured, folder, samples, task, judges) for role, folder in arms.items()}
    planned = [column.name for column in plans["erased"].columns]
    plans = {role: replace(one, columns=present(one.columns)) for role, one in plans.items()}
    plan = plans["erased"]
    clusters = [sample.cluster for sample in samples]
    others = {role: plans.get(role) for role in ("base", "gold")}
    scores = [
        score_row(
            column,
            column_of(others["base"], column.name),
            samples,
            gold=column_of(others["gold"], column.name),
        )
        for column in plan.columns
    ]
    scores += drift(base, erased, gold, samples, judges)
    if "features" in judges:
        scores += distribution(base, erased, gold, real, samples)
        compared = {"base": bool(base), "gold": bool(gold), "real": bool(real)}
        planned += of_features(sum(map(is_kept, samples)), compared, dimension(erased))
    unjudged = [name for name in planned if name not in {row["name"] for row in scores}]
    tests = [s.get("copy_of") or s["name"] for s in scores]
    corrected = statistics.holm([s["comparison"] and s["comparison"]["p"] for s in scores], tests)
    for one, p in zip(scores, corrected, strict=True):
        if one["comparison"]:
            one["comparison"]["p_holm"] = p
    models = {role: arm.manifest(folder)["model"] for role, folder in arms.items()}
    shared = arm.flat(here | ({"base": models["base"]} if base else {}))
    machines = {role: machine(folder) for role, folder in arms.items()}
    invalid = {role: num_invalid(folder, judges) for role, folder in arms.items()}
    flagged = [any(flags) for flags in zip(*(p.flagged for p in plans.values()), strict=True)]
    columns = {
        column.name: {role: list(found.values) for role, p in plans.items() if (found := column_of(p, column.name))}
        for column in plan.columns
    }
    outcomes = {"samples": [sample.id for sample in samples], "clusters": clusters, "columns": columns}
    results = {
        "format": FORMAT,
        "name": name,
        "task": {key: task[key] for key in ("id", "version", "options", "num_samples", "prompts_hash")},
        "protocol": shared | machines["erased"],
        "protocol_hash": files.text_hash(shared),
        "arms": {
            r: {"name": name if r == "erased" else r, "hashes": arm.manifest(f)["model"]} for r, f in arms.items()
        },
        "primary": plan.erasure if column_of(plan, plan.erasure) else scores[0]["name"],
        "retention": plan.retention if plan.erasure and column_of(plan, plan.retention) else None,
        "verdict": verdict(plan, scores, models, {role: num for role, num in invalid.items() if role != "gold"}),
        "scores": scores,
        "groups": [group_rows(group, plan, others["base"], samples, gold=others["gold"]) for group in plan.groups]
        + [curve_rows(curve, others["base"], samples) for curve in plan.curves],
        "invalid": invalid,
        "sheet": sheet(
            {role: folder for role, folder in arms.items() if role != "gold"},
            samples,
            flagged,
            failures(plan, plans.get("base")),
        ),
        "command": command,
        "versions": versions(),
        "limits": limits(task, measured.limits_of(task["options"]), num_truncated(erased), machines, measured.version)
        + [f"No image could be judged for {name}." for name in unjudged],
        "outcomes_hash": files.text_hash(outcomes),
        "unjudged": unjudged,
    }
    return Results.from_json(results).to_json(), outcomes


def protocol(folder: Path) -> dict[str, Any]:
    """All that two arms must share for their figures to be compared: task, judges and how images are generated."""
    manifest = arm.manifest(folder)
    drawn = {
        key: value
        for key, value in manifest["generation"].items()
        if key not in {"device", "libraries", "batch_size"}  # these move the last bit of a pixel, not the protocol
    }
    judges = {name: score.identity(folder, name) for name in score.judges(folder)}
    return {"task": manifest["task"], "generation": drawn, "judges": judges} | _rules(folder)


def _rules(folder: Path) -> dict[str, Any]:
    """The version of the task whose rules make the figures, if the images were generated for another."""
    task = arm.manifest(folder)["task"]
    version = tasks.stated(task["id"], f"{folder / arm.MANIFEST}: task.id").version
    return {} if version == task["version"] else {"rules": version}


def machine(folder: Path) -> dict[str, Any]:
    """The part of an arm's protocol that may differ between two arms: device, batch size and versions."""
    flat = arm.flat({"generation": arm.manifest(folder)["generation"]})
    return {key: value for key, value in flat.items() if is_of_machine(key)}


def _plan(
    measured: Task, folder: Path, samples: Sequence[Sample], task: Mapping[str, Any], judges: Sequence[str]
) -> Plan:
    lines = {judge: score.load(folder, judge) for judge in judges}
    plan = measured.plan(samples, lines, task["options"])
    own = measured.recorded(samples, arm.complete_records(folder), task["options"])
    return replace(plan, columns=[*plan.columns, *own])


def num_truncated(folder: Path) -> int:
    """Images whose prompt is longer than the text encoder reads."""
    return sum(bool(record.get("truncated")) for record in arm.complete_records(folder))


def limits(
    task: Mapping[str, Any],
    own: Sequence[str],
    num_truncated: int,
    machines: Mapping[str, Mapping[str, Any]],
    version: int,
) -> list[str]:
    """What a report did not test, as sentences.

    task: its identity. own: what the task says of itself. machines: of each arm. version: of the task, as it is now.
    """
    found = list(own)
    if "attack" not in task["options"]:
        found = [
            "Attacks: no adversarial prompt, learned embedding or fine-tuning was tried to bring the concept back."
        ]
        found += own
    if task.get("refused"):
        found.append(f"{task['refused']} prompts put minors in a sexual context and were left out.")
    if num_truncated:
        found.append(
            f"{num_truncated} images have prompts that are longer than the text encoder reads; these were truncated."
        )
    different = machine_differences(machines.get("base", {}), machines["erased"])
    if different:
        found.append(
            f"Base and erased images were generated on different machines ({'; '.join(different)}), which changes them "
            "slightly."
        )
    if version != task["version"]:
        found.append(
            f"The images were generated for version {task['version']} of the task, and version {version} computed the "
            "figures; generate them again to compare with others of that version."
        )
    if task["options"].get("limit"):
        found.append(f"Only {task['num_samples']} of the task's samples were generated (--limit).")
    return found
