"""Models from the Hugging Face hub."""

from pathlib import Path

from erase.errors import EraseError
from erase.families import architecture, pipeline_folder, registry
from erase.families.components import one_line
from erase.files import default_cache_dir as default_cache_dir


def download(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """The hub's snapshot with the smallest choice of weights that is whole: plain, half precision only, pickles.

    Only the components that model_index.json names are downloaded.
    """
    folder = _snapshot(repository, revision, ["model_index.json"], [])
    family, parts = registry.serving(architecture.pipeline_class(folder)), [*architecture.components(folder)]
    configs = [
        "model_index.json",
        pipeline_folder.DEFAULTS_FILE,
        *(f"{part}/*.{end}" for part in parts for end in ("json", "txt")),
    ]
    weighed = {family.part, *family.data_parts} & {*parts}  # data_parts can be in model_index.json itself
    choices = [("*.safetensors", ["*.fp16.*", "*non_ema*"]), ("*.fp16.safetensors", [])]
    choices += [("*.bin", ["*.fp16.*", "*non_ema*"])] if allow_pickle else []
    for weights, skip in choices:
        patterns = [*configs, *(f"{part}/{weights}" for part in parts)]
        folder = _snapshot(repository, revision, patterns, skip)
        if all([*(folder / part).glob("*.safetensors")] for part in weighed):
            break
    return folder


def _snapshot(repository: str, revision: str | None, patterns: list[str], skip: list[str]) -> Path:
    """The local copy of the files that match `patterns` and not `skip`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=skip))
    except Exception as error:  # the hub client's errors share no class; each means that the model cannot be had
        raise EraseError(
            f"{repository!r} is not a local folder and cannot be downloaded from the hub ({one_line(error)}); "
            "check name and network, give the folder of a local copy with --model DIR, or try --model mini"
        ) from error
