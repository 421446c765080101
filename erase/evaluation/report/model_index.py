"""A report's figures in the YAML header of a model card, as the hub's model-index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from erase import files
from erase.errors import EraseError


def write_to_card(path: str | Path, results: Mapping[str, Any]) -> int:
    """Put the erased model's scores into the card's header and return their number.

    The same task's scores are replaced, other tasks' stay, and so does the text. Each has its n and its 95 % interval,
    and the base model's value where there is one.

    path: of a README.md that begins with the hub's YAML header, such as a run folder's.

    Raises:
        EraseError: no such file, or no header that can be read.
    """
    from huggingface_hub import EvalResult, ModelCard

    task = results["task"]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise EraseError(f"{path} cannot be read ({error.strerror}); give the README.md of a run folder") from error
    if not text.startswith("---"):
        raise EraseError(f"{path} does not begin with a YAML header (---); give the README.md of a run folder")
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # the header is a user's text: YAML's and the hub client's errors share no class
        raise EraseError(f"{path} has no header that can be read: {' '.join(str(error).split())[:200]}") from error
    header: Any = card.data
    kept = [one for one in header.eval_results or [] if one.dataset_type != task["id"]]
    found = [
        EvalResult(
            task_type="text-to-image",
            dataset_type=task["id"],
            dataset_name=f"eval-concept {task['id']}@{task['version']}",
            dataset_revision=task["prompts_hash"],
            metric_type=score["name"],
            metric_name=score["title"],
            metric_value=score["erased"]["value"],
            metric_args=_plain(score),
        )
        for score in results["scores"]
    ]
    header.eval_results = [*kept, *found]
    header.model_name = header.model_name or results["name"]
    files.write_text(path, str(card))
    return len(found)


def _plain(score: Mapping[str, Any]) -> dict[str, Any]:
    """What the value is worth: its n, its interval and the base's value; no None, which YAML readers trip over."""
    erased, base = score["erased"], score["base"]
    stated = {"n": erased["n"], "low": erased["low"], "high": erased["high"], "base": base and base["value"]}
    return json.loads(json.dumps({key: value for key, value in stated.items() if value is not None}))
