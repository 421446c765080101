"""Single-file checkpoints and pipelines in memory, kept in the cache as the diffusers folders that all else reads."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from erase import delta, pickles
from erase.errors import EraseError
from erase.families import architecture, components, pipeline_folder, registry
from erase.families.components import one_line, require_finite
from erase.families.protocol import Family
from erase.files import default_cache_dir, file_hash, read_json, scratch_folder, text_hash, write_json
from erase.progress import loading
from erase.tensor_files import open_tensors, read_metadata, write_tensors

SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
_PASSING = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # what saving writes into a config
_RECORD = "erase_converted.json"  # hashes of the folder's files, and lines for the user about the conversion


def shapes(path: Path, *, allow_pickle: bool = False) -> dict[str, Sequence[int]]:
    """The shape of each tensor in a file; empty for a pickle that is not allowed.

    Raises:
        EraseError: the file is damaged.
    """
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    return {name: tensor.shape for name, tensor in pickles.tensors(path)[0].items()} if allow_pickle else {}


def convert(
    path: Path,
    family: type[Family],
    kind_of: Callable[[Mapping[str, Sequence[int]]], str | None],
    *,
    allow_pickle: bool,
    config: str | None,
    cache_dir: Path | None,
) -> tuple[Path, list[str]]:
    """The diffusers folder of a checkpoint, keyed by its content and its config's, and lines about it.

    kind_of: from the shapes of its tensors to what the file is, if it is not the family's.

    Raises:
        EraseError: the file is damaged, of another kind of model, or a pickle and `allow_pickle` is False; its configs
            or its VAE cannot be found; or the cache cannot be written.
    """
    if path.suffix != ".safetensors":
        pickles.require_allowed(path, allow_pickle)
    stored = shapes(path, allow_pickle=allow_pickle)
    _require_known(path, kind_of(stored))
    configs = None if config is None else _config_folder(config, path, family)
    options: dict[str, Any] = {} if configs is None else {"config": str(configs), "local_files_only": True}
    vae_dir = None if any(name.startswith("first_stage_model.") for name in stored) else _vae_folder(path, configs)
    content = [file_hash(path), None if configs is None else _configs_hash(configs)]
    content += [_hashes(vae_dir)] if vae_dir else []

    def make(folder: Path) -> list[str]:
        notes = [f"{path} has no VAE; that of --config {configs} is used"] if vae_dir else []
        weights = path
        if path.suffix != ".safetensors":
            tensors, stubs = pickles.tensors(path)
            notes += [pickles.stubbed(path, stubs)] if stubs else []
            weights = folder.parent / "weights.safetensors"
            write_tensors(weights, _unshared(tensors))
            del tensors
        parts = {"vae": components.load(AutoencoderKL, vae_dir, allow_pickle=False)} if vae_dir else {}
        cls: Any = getattr(import_module(family.pipeline_module), family.pipelines[0])
        try:
            with loading():
                pipeline: Any = cls.from_single_file(str(weights), dtype=torch.float32, **options, **parts)
        except Exception as error:  # as in `components.load`: many libraries, one meaning
            hint = "" if config else "; offline, name a diffusers folder with its configs and tokenizer: --config DIR"
            reason = "it lacks weights that its config asks for" if "meta tensor" in str(error) else one_line(error)
            raise EraseError(f"cannot load {path}: {reason}{hint}") from error
        for part in (family.part, *family.data_parts):
            state = getattr(pipeline, part).state_dict()
            if lacking := [name for name, tensor in state.items() if tensor.is_meta]:
                raise EraseError(f"cannot load {path}: it lacks {lacking[0]!r} of the {part} that its config asks for")
            require_finite(path, state.items())
        notes += _follow_marks(path, pipeline, stored)
        pipeline_folder.write_pipeline(pipeline, folder)
        return notes

    return in_cache("converted", text_hash(content)[:32], cache_dir, make)


def _config_folder(config: str, path: Path, family: type[Family]) -> Path:
    """The folder of --config, which must be of the file's architecture."""
    folder = Path(config).expanduser()
    if not (folder / "model_index.json").is_file():
        raise EraseError(f"--config is {config!r}, which has no model_index.json; give a diffusers folder")
    name = architecture.pipeline_class(folder)
    if not issubclass(family, registry.serving(name)) or not issubclass(registry.serving(name), family):
        raise EraseError(f"--config {config} is a {name}, but {path} needs the configs of a {family.pipelines[0]}")
    if kind := family.other_kind(folder):
        raise architecture.refusal(f"--config {config}", kind)
    return folder


def _vae_folder(path: Path, configs: Path | None) -> Path:
    """Where the VAE of a file without one is taken from."""
    if configs is None:
        raise EraseError(f"{path} has no VAE; name a diffusers folder that has one: --config DIR")
    if not [*(configs / "vae").glob("*.safetensors")]:
        raise EraseError(
            f"{path} has no VAE, and --config {configs} has no weights of one; give a folder with vae/*.safetensors"
        )
    return configs / "vae"


def _follow_marks(path: Path, pipeline: Any, stored: Collection[str]) -> list[str]:
    """Let the scheduler follow the empty tensors by which ComfyUI knows predictions of v and zero terminal SNR."""
    marks = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    change = dict(value for name, value in marks.items() if name in stored)
    if all(pipeline.scheduler.config.get(name) == value for name, value in change.items()):
        return []
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **change)
    return [f"{path} predicts v, as a tensor in it says ({', '.join(marks.keys() & stored)}); its config does not"]


def keep(pipeline: Any, family: type[Family], cache_dir: Path | None = None) -> Path:
    """The folder of a pipeline in memory, with the same bits, keyed by its content.

    Raises:
        EraseError: it is a pipeline of another kind, its weights are not in memory, or the cache cannot be written.
    """
    cls: Any = getattr(import_module(family.pipeline_module), family.pipelines[0])
    if not isinstance(pipeline, cls):
        raise EraseError(
            f"the model is a {type(pipeline).__name__}; give 'mini', a diffusers folder, a hub id, a checkpoint file "
            f"or a {cls.__name__}"
        )
    parts = {name: getattr(pipeline, name) for name in (family.part, *family.data_parts)}
    for name, part in parts.items():
        if part is None or any(tensor.is_meta for tensor in part.state_dict().values()):
            raise EraseError(f"the pipeline's {name} is not in memory; load it without offloading, or give its folder")
    if any(hasattr(part, "peft_config") for part in parts.values()):
        raise EraseError("the pipeline has a LoRA attached; call fuse_lora() and unload_lora_weights() first")
    content: dict[str, Any] = {name: delta.content_hash(part.state_dict()) for name, part in parts.items()}
    for name in (name for name in family.parts if name not in parts):
        tokenizer: Any = getattr(pipeline, name)
        words = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = {key: value for key, value in words.items() if key not in {"truncation", "padding"}}
        content[name] = {"words": kept, "length": tokenizer.model_max_length, "pad": str(tokenizer.pad_token)}
    for name, part in {**parts, "scheduler": pipeline.scheduler}.items():
        config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
        kept = {key: value for key, value in config.items() if key not in _PASSING}
        content[f"{name} config"] = [type(part).__name__, str(sorted(kept.items()))]
    content["zeros"] = pipeline.config.get("force_zeros_for_empty_prompt")

    def make(folder: Path) -> list[str]:
        pipeline_folder.write_pipeline(pipeline, folder)
        return []

    return in_cache("pipelines", text_hash(content)[:32], cache_dir, make)[0]


def in_cache(kind: str, key: str, cache_dir: Path | None, make: Callable[[Path], list[str]]) -> tuple[Path, list[str]]:
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


def _require_known(path: Path, kind: str | None) -> None:
    """kind: what the file is instead of a model that the family reads."""
    if path.suffix == ".safetensors" and read_metadata(path).get("kind") in {"mask", "exact", "additive"}:
        raise EraseError(f"{path} is a delta or a mask, not a model")
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
