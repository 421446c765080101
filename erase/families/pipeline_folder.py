"""A diffusers pipeline folder on disk: its files, their dtypes, and how one is written."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from erase.errors import EraseError
from erase.families import architecture, registry
from erase.files import copy, read_json, refuse_links, scratch_folder
from erase.progress import loading
from erase.tensor_files import OneByOne, open_tensors, read_tensors, write_tensors

DEFAULTS_FILE = "erase_defaults.json"  # beside model_index.json: what this model needs other than Stable Diffusion 1
WEIGHTS = re.compile(
    r"(.+?)(?:\.(\w+)(?:-\d+-of-\d+)?)?\.(safetensors|bin|ckpt|pt|pth|msgpack|h5|onnx|pb)|.+\.index(\.\w+)?\.json"
)


def network_part(folder: str | Path) -> str:
    """The component that is trained, such as "unet", by the family that serves the folder's pipeline class."""
    return registry.serving(architecture.pipeline_class(Path(folder))).part


def network_file(part: str) -> str:
    """Where the weights of a network are written, relative to the pipeline folder."""
    is_text = part.startswith("text_encoder")  # a model of transformers, and not of diffusers
    return f"{part}/{'model' if is_text else 'diffusion_pytorch_model'}.safetensors"


def published_names(base_dir: str | Path, part: str) -> list[str]:
    """The files that `save_pipeline` writes, relative to its output. part: the component that was trained."""
    base = Path(base_dir)
    return [*(name for name, _ in files_to_publish(base, part)), network_file(part), "model_index.json"]


def stored_dtype(folder: str | Path) -> str | None:
    """The dtype of a component's floating-point weights as they lie in its safetensors files, such as "float16".

    None where it has several, or other files.
    """
    names = [path.name for path in Path(folder).glob("*.safetensors") if WEIGHTS.fullmatch(path.name)]
    variant = only_variant(names)
    found: set[str] = set()
    for name in names:
        match = WEIGHTS.fullmatch(name)
        if match and match[2] == variant:
            with open_tensors(Path(folder) / name) as file:
                found |= {str(file.get_slice(key).get_dtype()) for key in file.keys()}
    floats = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtypes = {floats[name] for name in found if name in floats}
    return dtypes.pop() if len(dtypes) == 1 else None


def needs_dtype(folder: str | Path) -> bool:
    """Whether `from_pretrained` needs an explicit dtype for this pipeline to generate images.

    transformers keeps a text encoder in the dtype of its file, while diffusers loads the UNet in float32: beside a text
    encoder in half precision it takes dtype=torch.float32.
    """
    return stored_dtype(Path(folder) / "text_encoder") != "float32"


def write_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline that exists only in memory as a folder that transformers 4 and 5 both read.

    What transformers 5 alone would write opens in transformers 4 with a text encoder of random weights, or not at all.
    model_index.json is written last; weights that lie in the folder from an earlier call are deleted.

    pipeline: a StableDiffusionPipeline, with or without safety checker and feature extractor, or its XL form.

    Raises:
        EraseError: a file cannot be written.
    """
    folder = Path(folder)
    try:
        with scratch_folder(folder) as written:
            with loading():
                pipeline.save_pretrained(written)
            for component, level in _OLD_LEVELS.items():
                _restore_level(written / component / "model.safetensors", *level)
            for name in ("tokenizer", "tokenizer_2"):
                if tokenizer := getattr(pipeline, name, None):
                    tokenizer.backend_tokenizer.model.save(str(written / name))  # vocab.json and merges.txt
            for path in (written / "model_index.json", written / "feature_extractor" / "preprocessor_config.json"):
                if path.exists():
                    path.write_text(re.sub("(CLIP\\w*Processor)Pil", r"\1", path.read_text()))
            replace_file(written, folder)
    except (OSError, SafetensorError) as error:
        raise EraseError(f"cannot write {folder}: {error}; free some space or choose another folder") from error


def only_variant(names: list[str]) -> str | None:
    """The variant ("fp16") of a component that cannot be opened without naming one."""
    matches = [match for name in names if (match := WEIGHTS.fullmatch(name)) and match[3] in ("safetensors", "bin")]
    variants = {match[2] for match in matches}
    return max(variants) if variants and None not in variants else None


def component_names(folder: Path) -> list[str]:
    """Names of the component folders."""
    return list(architecture.components(folder))


def files_to_publish(base: Path, network: str) -> Iterator[tuple[str, Path]]:
    """(name in the output, file to copy) of all that is copied, except model_index.json and the weights of `network`,
    the component that was trained.
    """
    components = component_names(base)
    if network not in components:
        raise EraseError(f"{base} is not a Stable Diffusion folder: its model_index.json names no {network}")
    for component in components:
        folder = base / component
        if not folder.is_dir():
            raise EraseError(f"{base} has no folder {component!r}, which its model_index.json names; download it again")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        variant = only_variant([path.name for path in files])
        for path in files:
            if component == network and WEIGHTS.fullmatch(path.name):
                continue
            name = path.relative_to(base).as_posix()
            yield name.replace(f".{variant}.", ".") if variant else name, path
    if (base / DEFAULTS_FILE).is_file():
        yield DEFAULTS_FILE, base / DEFAULTS_FILE


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a component, from its safetensors file or shards, else from its pickle."""
    for suffix in ("safetensors", "bin"):
        if files := _weight_files(folder, suffix):
            parts = [
                read_tensors(f) if suffix == "safetensors" else torch.load(f, "cpu", weights_only=True) for f in files
            ]
            return {name: tensor for part in parts for name, tensor in part.items()}
    raise EraseError(f"{folder} has no weights")


def stored_weights(folder: Path) -> OneByOne | None:
    """All weights of a component in float32, read one by one; None if they are not in safetensors files."""
    files = _weight_files(folder, "safetensors")
    return OneByOne(files) if files else None


def _weight_files(folder: Path, suffix: str) -> list[Path]:
    """The files of a component's weights with this suffix: the plain ones, or those of its only variant.

    Of a diffusers model those that its index names, if it has one, as `from_pretrained` chooses.
    """
    matches = [match for path in sorted(folder.glob(f"*.{suffix}")) if (match := WEIGHTS.fullmatch(path.name))]
    variant = only_variant([match[0] for match in matches])
    found = [match[0] for match in matches if match[2] == variant]
    index = folder / ".".join(filter(None, ("diffusion_pytorch_model", suffix, "index", variant, "json")))
    shards = set(read_json(index, weight_map=dict)["weight_map"].values()) if index.is_file() else set[str]()
    return [folder / name for name in found if name in shards or not shards]  # a whole file beside shards is ignored


# component -> what its tensors' names begin with in files that all versions of transformers read, and where that goes:
# transformers 5.6 left a level out
_OLD_LEVELS = {
    "text_encoder": ("text_model.", ""),
    "safety_checker": ("vision_model.vision_model.", "vision_model."),
}


def _restore_level(path: Path, old: str, new: str) -> None:
    """Rename the tensors of a file from the flat layout, `new` + rest, to `old` + rest."""
    tensors = read_tensors(path) if path.exists() else {}
    if tensors and not any(name.startswith(old) for name in tensors):
        write_tensors(path, {_restored(name, old, new): tensor for name, tensor in tensors.items()})


def _restored(name: str, old: str, new: str) -> str:
    return old + name.removeprefix(new) if name.startswith(new) else name


def replace_file(source: Path, target: Path) -> None:
    """Copy all files of a pipeline folder, model_index.json last, in the place of an older one's."""
    refuse_links(target)
    (target / "model_index.json").unlink(missing_ok=True)
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for component in {name.parent for name in names if name.parent.name}:
        for path in (target / component).glob("*"):
            if WEIGHTS.fullmatch(path.name):
                path.unlink()
    for name in sorted(names, key=lambda name: name.name == "model_index.json"):
        copy(source / name, target / name)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
