"""What decides the weights of a run, and how two runs differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from erase import files
from erase.concepts import Concept
from erase.options.declare import flag
from erase.options.settings import Settings

# Settings that do not decide the weights, or that the rest of an identity holds in another form.
_FREE = {"unet", "concept", "kind", "forget", "anchor", "retain", "model", "base", "config", "revision", "allow_pickle"}
_FREE |= {"output", "save", "lora_rank", "num_samples", "overwrite", "resume", "device", "cache_dir", "report_to"}
_FREE |= {"erase_from", "checkpointing_steps", "low_memory"}


def of_run(
    settings: Settings,
    concepts: Sequence[Concept],
    *,
    base_hash: str,
    mask_hash: str | None,
    base: Mapping[str, Any] | None = None,
    formula: int = 1,
    denoiser_hash: str | None = None,
) -> dict[str, Any]:
    """What decides the weights of a run, and nothing else; two runs of the same identity are one.

    settings: resolved. concepts: the one that is trained, then its parts. base: the earlier run's account of itself.
    formula: of the method; see `methods.protocol.Method`.
    denoiser_hash: of the network that predicts noise, if another one is trained.
    """
    found = {
        "base_hash": base_hash,
        "concept": prompts_hash([asdict(concept) for concept in concepts]),
        "settings": deciding(asdict(settings), mask_hash),
        "mask": mask_hash,
    }
    if formula != 1:
        found["formula"] = formula
    if denoiser_hash is not None:
        found["denoiser_hash"] = denoiser_hash
    return found if base is None else {**found, "base": dict(base)}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], default: Callable[[str], Any]) -> list[str]:
    """Names of what two identities disagree about, as a user knows them.

    default: the value that a setting has without its option; an identity that lacks the setting was made with it.
    """
    names = {"base_hash": "the model", "concept": "concept", "mask": "mask", "base": "--base"}
    names["denoiser_hash"] = "the model"
    names["formula"] = "what the method computes, which another version changed"
    different = list(dict.fromkeys(told for name, told in names.items() if there.get(name) != here.get(name)))
    old, new = there["settings"], here["settings"]
    for name in dict.fromkeys([*new, *old]):
        if name not in new:
            is_same = old[name] in (None, False, [], "no")  # an option that there is no longer, and that was not used
        else:
            is_same = _as_list(old[name] if name in old else default(name)) == _as_list(new[name])
        different += [] if is_same else [flag(name)]
    return different


def deciding(settings: Mapping[str, Any], mask_hash: str | None) -> dict[str, Any]:
    """The settings that decide the weights."""
    decide = {name: value for name, value in settings.items() if name not in _FREE}
    return decide | ({} if mask_hash is None else {"mask": "file"})  # its hash decides, not its path


def prompts_hash(concepts: Sequence[Mapping[str, Any]]) -> str:
    """Hash of what is trained on; names, judges and synonyms do not decide the weights."""
    return files.text_hash([[concept[key] for key in ("forget", "anchor", "retain", "others")] for concept in concepts])


def _as_list(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
