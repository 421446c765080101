"""The images that a report shows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.evaluation import arm
from erase.evaluation.plan import Plan, column_of
from erase.evaluation.tasks.protocol import Sample


def sheet(
    arms: Mapping[str, Path], samples: Sequence[Sample], flagged: Sequence[bool], failures: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Six samples a role and six a kind of failure, evenly from each list; paths from the arms' common root.

    failures: places of samples that failed, by role ("still", "lost").
    """
    root = common_root(*arms.values())
    drawn = {role: arm.complete_records(folder) for role, folder in arms.items()}
    rows = []
    roles = dict.fromkeys(sample.role for sample in samples)
    listed = {role: [i for i, sample in enumerate(samples) if sample.role == role] for role in roles}
    for role, places in {**listed, **failures}.items():
        for i in dict.fromkeys(places[j * len(places) // 6] for j in range(6 * bool(places))):
            files_of = {r: drawn[r][i]["file"] and folder.resolve() / drawn[r][i]["file"] for r, folder in arms.items()}
            paths = {  # images in a user's folder keep their whole path
                r: path and (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
                for r, path in files_of.items()
            }
            row = {"prompt": samples[i].prompt, "role": role, "flagged": bool(flagged[i])}
            rows.append(row | {"base": paths.get("base"), "erased": paths["erased"]})
    return rows


def failures(plan: Plan, base: Plan | None) -> dict[str, list[int]]:
    """Places of images that still show the concept, and of those that only the base has right."""
    erasure, retention = column_of(plan, plan.erasure), column_of(plan, plan.retention)
    before = column_of(base, plan.retention)
    still = [i for i, value in enumerate(erasure.values) if value is False] if erasure and base else []
    lost = [i for i, value in enumerate(retention.values) if value is False] if retention and before else []
    return {"still": still, "lost": [i for i in lost if before and before.values[i]]}


def common_root(*folders: Path | None) -> Path:
    """The innermost folder that holds them all; images are named from there."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders if folder]))
