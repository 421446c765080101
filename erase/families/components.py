"""One component of a pipeline folder, loaded strictly: the libraries only warn of weights that are missing or wrong."""

import re
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from erase import pickles
from erase.errors import EraseError
from erase.families import architecture, pipeline_folder
from erase.files import read_json
from erase.progress import loading
from erase.tensor_files import aligned, open_tensors

_FLOATS = {"F64", "F32", "F16", "BF16"}


def load(cls: Any, folder: Path, *, allow_pickle: bool) -> Any:
    """A component in float32, frozen, in evaluation mode, and aligned in memory: the same weights give the same bits.

    Raises:
        EraseError: config or weights are missing, damaged, of another type or not finite; they do not fit each other;
            or the weights are pickled and `allow_pickle` is False.
    """
    if not (folder / "config.json").is_file():
        raise EraseError(f"{folder}/config.json is missing; give the folder of a whole Stable Diffusion pipeline")
    require_types(folder / "config.json", cls)
    if (folder / "adapter_config.json").exists():  # transformers would load it, and its base model, from anywhere
        raise _with_lora(folder, "adapter_config.json")
    files = weight_files(folder, allow_pickle=allow_pickle)
    for path in files:
        _require_floats(path)
    options: dict[str, Any] = {
        "use_safetensors": files[0].suffix == ".safetensors",
        "variant": pipeline_folder.only_variant([path.name for path in files]),
    }
    if folder.name.startswith(
        "text_encoder"
    ):  # transformers names a tensor of the wrong shape only when it may go on without it
        options["ignore_mismatched_sizes"] = True
    try:
        with loading():
            loaded, info = cls.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
            )
    except Exception as error:  # diffusers, transformers and torch raise a dozen kinds; all are the files' fault
        raise EraseError(f"cannot load {folder}: {one_line(error)}") from error
    mismatched = [item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]]
    _require_whole(folder, loaded, info["missing_keys"], info["unexpected_keys"], mismatched)
    require_finite(folder, loaded.state_dict().items())
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = aligned(tensor.data)
    return loaded.requires_grad_(False).eval()


def weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The files of a component's weights: safetensors, or pickles where there is nothing else and they are allowed.

    Raises:
        EraseError: there are none, an index names what is no such file of this folder, or pickles are not allowed.
    """
    stored = sorted(path for path in folder.glob("*.safetensors"))
    pickled = sorted(path for path in folder.glob("*.bin"))
    indices = sorted(folder.glob("*.index*.json"))
    if (pickled or any(".bin." in path.name for path in indices)) and not stored and not allow_pickle:
        raise EraseError(
            f"{folder} has no safetensors weights; a pickle can run code when loaded: "
            "convert it, or pass --allow-pickle if you trust its source"
        )
    for index in indices:
        suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
        if suffix == ".bin" and (stored or not allow_pickle):
            continue  # not read
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise EraseError(f"{index} has no weight_map from weights to file names; download it again")
        for name in sorted(set(weights.values())):
            if not name.endswith(suffix) or Path(name).name != name or "\\" in name:
                raise EraseError(f"{index} names {name!r:.80}; it may name only *{suffix} files beside itself")
            if not (folder / name).is_file():
                raise EraseError(f"{index} names {name!r:.80}, which is not there; download the model again")
    if not stored and not pickled:
        raise EraseError(f"{folder} has no weights (*.safetensors); download the model again")
    return stored or pickled


def require_types(path: Path, cls: Any) -> dict[str, Any]:
    """The config in a JSON file, whose values must be of the types that the class's parameters are annotated with.

    Raises:
        EraseError: the file is damaged, or a value is of another type or not finite.
    """
    config = read_json(path)
    hints, parameters = get_type_hints(cls.__init__), signature(cls.__init__).parameters
    for name, value in config.items():
        if name in hints and value != parameters[name].default and not _fits(value, hints[name]):
            raise EraseError(f"{path}: {name} is {value!r:.60}; it must be {_noun(hints[name])}; download it again")
    for name in ("num_hidden_layers", "layers_per_block"):  # a library would build them one by one, without end
        if isinstance(value := config.get(name), int | float) and not 0 < value <= 1000:
            raise EraseError(
                f"{path}: {name} is {value!r:.40}; it must be a whole number, 1 to 1000; download it again"
            )
    version = config.get("_diffusers_version", "0")
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\w+)*", version):
        raise EraseError(f"{path}: _diffusers_version is {version!r:.60}; it must be a version; download it again")
    return config


def require_finite(where: str | Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise an EraseError that names the first of these weights that holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            ends = torch.stack(tensor.detach().aminmax())  # NaN spreads
            if not ends.isfinite().all():
                raise EraseError(
                    f"{where}: {name!r} holds values that are not finite (NaN or infinity); its file is bad"
                )


def one_line(error: BaseException) -> str:
    """A library's message in one line, without its advice about arguments that users of this package cannot pass."""
    text = " ".join(str(error).split()) or type(error).__name__
    for advice in (" If you want to instead", " For more information"):
        text = text.split(advice)[0]
    return text.removeprefix("Cannot load because ")[:250]


def _require_floats(path: Path) -> None:
    """Weights are stored as floating-point numbers of 16 bits or more, and are no LoRA's."""
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:  # a truncated file ends here, with its name
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
        unfit = {name: kind for name, kind in kinds.items() if kind not in _FLOATS}
    else:
        stored = pickles.tensors(path)[0]
        kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
        unfit = {n: k for n, k in kinds.items() if k not in {"float64", "float32", "float16", "bfloat16"}}
    lora = architecture.attached_lora(list(kinds))
    if lora:
        raise _with_lora(path.parent, lora)
    for name, kind in unfit.items():
        if not name.endswith("position_ids"):  # 0 to 76, in old files only
            raise EraseError(
                f"{path}: {name!r} is stored as {kind}; quantized weights cannot be trained, "
                "give the model in float32, float16 or bfloat16"
            )


def _with_lora(folder: Path, name: str) -> EraseError:
    return EraseError(
        f"{folder} has a LoRA attached ({name!r:.100}); merge it first "
        "(pipeline.fuse_lora(), then pipeline.unload_lora_weights()) and save the pipeline again"
    )


def _require_whole(
    where: Path, module: torch.nn.Module, missing: Iterable[str], surplus: Iterable[str], mismatched: Iterable[str]
) -> None:
    on_meta = {name for name, tensor in module.state_dict().items() if tensor.is_meta}
    for what, names in (
        ("has a wrong shape for", set(mismatched)),
        ("lacks", set(missing) | on_meta),
        ("has a weight too many,", set(surplus)),
    ):
        if names:
            count = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EraseError(f"{where} {what} {min(names)!r}{count}; its weights do not fit its config")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of an annotated type; an annotation that JSON cannot express fits nothing."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list) or hint in (tuple, list):
        inner = [part for part in parts if part is not Ellipsis][:1]
        return isinstance(value, list) and all(_fits(item, one) for item in value for one in inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if hint is bool:
        return value is None or isinstance(value, bool)
    if hint is NoneType:
        return value is None
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _noun(hint: Any) -> str:
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_noun(part) for part in parts))
    if origin is Literal:
        return " or ".join(repr(part) for part in parts)
    return nouns.get(hint, "a list")
