"""Stable Diffusion 1 and 2: their folders and files, their parts, and the names of their weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from erase.conditioning import Conditioning
from erase.delta import State
from erase.families import (
    architecture,
    attention,
    checkpoint,
    compvis,
    layers,
    pipeline_folder,
    scope,
    sd_parts,
    single_file,
    supported,
)
from erase.families.clip_text import ClipText
from erase.families.discrete import DiscreteDiffusion
from erase.families.protocol import Family
from erase.families.stored_unet import load_unet
from erase.families.supported import Model
from erase.families.text_trained import text_trained
from erase.files import read_json
from erase.guards import Guard
from erase.options.model_defaults import read_defaults


@dataclass
class StableDiffusion(ClipText, DiscreteDiffusion):
    """Stable Diffusion 1 or 2, text to image.

    allow_pickle: how the parts were loaded, for when they are loaded again.
    weights_file: weights that replaced the folder's in the UNet; see `erase.families.unet_file`.
    """

    family = "sd"
    pipelines = ("StableDiffusionPipeline",)
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    data_parts = ("vae", "text_encoder")
    other_parts = ("text_encoder",)
    scopes = scope.SCOPES
    guidance_scale = 7.5
    tags = ("stable-diffusion",)
    licences = {"CompVis/stable-diffusion": "creativeml-openrail-m"}
    models = (
        Model("Stable Diffusion 1.1 to 1.5 and fine-tunes of it"),
        Model("Stable Diffusion 1 with an LCM-LoRA merged", guided=False, options=supported.DISTILLED),
        Model("Stable Diffusion 2.0 and 2.1, epsilon prediction"),
        Model("Stable Diffusion 2.0 and 2.1, v prediction"),
        Model("SD-Turbo", guided=False, options=supported.DISTILLED),
        Model("the embedded model, `mini`"),
    )
    loaded_again: ClassVar[Mapping[str, Any]] = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel}

    name: str
    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    defaults: dict[str, Any]
    allow_pickle: bool = False
    guard: Guard | None = None
    weights_file: str | None = None
    notes: tuple[str, ...] = ()
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.vae_scale: int = 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # also while the VAE is released
        self.read_schedule()

    @classmethod
    def trains(cls, part: str) -> type[Family]:
        return text_trained(cls) if part in cls.other_parts else super().trains(part)

    @classmethod
    def other_kind(cls, folder: Path) -> str | None:
        return architecture.of_pipeline(folder)

    @classmethod
    def from_folder(
        cls, source: str | Path, folder: Path, *, allow_pickle: bool = False, weights_file: str | Path | None = None
    ) -> Self:
        parts = cls.read_parts(source, folder, allow_pickle=allow_pickle, unet=weights_file)
        return cls(
            f"{source} with {Path(weights_file).name}" if weights_file else str(source),
            folder,
            parts.unet,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            parts.scheduler,
            read_defaults(folder / pipeline_folder.DEFAULTS_FILE),
            allow_pickle,
            weights_file=None if weights_file is None else str(weights_file),
            notes=parts.notes,
            **cls.own_parts(parts),
        )

    @classmethod
    def read_parts(cls, source: str | Path, folder: Path, **how: Any) -> Any:
        """The components of a folder, checked; see `sd_parts.read`."""
        return sd_parts.read(source, folder, **how)

    @classmethod
    def own_parts(cls, parts: Any) -> dict[str, Any]:
        """The fields that this class adds."""
        return {}

    @classmethod
    def read_network(
        cls,
        folder: Path,
        *,
        allow_pickle: bool = False,
        weights_file: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> UNet2DConditionModel:
        return load_unet(folder, allow_pickle, weights_file, tell)

    @classmethod
    def knows_file(cls, shapes: Mapping[str, Sequence[int]]) -> bool:
        return architecture.COMPVIS_INPUT in shapes and cls.kind_of_file(shapes) is None

    @classmethod
    def kind_of_file(cls, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """What a single file is, by the names and shapes of its tensors, if this class cannot read it; else None."""
        return architecture.of_checkpoint(shapes)

    @classmethod
    def convert(
        cls, path: Path, *, allow_pickle: bool = False, config: str | None = None, cache_dir: Path | None = None
    ) -> tuple[Path, list[str]]:
        how: dict[str, Any] = {"allow_pickle": allow_pickle, "config": config, "cache_dir": cache_dir}
        return single_file.convert(path, cls, cls.kind_of_file, **how)

    @staticmethod
    def _is_second(folder: Path) -> bool:
        """Whether a folder is Stable Diffusion 2, by the activation of its OpenCLIP text encoder."""
        text = read_json(folder / "text_encoder" / "config.json")
        return text.get("hidden_act", "quick_gelu") != "quick_gelu"

    @classmethod
    def no_checkpoint(cls, folder: Path) -> str | None:
        return compvis.no_layout(read_json(folder / "unet" / "config.json"))

    @classmethod
    def checkpoint(cls, folder: Path, network: State | None = None) -> dict[str, Tensor]:
        return (checkpoint.sd2 if cls._is_second(folder) else checkpoint.sd1)(folder, **{cls.part: network})

    @classmethod
    def keep(cls, pipeline: Any, cache_dir: Path | None = None) -> Path:
        return single_file.keep(pipeline, cls, cache_dir)

    @classmethod
    def needs_dtype(cls, folder: Path) -> bool:
        return pipeline_folder.needs_dtype(folder)

    def stored_network(self) -> UNet2DConditionModel:
        return self.read_network(self.folder, allow_pickle=self.allow_pickle, weights_file=self.weights_file)

    def is_text_map(self, name: str) -> bool:
        return name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))

    def is_value_map(self, name: str) -> bool:
        return name.endswith("attn2.to_v.weight")

    def fits_lora(self, name: str, weight: Tensor) -> bool:
        return layers.fits_lora(name, weight)

    @classmethod
    def lora_names(cls, folder: Path, weights: Iterable[str]) -> dict[str, str]:
        """By diffusers' names, as kohya's trainer has them for Stable Diffusion 1 and 2."""
        return {layer: layers.lora_name(layer) for layer in map(layers.layer_of, weights)}

    @classmethod
    def lora_labels(cls, folder: Path) -> dict[str, str]:
        is_second = cls._is_second(folder)
        return {"ss_base_model_version": "sd_v2" if is_second else "sd_v1", "ss_v2": str(is_second)}

    def reference_names(self) -> dict[str, str]:
        """By CompVis' names, as SalUn's code stores them."""
        return {theirs: ours for ours, theirs in compvis.unet_names(self.unet.state_dict(), self.unet.config).items()}

    def blank_inputs(self, num: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
        width = self.unet.config["cross_attention_dim"]
        return {
            "sample": torch.empty(num, *self.latent_shape(size), dtype=dtype),
            "timestep": torch.zeros(num, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(num, self.max_tokens, width, dtype=dtype),
        }

    def assembled(self, unet: UNet2DConditionModel, scheduler: SchedulerMixin) -> Any:
        """diffusers' pipeline of the model's parts with this UNet and scheduler."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=scheduler,  # pyright: ignore
            safety_checker=None,  # pyright: ignore
            feature_extractor=None,  # pyright: ignore
            requires_safety_checker=False,
        )

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        return attention.cross_attention(self.unet, lambda: self(x, t, c))

    def use_attention(self, kind: str) -> None:
        """`sdpa` is what diffusers does by itself; `xformers` needs its package and a GPU that it has kernels for."""
        if kind == "xformers":
            attention.use_xformers(self.unet, self.device)
