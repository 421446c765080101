"""How the result leaves: a folder for diffusers, one file for ComfyUI and A1111, or a LoRA.

Only what erasure changed is written anew. Everything else is copied byte for byte, because a component that today's
libraries load and save again can come back in older ones as random weights, without an error.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from erase import architecture, compvis
from erase.delta import Layout, State, layout_of, require_layout
from erase.errors import EraseError
from erase.files import (
    content_hash,
    copy,
    file_hash,
    open_tensors,
    read_json,
    read_tensors,
    refuse_links,
    scratch_folder,
    write_tensors,
)
from erase.progress import loading

Config = Mapping[str, Any]

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
DEFAULTS_FILE = "erase_defaults.json"  # beside model_index.json: what this model needs other than Stable Diffusion 1

_WEIGHTS = re.compile(
    r"(.+?)(?:\.(\w+)(?:-\d+-of-\d+)?)?\.(safetensors|bin|ckpt|pt|pth|msgpack|h5|onnx|pb)|.+\.index(\.\w+)?\.json"
)


def save_pipeline(
    base_dir: str | Path, output_dir: str | Path, unet_state: State, *, dtype: torch.dtype | None = None
) -> None:
    """Write a pipeline folder that stock diffusers opens: the base model's files with these UNet weights.

    Copied are the components that model_index.json names, and nothing else that lies in the base folder. A component
    that has only variant files (`model.fp16.safetensors`) gets them under the plain name. model_index.json is written
    last, so a folder that opens is whole; weights that an earlier result left in `output_dir` are deleted.

    unet_state: all weights of the UNet, named as diffusers names them, without a prefix.
    dtype: of the written floating-point weights; as they are when None.

    Raises:
        EraseError: the base is not a whole Stable Diffusion folder or is the output itself, the weights do not fit its
            UNet, or a file cannot be written.
    """
    base, output = Path(base_dir), Path(output_dir)
    if base.resolve() == output.resolve():
        raise EraseError(f"{output} is the base model itself; choose another output folder")
    files = dict(_published(base))
    # diffusers leaves a weight that the file lacks empty, with no more than a warning
    unet = _unet_layout(read_json(base / "unet" / "config.json"))
    require_layout(layout_of(unet_state), unet, f"the UNet of {base}", dtypes=False)

    refuse_links(output)
    (output / "model_index.json").unlink(missing_ok=True)
    for component in _components(base):
        for path in (output / component).glob("*"):
            if _WEIGHTS.fullmatch(path.name) and f"{component}/{path.name}" not in files:
                path.unlink()
    for name, source in files.items():
        copy(source, output / name)
    write_tensors(output / UNET_FILE, {name: _cast(tensor, dtype) for name, tensor in unet_state.items()})
    copy(base / "model_index.json", output / "model_index.json")


def published_names(base_dir: str | Path) -> list[str]:
    """The files that `save_pipeline` writes, relative to its output."""
    base = Path(base_dir)
    return [*(name for name, _ in _published(base)), UNET_FILE, "model_index.json"]


def is_result(
    base_dir: str | Path, output_dir: str | Path, unet_state: State, *, dtype: torch.dtype | None = None
) -> bool:
    """Whether `output_dir` holds what `save_pipeline` with these arguments writes."""
    base, output = Path(base_dir), Path(output_dir)
    copied = [*_published(base), ("model_index.json", base / "model_index.json")]
    if not all((output / name).is_file() and file_hash(output / name) == file_hash(path) for name, path in copied):
        return False
    if not (output / UNET_FILE).is_file():
        return False
    expected = {name: _cast(tensor, dtype) for name, tensor in unet_state.items()}
    return content_hash(read_tensors(output / UNET_FILE)) == content_hash(expected)


def stored_dtype(folder: str | Path) -> str | None:
    """The dtype of a component's floating-point weights as they lie in its safetensors files, such as "float16".

    None where it has several, or other files.
    """
    names = [path.name for path in Path(folder).glob("*.safetensors") if _WEIGHTS.fullmatch(path.name)]
    variant = only_variant(names)
    found: set[str] = set()
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match and match[2] == variant:
            with open_tensors(Path(folder) / name) as file:
                found |= {str(file.get_slice(key).get_dtype()) for key in file.keys()}
    floats = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtypes = {floats[name] for name in found if name in floats}
    return dtypes.pop() if len(dtypes) == 1 else None


def needs_dtype(folder: str | Path) -> bool:
    """Whether `from_pretrained` generates images only when it is told to load this pipeline in one dtype.

    transformers keeps a text encoder in the dtype of its file, while diffusers loads the UNet in float32: beside a text
    encoder in half precision it takes dtype=torch.float32.
    """
    return stored_dtype(Path(folder) / "text_encoder") != "float32"


def write_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Write a pipeline that exists only in memory as a folder that transformers 4 and 5 both read.

    What transformers 5 alone would write opens in transformers 4 with a text encoder of random weights, or not at all.
    model_index.json is written last; weights that lie in the folder from an earlier call are deleted.

    pipeline: a StableDiffusionPipeline, with or without safety checker and feature extractor.

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
            pipeline.tokenizer.backend_tokenizer.model.save(str(written / "tokenizer"))  # vocab.json and merges.txt
            for path in (written / "model_index.json", written / "feature_extractor" / "preprocessor_config.json"):
                if path.exists():
                    path.write_text(re.sub("(CLIP\\w*Processor)Pil", r"\1", path.read_text()))
            _replace(written, folder)
    except (OSError, SafetensorError) as error:
        raise EraseError(f"cannot write {folder}: {error}; free some space or choose another folder") from error


def save_single_file(
    path: str | Path,
    pipeline_dir: str | Path,
    *,
    unet: State | None = None,
    dtype: Literal["fp16", "fp32"] = "fp16",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write UNet, VAE and text encoder of a Stable Diffusion 1 folder as one checkpoint in the CompVis (LDM) layout.

    unet: the UNet's weights; those in the folder if None. provenance: JSON-serialisable; goes into the header.

    Raises:
        EraseError: the folder is not Stable Diffusion 1, or a component has no weights.
    """
    folder = Path(pipeline_dir)
    text_config = read_json(folder / "text_encoder" / "config.json")
    if "text_encoder_2" in _components(folder) or text_config.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise EraseError(f"{folder}: only Stable Diffusion 1 models have this single-file layout; use the folder")
    unet_config = read_json(folder / "unet" / "config.json")
    levels = len(read_json(folder / "vae" / "config.json")["up_block_types"])
    checkpoint: dict[str, Tensor] = {}
    for name, tensor in (unet if unet is not None else _read_weights(folder / "unet")).items():
        checkpoint[f"model.diffusion_model.{compvis.unet_name(name, unet_config)}"] = tensor
    for name, tensor in _read_weights(folder / "vae").items():
        name = compvis.vae_name(name, levels)
        is_attention = ".attn_1." in name and tensor.ndim == 2
        checkpoint[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_attention else tensor  # 1x1 conv
    for name, tensor in _read_weights(folder / "text_encoder").items():
        if not name.endswith("position_ids"):  # 0 to 76, in old files only
            checkpoint[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    number = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    write_tensors(path, {name: _cast(tensor, number) for name, tensor in checkpoint.items()}, provenance)


@dataclass(frozen=True)
class LoraFit:
    """What a LoRA carries of a change.

    residuals: of each layer in it, the share (0 to 1, Frobenius norm) of its change that the rank cannot hold.
    left_out: share (0 to 1) of the changed weights that are in no such layer: convolutions, norms, biases, embeddings.
    """

    residuals: dict[str, float]
    left_out: float


def save_lora(
    path: str | Path,
    base_state: State,
    new_state: State,
    *,
    rank: int,
    provenance: Mapping[str, Any] | None = None,
) -> LoraFit:
    """Write the change of the UNet's attention and feed-forward layers as a LoRA of this rank.

    Each layer gets the best approximation of its change (Eckart and Young 1936). A masked fine-tune is not of low rank:
    read the residuals. Whoever has a LoRA can leave it off, so it protects nobody.

    path: diffusers looks for `pytorch_lora_weights.safetensors` in a folder.
    base_state, new_state: weights of the UNet, named as diffusers names them, without a prefix.
    provenance: JSON-serialisable; goes into the header.

    Raises:
        EraseError: no such layer changed, or rank is below 1.
    """
    if rank < 1:
        raise EraseError(f"rank must be at least 1, not {rank}")
    factors: dict[str, Tensor] = {}
    residuals: dict[str, float] = {}
    changed = {name: int((new_state[name] != base_state[name]).sum()) for name in base_state}
    for name in (name for name, count in changed.items() if count and fits_lora(name, base_state[name])):
        layer, shape = name.removesuffix(".weight"), base_state[name].shape
        change = (new_state[name].double() - base_state[name].double()).flatten(1)
        up, down = _low_rank(change, rank)
        residuals[layer] = ((change - up @ down).norm() / change.norm()).item()
        factors[f"unet.{layer}.lora_A.weight"] = down.float().reshape(rank, *shape[1:])
        factors[f"unet.{layer}.lora_B.weight"] = up.float().reshape(-1, rank, *shape[2:])
    if not factors:
        raise EraseError("no attention or feed-forward layer changed, so a LoRA has nothing to carry; save the delta")
    write_tensors(path, factors, provenance)
    carried = sum(changed[f"{layer}.weight"] for layer in residuals)
    return LoraFit(residuals, 1 - carried / sum(changed.values()))


def block_of(name: str) -> str:
    """The block of a UNet weight, for tables: "conv_in", "time_embedding", "down_blocks.0 attn2", "mid_block resnet".

    Norms inside a transformer count to the layer that they feed; a name from elsewhere gives its first part.
    """
    name = name.removeprefix("unet.")
    match = re.match(r"((?:down|up)_blocks\.\d+|mid_block)\.(attentions|resnets|downsamplers|upsamplers)\.(.+)", name)
    if not match:
        return name.split(".")[0].replace("conv_norm_out", "conv_out")
    block, kind, rest = match.groups()
    if kind != "attentions":
        return f"{block} {'resnet' if kind == 'resnets' else 'sampler'}"
    part = re.match(r"\d+\.transformer_blocks\.\d+\.(\w+)", rest)
    fed = {"norm1": "attn1", "norm2": "attn2", "norm3": "ff"}
    return f"{block} {fed.get(part[1], part[1]) if part else 'proj'}"


def only_variant(names: list[str]) -> str | None:
    """The variant ("fp16") of a component that cannot be opened without naming one."""
    matches = [match for name in names if (match := _WEIGHTS.fullmatch(name)) and match[3] in ("safetensors", "bin")]
    variants = {match[2] for match in matches}
    return max(variants) if variants and None not in variants else None


def fits_lora(name: str, weight: Tensor) -> bool:
    """Linear layers and 1x1 convolutions of the transformer blocks."""
    return ".attentions." in name and weight.ndim >= 2 and all(size == 1 for size in weight.shape[2:])


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, rank] and [rank, n] whose product is the best approximation of `change` [m, n] of that rank.

    The leading singular vectors of the short side are the eigenvectors of its Gram matrix. Factors of fewer dimensions
    are filled up with zeros: loaders that see two ranks in a file without alphas have scaled one of them.
    """
    if change.shape[0] > change.shape[1]:
        up, down = _low_rank(change.T, rank)
        return down.T, up.T
    up = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]
    up = torch.nn.functional.pad(up, (0, rank - up.shape[1]))
    return up, up.T @ change


def _components(folder: Path) -> list[str]:
    """Names of the component folders."""
    return list(architecture.components(folder))


def _published(base: Path) -> Iterator[tuple[str, Path]]:
    """(name in the output, file to copy) of all that is copied, except model_index.json and the UNet's weights."""
    components = _components(base)
    if "unet" not in components:
        raise EraseError(f"{base} is not a Stable Diffusion folder: its model_index.json names no unet")
    for component in components:
        folder = base / component
        if not folder.is_dir():
            raise EraseError(f"{base} has no folder {component!r}, which its model_index.json names; download it again")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        variant = only_variant([path.name for path in files])
        for path in files:
            if component == "unet" and _WEIGHTS.fullmatch(path.name):
                continue
            name = path.relative_to(base).as_posix()
            yield name.replace(f".{variant}.", ".") if variant else name, path
    if (base / DEFAULTS_FILE).is_file():
        yield DEFAULTS_FILE, base / DEFAULTS_FILE


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a component, from its safetensors file or shards, else from its pickle."""
    for suffix in ("safetensors", "bin"):
        matches = [match for path in sorted(folder.glob(f"*.{suffix}")) if (match := _WEIGHTS.fullmatch(path.name))]
        variant = only_variant([match[0] for match in matches])
        files = [folder / match[0] for match in matches if match[2] == variant]
        if files:
            parts = [
                read_tensors(f) if suffix == "safetensors" else torch.load(f, "cpu", weights_only=True) for f in files
            ]
            return {name: tensor for part in parts for name, tensor in part.items()}
    raise EraseError(f"{folder} has no weights")


def _unet_layout(config: Config) -> Layout:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    return layout_of(unet.state_dict())


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


def _replace(source: Path, target: Path) -> None:
    """Copy all files of a pipeline folder, model_index.json last, in the place of an older one's."""
    refuse_links(target)
    (target / "model_index.json").unlink(missing_ok=True)
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for component in {name.parent for name in names if name.parent.name}:
        for path in (target / component).glob("*"):
            if _WEIGHTS.fullmatch(path.name):
                path.unlink()
    for name in sorted(names, key=lambda name: name.name == "model_index.json"):
        copy(source / name, target / name)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
