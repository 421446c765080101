"""Single-file checkpoints and pipelines in memory, kept in the cache as the diffusers folders that all else reads."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from erase import delta, pickles
from erase.errors import EraseError
from erase.families import architecture, pipeline_folder
from erase.families.components import one_line, require_finite
from erase.files import default_cache_dir, file_hash, read_json, scratch_folder, text_hash, write_json
from erase.progress import loading
from erase.tensor_files import open_tensors, read_metadata, write_tensors

SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
_PASSING = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # what saving writes into a config
_RECORD = "erase_converted.json"  # hashes of the folder's files, and what the user is told about the conversion


def shapes(path: Path) -> dict[str, Sequence[int]]:
    """The shape of each tensor in a file; empty for a pickle, of which it is not known before it is read.

    Raises:
        EraseError: the file is damaged.
    """
    if path.suffix != ".safetensors":
        return {}
    with open_tensors(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def convert(path: Path, *, allow_pickle: bool, config: str | None, cache_dir: Path | None) -> tuple[Path, list[str]]:
    """The diffusers folder of an LDM checkpoint, keyed by its content and its config's, and lines about it.

    Raises:
        EraseError: the file is damaged, of another kind of model, or a pickle and `allow_pickle` is False; its configs
            are not to be had; or the cache cannot be written.
    """
    if path.suffix == ".safetensors":
        _require_known(path, shapes(path))
    elif not allow_pickle:
        raise EraseError(
            f"{path} is a pickle, which can run code when loaded; "
            "use a .safetensors file, or pass --allow-pickle if you trust its source"
        )
    options: dict[str, Any] = {}
    if config is not None:
        configs = Path(config).expanduser()
        if not (configs / "model_index.json").is_file():
            raise EraseError(f"--config is {config!r}, which has no model_index.json; give a diffusers folder")
        architecture.require_known(f"--config {config}", configs)
        options = {"config": str(configs), "local_files_only": True}
    key = text_hash([file_hash(path), _configs_hash(Path(options["config"])) if options else None])[:32]

    def make(folder: Path) -> list[str]:
        notes: list[str] = []
        weights = path
        if path.suffix != ".safetensors":
            tensors, stubs = pickles.tensors(path)
            _require_known(path, {name: tensor.shape for name, tensor in tensors.items()})
            notes = [pickles.stubbed(path, stubs)] if stubs else []
            weights = folder.parent / "weights.safetensors"
            write_tensors(weights, _unshared(tensors))
            del tensors
        try:
            with loading():
                pipeline: Any = StableDiffusionPipeline.from_single_file(str(weights), dtype=torch.float32, **options)
        except Exception as error:  # as in `components.load`: many libraries, one meaning
            hint = "" if config else "; offline, name a diffusers folder with its configs and tokenizer: --config DIR"
            reason = "it lacks weights that its config asks for" if "meta tensor" in str(error) else one_line(error)
            raise EraseError(f"cannot load {path}: {reason}{hint}") from error
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            require_finite(path, part.state_dict().items())
        pipeline_folder.write_pipeline(pipeline, folder)
        return notes

    return _kept("converted", key, cache_dir, make)


def keep(pipeline: Any, cache_dir: Path | None = None) -> Path:
    """The folder of a StableDiffusionPipeline in memory, with the same bits, keyed by its content.

    Raises:
        EraseError: it is a pipeline of another kind, its weights are not in memory, or the cache cannot be written.
    """
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise EraseError(
            f"the model is a {type(pipeline).__name__}; give 'mini', a diffusers folder, a hub id, a checkpoint file "
            "or a StableDiffusionPipeline"
        )
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    for name, part in parts.items():
        if part is None or any(tensor.is_meta for tensor in part.state_dict().values()):
            raise EraseError(f"the pipeline's {name} is not in memory; load it without offloading, or give its folder")
    if any(hasattr(part, "peft_config") for part in parts.values()):
        raise EraseError("the pipeline has a LoRA attached; call fuse_lora() and unload_lora_weights() first")
    backend: Any = pipeline.tokenizer.backend_tokenizer
    words = json.loads(backend.to_str())
    content: dict[str, Any] = {name: delta.content_hash(part.state_dict()) for name, part in parts.items()}
    content |= {"words": {name: value for name, value in words.items() if name not in {"truncation", "padding"}}}
    content |= {"length": pipeline.tokenizer.model_max_length, "pad": str(pipeline.tokenizer.pad_token)}
    for name, part in {**parts, "scheduler": pipeline.scheduler}.items():
        config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
        kept = {key: value for key, value in config.items() if key not in _PASSING}
        content[f"{name} config"] = [type(part).__name__, str(sorted(kept.items()))]

    def make(folder: Path) -> list[str]:
        pipeline_folder.write_pipeline(pipeline, folder)
        return []

    return _kept("pipelines", text_hash(content)[:32], cache_dir, make)[0]


def _kept(kind: str, key: str, cache_dir: Path | None, make: Callable[[Path], list[str]]) -> tuple[Path, list[str]]:
    """The folder of this key in the cache and its notes: verified if it is there, made otherwise."""
    folder = (cache_dir or default_cache_dir()) / kind / key
    try:
        notes = _verified(folder)
        if notes is None:
            with scratch_folder(folder) as temporary:
                made = temporary / "pipeline"
                notes = make(made)
                write_json(made / _RECORD, {"notes": notes, "files": _hashes(made)})
                if _verified(folder) is None:  # else another process was first
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(made, folder)
    except EraseError:
        with contextlib.suppress(OSError):  # bad input leaves no empty folders behind
            folder.parent.rmdir()
            folder.parent.parent.rmdir()
        raise
    except OSError as error:
        raise EraseError(f"cannot use the cache {folder}: {error.strerror}; choose another --cache-dir") from error
    return folder, notes


def _verified(folder: Path) -> list[str] | None:
    """The notes of a folder whose files are as they were written; None if there is no such folder or one differs."""
    if not (folder / _RECORD).is_file():
        return None
    try:
        record = read_json(folder / _RECORD)
    except EraseError:
        return None
    return record["notes"] if record.get("files") == _hashes(folder) and "notes" in record else None


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _RECORD)
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in paths}


def _configs_hash(folder: Path) -> str:
    paths = sorted(path for path in folder.glob("**/*") if path.suffix in {".json", ".txt"} and path.is_file())
    return text_hash([[path.relative_to(folder).as_posix(), file_hash(path)] for path in paths])


def _require_known(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    if path.suffix == ".safetensors" and read_metadata(path).get("kind") in {"mask", "exact", "additive"}:
        raise EraseError(f"{path} is a delta or a mask, not a model")
    kind = architecture.of_checkpoint(shapes)
    if kind:
        raise architecture.refusal(path, kind)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `save_file` takes: without the average (EMA) copies, no two in the same memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith("model_ema."):
            shared = tensor.untyped_storage().data_ptr() in seen
            seen.add(tensor.untyped_storage().data_ptr())
            found[name] = tensor.clone() if shared else tensor
    return found
