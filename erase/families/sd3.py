"""Stable Diffusion 3: a transformer that predicts the velocity of a rectified flow. Experimental."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.device import dtype_of, place_of, staged
from erase.families import architecture, components, pipeline_folder, sd3_parts, unet_file
from erase.families.flow import RectifiedFlow
from erase.families.protocol import TokenRun
from erase.families.stored_unet import reading
from erase.families.supported import Model
from erase.guards import Guard
from erase.options.model_defaults import read_defaults

_TEXT = ("context_embedder.", "time_text_embed.text_embedder.")  # the maps of text states that are only of the text
_TEXT_MAP = "context_embedder.weight"
_JOINT = (".attn.add_q_proj.", ".attn.add_k_proj.", ".attn.add_v_proj.", ".attn.to_add_out.")
_TIME = ("time_text_embed.timestep_embedder.", "norm_out.", "proj_out.")


def _is_attention(name: str) -> bool:
    return ".attn." in name or ".attn2." in name  # the second, of image tokens alone, is in some blocks of 3.5


@dataclass
class StableDiffusion3(RectifiedFlow):
    """Stable Diffusion 3 and 3.5 with their three text encoders, text to image.

    Esser et al., ICML 2024, arXiv:2403.03206.

    Text states are those of both CLIP encoders side by side, filled up with zeros to the width of T5's, then T5's.
    Attention is joint, and behind the first block a text token holds the image too. So `xattn` is the projections of
    the text tokens with the two maps through which all text enters, and `xattn-kv`, on which closed forms act, the map
    of the text states alone (`context_embedder`); pooled states pass beside it.

    weights_file: weights that replaced the folder's.
    """

    family = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    part = "transformer"
    parts = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    data_parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    loaded_again: ClassVar[Mapping[str, Any]] = {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    scopes: ClassVar[Mapping[str, Callable[[str], bool]]] = {
        "full": lambda name: True,
        "xattn": lambda name: name.startswith(_TEXT) or any(part in name for part in _JOINT),
        "xattn-kv": lambda name: name == _TEXT_MAP,
        "attn": lambda name: name.startswith(_TEXT) or _is_attention(name),
        "selfattn": lambda name: _is_attention(name) and not any(part in name for part in _JOINT),
        "noxattn": lambda name: not name.startswith((*_TEXT, *_TIME)) and not any(part in name for part in _JOINT),
        "notime": lambda name: not name.startswith(_TIME),
        "pooled": lambda name: name.startswith(_TEXT[1]),
    }
    guidance_scale = 7.0
    models = (Model("Stable Diffusion 3 and 3.5 with T5, experimental", read=False, written=False),)
    tags = ("stable-diffusion-3",)
    licences: ClassVar[Mapping[str, str]] = {}

    name: str
    folder: Path
    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: Any
    scheduler: FlowMatchEulerDiscreteScheduler
    defaults: dict[str, Any]
    allow_pickle: bool = False
    guard: Guard | None = None
    weights_file: str | None = None
    notes: tuple[str, ...] = ()
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.vae_scale = 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # also while the VAE is released
        self.read_schedule()

    @classmethod
    def other_kind(cls, folder: Path) -> str | None:
        return architecture.of_sd3(folder)

    @classmethod
    def from_folder(
        cls, source: str | Path, folder: Path, *, allow_pickle: bool = False, weights_file: str | Path | None = None
    ) -> Self:
        parts = sd3_parts.read(source, folder, allow_pickle=allow_pickle, weights_file=weights_file)
        return cls(
            f"{source} with {Path(weights_file).name}" if weights_file else str(source),
            folder,
            **{name: getattr(parts, name) for name in (*cls.parts, "scheduler", "notes")},
            defaults=read_defaults(folder / pipeline_folder.DEFAULTS_FILE),
            allow_pickle=allow_pickle,
            weights_file=None if weights_file is None else str(weights_file),
        )

    @classmethod
    def read_network(
        cls,
        folder: Path,
        *,
        allow_pickle: bool = False,
        weights_file: str | Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> SD3Transformer2DModel:
        with reading(folder):
            network = components.load(SD3Transformer2DModel, folder / cls.part, allow_pickle=allow_pickle)
            if weights_file is not None:
                for note in unet_file.put_into(network, weights_file, allow_pickle=allow_pickle):
                    tell(note)
        return network

    @classmethod
    def needs_dtype(cls, folder: Path) -> bool:
        return any(pipeline_folder.stored_dtype(folder / part) != "float32" for part in sd3_parts.ENCODERS)

    def stored_network(self) -> SD3Transformer2DModel:
        return self.read_network(self.folder, allow_pickle=self.allow_pickle, weights_file=self.weights_file)

    def is_text_map(self, name: str) -> bool:
        return name == _TEXT_MAP

    def is_value_map(self, name: str) -> bool:
        return name == _TEXT_MAP

    def fits_lora(self, name: str, weight: Tensor) -> bool:
        return name.endswith(".weight") and weight.ndim == 2 and (_is_attention(name) or ".ff" in name)

    def blank_inputs(self, num: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
        config = self.transformer.config
        return {
            "hidden_states": torch.empty(num, *self.latent_shape(size), dtype=dtype),
            "timestep": torch.zeros(num),
            "encoder_hidden_states": torch.empty(num, self.max_tokens, config["joint_attention_dim"], dtype=dtype),
            "pooled_projections": torch.empty(num, config["pooled_projection_dim"], dtype=dtype),
        }

    @property
    def multiple(self) -> int:
        return self.vae_scale * int(self.transformer.config["patch_size"])

    def inputs_of(self, c: Conditioning) -> dict[str, Any]:
        assert c.pooled is not None
        dtype = dtype_of(self.transformer)
        return {"encoder_hidden_states": c.text_states.to(dtype), "pooled_projections": c.pooled.to(dtype)}

    # --- text ---

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
        """States [len(prompts), 77 + 256, d] and pooled states, on the CPU."""
        refusal.refuse(prompts, "prompt")
        parts = (prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size))
        found = [self._on_device(part).to("cpu") for part in parts]
        return Conditioning.cat(found) if found else self.encode_text([""])[:0]

    def _on_device(self, prompts: Sequence[str]) -> Conditioning:
        """As by the pipeline's `encode_prompt`, whose tokens wait for the GPU."""
        lengths = (self.tokenizer.model_max_length,) * 2 + (T5_TOKENS,)
        parts: list[tuple[Any, Any]] = [
            (self.tokenizer, self.text_encoder),
            (self.tokenizer_2, self.text_encoder_2),
            (self.tokenizer_3, self.text_encoder_3),
        ]
        outputs = []
        for (tokenizer, encoder), length in zip(parts, lengths, strict=True):
            how: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
            ids = tokenizer(list(prompts), return_tensors="pt", **how)["input_ids"]
            outputs.append(encoder(staged(ids, place_of(encoder)), output_hidden_states=True))
        first, second, t5 = outputs
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        clip = F.pad(clip, (0, t5.last_hidden_state.shape[-1] - clip.shape[-1]))
        pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
        return Conditioning(torch.cat([clip, t5.last_hidden_state], 1), pooled=pooled)

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.model_max_length + T5_TOKENS

    def tokens(self, prompt: str) -> list[int]:
        """Those of CLIP."""
        ids: Any = self.tokenizer(prompt, truncation=True, max_length=self.tokenizer.model_max_length)["input_ids"]
        return list(ids[1:-1])

    def all_tokens(self, prompt: str) -> list[int]:
        ids: Any = self.tokenizer(prompt, verbose=False)["input_ids"]
        return list(ids[1:-1])

    def truncates(self, prompt: str) -> bool:
        """Whether CLIP's encoders or T5 read a part only."""
        ids: Any = self.tokenizer_3(prompt, verbose=False)["input_ids"]
        return len(self.all_tokens(prompt)) > self.tokenizer.model_max_length - 2 or len(ids) > T5_TOKENS

    def token_runs(self, prompt: str) -> list[TokenRun]:
        """CLIP's tokens, then T5's, which have no start token."""
        ids: Any = self.tokenizer_3(prompt, truncation=True, max_length=T5_TOKENS)["input_ids"]
        middle, end = self.tokenizer.model_max_length, self.max_tokens
        return [TokenRun(0, 1, middle, self.tokens(prompt)), TokenRun(middle, middle, end, list(ids[:-1]))]

    # --- images ---

    def assembled(self, network: SD3Transformer2DModel, scheduler: Any) -> Any:
        """diffusers' pipeline of the model's parts with this transformer and scheduler."""
        parts: dict[str, Any] = {part: getattr(self, part) for part in self.parts if part != self.part}
        return StableDiffusion3Pipeline(**parts, transformer=network, scheduler=scheduler)


T5_TOKENS = 256  # that the pipeline reads where it is not told otherwise
