"""Stable Diffusion XL: two text encoders, pooled text states and sizes beside Stable Diffusion's inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.delta import State
from erase.device import dtype_of, place_of, staged
from erase.families import architecture, checkpoint, compvis, layers, pipeline_folder, scope, sdxl_parts, supported
from erase.families.clip_text import Put, between_ends, replacing
from erase.families.sd import StableDiffusion
from erase.families.supported import Model
from erase.files import read_json


@dataclass
class StableDiffusionXL(StableDiffusion):
    """The base model of Stable Diffusion XL, and its distilled forms such as SDXL-Turbo; text to image.

    The pooled text states reach the UNet through `add_embedding`, outside attention. Scopes of attention layers and
    closed forms leave these weights as they are; scope `pooled` is these weights alone.

    zeros: the unconditional branch has states of zeros (the pipeline's `force_zeros_for_empty_prompt`), as the base
        model was published; otherwise it is that of the empty prompt.
    """

    family = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    data_parts = ("vae", "text_encoder", "text_encoder_2")
    other_parts = ()  # a scope of one of two text encoders would leave the concept in the other
    loaded_again: ClassVar[Mapping[str, Any]] = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {
        **scope.SCOPES,
        "pooled": lambda name: name.startswith("add_embedding."),
        "noxattn": lambda name: scope.SCOPES["noxattn"](name) and not name.startswith("add_embedding."),
        "notime": lambda name: scope.SCOPES["notime"](name) and not name.startswith("add_embedding."),
    }
    guidance_scale = 5.0
    tags = ("stable-diffusion-xl",)
    licences = {"stabilityai/stable-diffusion-xl": "openrail++"}
    models = (
        Model("Stable Diffusion XL base and fine-tunes of it"),
        Model("Stable Diffusion XL, v prediction"),
        Model("SDXL-Turbo", guided=False, options=supported.DISTILLED),
        Model("SDXL-Lightning", guided=False, options=supported.DISTILLED),
    )

    text_encoder_2: CLIPTextModelWithProjection = field(kw_only=True)
    tokenizer_2: CLIPTokenizer = field(kw_only=True)
    zeros: bool = field(default=True, kw_only=True)

    @classmethod
    def other_kind(cls, folder: Path) -> str | None:
        return architecture.of_sdxl(folder)

    @classmethod
    def kind_of_file(cls, shapes: Mapping[str, Sequence[int]]) -> str | None:
        return architecture.of_sdxl_checkpoint(shapes)

    @classmethod
    def no_checkpoint(cls, folder: Path) -> str | None:
        return compvis.no_layout(read_json(folder / "unet" / "config.json"))

    @classmethod
    def checkpoint(cls, folder: Path, network: State | None = None) -> dict[str, Tensor]:
        return checkpoint.sdxl(folder, network)

    @classmethod
    def lora_names(cls, folder: Path, weights: Iterable[str]) -> dict[str, str]:
        """By the original layout's names, the only ones that kohya's trainer reads."""
        names = compvis.unet_names(weights, read_json(folder / "unet" / "config.json"))
        return {layers.layer_of(ours): layers.lora_name(layers.layer_of(theirs)) for ours, theirs in names.items()}

    @classmethod
    def lora_labels(cls, folder: Path) -> dict[str, str]:
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}

    @classmethod
    def read_parts(cls, source: str | Path, folder: Path, **how: Any) -> sdxl_parts.Parts:
        return sdxl_parts.read(source, folder, **how)

    @classmethod
    def own_parts(cls, parts: sdxl_parts.Parts) -> dict[str, Any]:
        return {name: getattr(parts, name) for name in ("text_encoder_2", "tokenizer_2", "zeros")}

    @classmethod
    def needs_dtype(cls, folder: Path) -> bool:
        stored = (pipeline_folder.stored_dtype(folder / part) for part in ("text_encoder", "text_encoder_2"))
        return any(dtype != "float32" for dtype in stored)

    def blank_inputs(self, num: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
        pooled = self.unet.config["projection_class_embeddings_input_dim"] - self._sizes_width
        added = {"text_embeds": torch.empty(num, pooled, dtype=dtype), "time_ids": torch.empty(num, 6, dtype=dtype)}
        return super().blank_inputs(num, size, dtype) | {"added_cond_kwargs": added}

    @property
    def _sizes_width(self) -> int:
        return 6 * self.unet.config["addition_time_embed_dim"]

    # --- prediction ---

    def inputs_of(self, x: Tensor, c: Conditioning) -> dict[str, Any]:
        """Without sizes in `c`, original and target size are those of the images, and nothing is cropped."""
        assert c.pooled is not None
        sizes = c.sizes
        if sizes is None:
            height, width = (side * self.vae_scale for side in x.shape[2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x.device).expand(len(x), -1)
        dtype = dtype_of(self.unet)
        added = {"text_embeds": c.pooled.to(dtype), "time_ids": sizes.to(dtype)}
        return super().inputs_of(x, c) | {"added_cond_kwargs": added}

    # --- text ---

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
        """States of both text encoders side by side and the pooled states of the second, on the CPU."""
        refusal.refuse(prompts, "prompt")
        found = []
        for start in range(0, len(prompts), batch_size):
            one = self._on_device(prompts[start : start + batch_size])
            found.append(one.to("cpu"))
        return Conditioning.cat(found) if found else self.encode_text([""])[:0]

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        return self._states([self._padded_tokens(prompts), self._padded_tokens(prompts, self.tokenizer_2)])

    def _states(self, ids: Sequence[Tensor]) -> Conditioning:
        """The second last hidden states of each encoder, without its final norm, as the pipeline takes them."""
        encoders: list[Any] = [self.text_encoder, self.text_encoder_2]
        outputs = [e(staged(i, place_of(e)), output_hidden_states=True) for e, i in zip(encoders, ids, strict=True)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return Conditioning(states, pooled=outputs[1].text_embeds)

    def encode_tokens(
        self, tokens: Sequence[Sequence[int]], embeddings: Tensor | None = None, at: Sequence[int] | None = None
    ) -> Conditioning:
        ends = [self._padded_tokens([""], tokenizer)[0].tolist() for tokenizer in (self.tokenizer, self.tokenizer_2)]
        ids = [between_ends(tokens, empty) for empty in ends]
        if embeddings is None:
            return self._states(ids)
        with self._embedding(lambda part: replacing(part, at), embeddings):
            return self._states(ids)

    def unconditional(self, empty: Conditioning | None = None) -> Conditioning:
        empty = self.encode_text([""]) if empty is None else empty
        if not self.zeros:
            return empty
        assert empty.pooled is not None
        return Conditioning(torch.zeros_like(empty.text_states), pooled=torch.zeros_like(empty.pooled))

    @property
    def text_encoders(self) -> Sequence[torch.nn.Module]:
        return self.text_encoder, self.text_encoder_2

    @property
    def _tables(self) -> list[Any]:
        return [encoder.get_input_embeddings() for encoder in (self.text_encoder, self.text_encoder_2)]

    @property
    def token_embeddings(self) -> Tensor:
        """Those of both encoders side by side; see `set_token`."""
        return torch.cat([table.weight for table in self._tables], 1)

    def set_token(self, token: int, embedding: Tensor) -> None:
        tables = self._tables
        with torch.no_grad():
            for table, part in zip(tables, self._split(embedding, tables), strict=True):
                table.weight[token] = part.to(table.weight)

    def encode_with(self, prompts: Sequence[str], token: int, embedding: Tensor) -> Conditioning:
        refusal.refuse(prompts, "prompt")

        def putting(part: Tensor) -> Put:
            return lambda read, output: torch.where((read == token)[..., None], part, output)

        with self._embedding(putting, embedding):
            return self._on_device(prompts)

    @contextmanager
    def _embedding(self, putting: Callable[[Tensor], Put], embedding: Tensor) -> Iterator[None]:
        """Inside, each encoder's table of embeddings answers what `putting` makes of its share of `embedding`."""

        def hook(put: Put) -> Any:
            return lambda module, arguments, output: put(arguments[0], output)

        tables = self._tables
        shares = zip(tables, self._split(embedding, tables), strict=True)
        hooks = [table.register_forward_hook(hook(putting(share))) for table, share in shares]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()

    @staticmethod
    def _split(embedding: Tensor, tables: Sequence[Any]) -> Sequence[Tensor]:
        return embedding.split([table.weight.shape[1] for table in tables], -1)

    # --- images ---

    @property
    def vae_precision(self) -> str:
        """float32 in place of fp16 where the VAE's config has `force_upcast`: the published VAE overflows in fp16."""
        return "fp32" if self.precision == "fp16" and self.vae.config["force_upcast"] else self.precision

    def assembled(self, unet: UNet2DConditionModel, scheduler: SchedulerMixin) -> Any:
        """Without a watermark, which the pipeline adds where its package is installed."""
        parts: dict[str, Any] = {part: getattr(self, part) for part in self.parts if part != self.part}
        return StableDiffusionXLPipeline(
            **parts,
            unet=unet,
            scheduler=scheduler,  # pyright: ignore[reportArgumentType]
            force_zeros_for_empty_prompt=self.zeros,
            add_watermarker=False,
        )
