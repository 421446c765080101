"""The images that a report shows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.evaluation import arm
from erase.evaluation.tasks.protocol import Sample


def sheet(arms: Mapping[str, Path], samples: Sequence[Sample], flagged: Sequence[bool]) -> list[dict[str, Any]]:
    """Six samples a role, evenly from its list; paths from the arms' common root."""
    root = common_root(*arms.values())
    drawn = {role: arm.complete_records(folder) for role, folder in arms.items()}
    rows = []
    for role in dict.fromkeys(sample.role for sample in samples):
        places = [i for i, sample in enumerate(samples) if sample.role == role]
        for i in dict.fromkeys(places[j * len(places) // 6] for j in range(6)):
            files_of = {r: drawn[r][i]["file"] and folder.resolve() / drawn[r][i]["file"] for r, folder in arms.items()}
            paths = {  # images of somebody's own folder keep their whole path
                r: path and (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
                for r, path in files_of.items()
            }
            row = {"prompt": samples[i].prompt, "role": role, "flagged": bool(flagged[i])}
            rows.append(row | {"base": paths.get("base"), "erased": paths["erased"]})
    return rows


def common_root(*folders: Path | None) -> Path:
    """The innermost folder that holds them all; images are named from there."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders if folder]))
