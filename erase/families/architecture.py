"""Which kind of model a folder or a checkpoint is, told from its names and configs before any weight is loaded.

Only text-to-image Stable Diffusion 1, 2, XL and 3 can be erased from; every other kind is refused by its name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erase.errors import EraseError
from erase.files import read_json

KNOWN = "this version knows text-to-image Stable Diffusion 1, 2, XL and 3, and class-conditional pixel models"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")

# the first that matches counts
_PIPELINES = {
    "StableDiffusionXL": "Stable Diffusion XL for another task than text to image",
    "StableDiffusion3": "Stable Diffusion 3 for another task than text to image",
    "Flux": "FLUX",
    "StableCascade": "Stable Cascade",
    "StableUnCLIP": "Stable unCLIP",
    "StableDiffusionControlNet": "a pipeline with a ControlNet",
    "StableDiffusionAdapter": "a pipeline with a T2I-Adapter",
    "AnimateDiff": "AnimateDiff",
    "LatentConsistency": "a latent consistency model (LCM)",
    "IF": "DeepFloyd IF",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
    "AltDiffusion": "AltDiffusion",
}
_COMPONENTS = {
    "text_encoder_3": "a pipeline with a third text encoder that is not a StableDiffusion3Pipeline",
    "text_encoder_2": "a pipeline with a second text encoder that is not a StableDiffusionXLPipeline",
    "transformer": "a diffusion transformer other than Stable Diffusion 3's, such as FLUX or PixArt",
    "controlnet": "a pipeline with a ControlNet",
    "adapter": "a pipeline with a T2I-Adapter",
    "motion_adapter": "AnimateDiff",
    "prior": "a pipeline with a prior, such as Stable Cascade or Kandinsky",
}
_CHANNELS = {
    5: "a depth-to-image model (its UNet takes 5 channels)",
    7: "an upscaler (its UNet takes 7 channels)",
    8: "an image editing model such as InstructPix2Pix (its UNet takes 8 channels)",
    9: "an inpainting model (its UNet takes 9 channels)",
}
# what a UNet's config has beside Stable Diffusion's
_ADDITIONS = {
    "addition_embed_type": "a UNet with additional embeddings, such as Stable Diffusion XL's",
    "encoder_hid_dim_type": "a UNet with projected conditions, such as Kandinsky's or an IP-Adapter's",
    "class_embed_type": "a UNet with class embeddings, such as Stable unCLIP's",
    "num_class_embeds": "a UNet with class embeddings, such as an upscaler's",
    "time_cond_proj_dim": "a latent consistency model (LCM)",
}
# component -> its class; "" is any
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel", "tokenizer": ""}
_SDXL_CLASSES = _CLASSES | {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": ""}
_SD3_FILE = "Stable Diffusion 3 as a single file (its diffusers folder is read)"
_SD3_CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
COMPVIS_INPUT = "model.diffusion_model.input_blocks.0.0.weight"  # the UNet's first weight, in the original layout
_SDXL = "Stable Diffusion XL"
_LORA = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", "lora_unet_", "lora_te_")


def refused_kinds() -> list[str]:
    """The kinds of models that are refused by name, as the messages call them."""
    kinds = ["the refiner of Stable Diffusion XL", *_PIPELINES.values(), *_CHANNELS.values(), *_ADDITIONS.values()]
    return list(
        dict.fromkeys([*kinds, *_COMPONENTS.values(), _SD3_FILE, "an EDM model, such as Playground v2.5", "GLIGEN"])
    )


def components(folder: Path) -> dict[str, str]:
    """Component -> its class, of those that the folder's model_index.json fills; a name that is a path is none.

    Raises:
        EraseError: no such file, or it is not what diffusers writes.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        raise EraseError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline")
    found = {}
    for name, kind in read_json(path).items():
        if not name.isidentifier() or not isinstance(kind, list):
            if name in PARTS:
                raise EraseError(f"{path}: {name} is {kind!r:.60}; it must be a list of a library and a class")
            continue
        if len(kind) != 2 or not all(part is None or isinstance(part, str) for part in kind):
            raise EraseError(f"{path}: {name} is {kind!r:.60}; it must be a list of a library and a class")
        if kind[0] and kind[1]:
            found[name] = kind[1]
    return found


def pipeline_class(folder: Path) -> str:
    """The class name of a pipeline folder, as its model_index.json states it.

    Raises:
        EraseError: the folder is not a pipeline's.
    """
    if not (folder / "model_index.json").is_file():
        raise EraseError(_not_a_pipeline(folder))
    components(folder)
    return str(read_json(folder / "model_index.json").get("_class_name"))


def require_known(source: str | Path, folder: Path) -> None:
    """Raise an EraseError that names the kind of a pipeline folder, unless it is text-to-image Stable Diffusion."""
    pipeline_class(folder)
    kind = of_pipeline(folder)
    if kind:
        raise refusal(source, kind)


def of_pipeline(folder: Path) -> str | None:
    """The kind of a pipeline folder; None for text-to-image Stable Diffusion."""
    found, name = components(folder), pipeline_class(folder)
    if name.startswith("StableDiffusionXL") and "text_encoder" not in found:
        return "the refiner of Stable Diffusion XL"
    for start, kind in _PIPELINES.items():
        if name.startswith(start):
            return kind
    for component, kind in _COMPONENTS.items():
        if component in found:
            return kind
    surplus = sorted(found.keys() - {*PARTS, *_OPTIONAL})
    if surplus and not name.startswith("StableDiffusion"):
        return f"a {name} with the component {surplus[0]!r}"
    if kind := _of_parts(name, found, _CLASSES):
        return kind
    return of_unet(read_json(folder / "unet" / "config.json")) if (folder / "unet" / "config.json").is_file() else None


def of_sdxl(folder: Path) -> str | None:
    """The kind of a pipeline folder of the class StableDiffusionXLPipeline; None for its base model."""
    found, path = components(folder), folder / "unet" / "config.json"
    if "text_encoder" not in found:
        return "the refiner of Stable Diffusion XL"
    if kind := _of_parts("StableDiffusionXLPipeline", found, _SDXL_CLASSES):
        return kind
    if not path.is_file():
        return None
    config = dict(read_json(path))
    if config.get("addition_embed_type") != "text_time":
        return "a Stable Diffusion XL pipeline whose UNet takes no pooled text and sizes"
    return of_unet(config | {"addition_embed_type": None})


def of_sd3(folder: Path) -> str | None:
    """The kind of a pipeline folder of the class StableDiffusion3Pipeline; None for text to image."""
    return _of_parts("StableDiffusion3Pipeline", components(folder), _SD3_CLASSES, flow=True)


def _of_parts(name: str, found: Mapping[str, str], classes: Mapping[str, str], *, flow: bool = False) -> str | None:
    """What a pipeline of this class name is that lacks a component, or has one of another class than these.

    flow: whether its scheduler is to be one for flow matching.
    """
    for component in (*classes, "scheduler"):
        if component not in found:
            return f"a {name} without the component {component!r}"
    for component, expected in classes.items():
        if expected and found[component] != expected:
            return f"a pipeline whose {component.replace('_', ' ')} is {found[component]} instead of {expected}"
    if found["scheduler"].startswith("FlowMatch") and not flow:
        return f"a flow-matching model (its scheduler is {found['scheduler']})"
    if found["scheduler"].startswith("EDM"):
        return f"an EDM model, such as Playground v2.5 (its scheduler is {found['scheduler']})"
    return None


def of_unet(config: Mapping[str, Any]) -> str | None:
    """The kind of a UNet by its config; None for text-to-image Stable Diffusion's."""
    channels = config.get("in_channels", 4)
    if isinstance(channels, int) and channels in _CHANNELS:
        return _CHANNELS[channels]
    for name, kind in _ADDITIONS.items():
        if config.get(name) is not None:
            return kind
    return "GLIGEN" if config.get("attention_type", "default") != "default" else None


def of_checkpoint(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The kind of a single file by the names and shapes of its tensors; None for CompVis' Stable Diffusion 1 and 2."""
    names = list(shapes)

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    if attached_lora(names):
        return "a LoRA, not a model; merge it into its base model first (pipeline.fuse_lora()) and save that"
    first = shapes.get(COMPVIS_INPUT)
    channels = first[1] if first is not None and len(first) > 1 else 0
    if any(name.startswith("edm_") for name in names):
        return "an EDM model, such as Playground v2.5"
    if has("conditioner.embedders.1."):
        return _CHANNELS.get(channels, _SDXL) if first is not None else "a part of Stable Diffusion XL without its UNet"
    if has("conditioner.embedders.0."):
        return "the refiner of Stable Diffusion XL"
    if has("model.diffusion_model.joint_blocks.", "joint_blocks."):
        return _SD3_FILE
    if has("model.diffusion_model.double_blocks.", "double_blocks."):
        return "FLUX"
    if has("control_model.", "input_hint_block.", "controlnet_cond_embedding.", "control_"):
        return "a ControlNet"
    if has("emb_params", "string_to_param", "<"):
        return "a textual inversion embedding"
    if first is not None and channels in _CHANNELS:
        return _CHANNELS[channels]
    if first is not None and has("cond_stage_model.", "first_stage_model."):
        return (
            "a UNet with class embeddings, such as Stable unCLIP's" if has("model.diffusion_model.label_emb.") else None
        )
    if first is not None or has("down_blocks.", "unet.", "input_blocks.", "module.down_blocks."):
        return "the weights of a UNet only; give its base as the model, and this file as --unet"
    if has("decoder.", "encoder.", "first_stage_model."):
        return "the weights of a VAE only"
    return None


def of_sdxl_checkpoint(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The kind of a single file by the names and shapes of its tensors; None for Stable Diffusion XL's base model."""
    kind = of_checkpoint(shapes)
    return None if kind == _SDXL else kind or "Stable Diffusion 1 or 2"


def attached_lora(names: Sequence[str]) -> str | None:
    """The first of these names of weights that belongs to a LoRA."""
    return next((name for name in names if any(mark in name for mark in (*_LORA, ".base_layer."))), None)


def refusal(source: str | Path, kind: str) -> EraseError:
    return EraseError(f"{source} is {kind}" + ("" if ";" in kind else f", which this version does not know; {KNOWN}"))


def _not_a_pipeline(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file() or [*folder.glob("*lora*.safetensors")]:
        return (
            f"{folder} is a LoRA, not a model; merge it into its base model first (pipeline.fuse_lora()) and save that"
        )
    kind = read_json(folder / "config.json").get("_class_name") if (folder / "config.json").is_file() else None
    if kind == "UNet2DConditionModel":
        return f"{folder} is a UNet only; give its base as the model, and the file of weights in it as --unet"
    if kind:
        return f"{folder} is a single component ({kind!r:.60}); give the folder of a whole diffusers pipeline"
    return f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline"
