"""Stable Diffusion 1 and 2: how they add noise, predict, and generate."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from erase.concepts import refusal
from erase.conditioning import Conditioning
from erase.delta import State
from erase.errors import EraseError, missing
from erase.families import (
    architecture,
    checkpoint,
    compvis,
    layers,
    pipeline_folder,
    scope,
    sd_parts,
    single_file,
    supported,
)
from erase.families.components import one_line
from erase.families.latent import LatentFamily
from erase.families.modes import evaluating, predicting
from erase.families.protocol import Sampler
from erase.families.stored_unet import load_unet
from erase.families.supported import Model
from erase.files import read_json
from erase.guards import Guard
from erase.options.model_defaults import read_defaults


@dataclass
class StableDiffusion(LatentFamily):
    """Stable Diffusion 1 or 2, text to image.

    allow_pickle: how the parts were loaded, for when they are loaded again.
    unet_file: weights that replaced the folder's in the UNet; see `erase.families.unet_file`.
    """

    family = "sd"
    pipelines = ("StableDiffusionPipeline",)
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    data_parts = ("vae", "text_encoder")
    scopes = scope.SCOPES
    guidance_scale = 7.5
    tags = ("stable-diffusion",)
    licences = {"CompVis/stable-diffusion": "creativeml-openrail-m"}
    models = (
        Model("Stable Diffusion 1.1 to 1.5 and fine-tunes of it"),
        Model("Stable Diffusion 1 with an LCM-LoRA merged", guided=False, options=supported.DISTILLED),
        Model("Stable Diffusion 2.0 and 2.1, epsilon prediction", written=False),
        Model("Stable Diffusion 2.0 and 2.1, v prediction", written=False),
        Model("SD-Turbo", written=False, guided=False, options=supported.DISTILLED),
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
    unet_file: str | None = None
    notes: tuple[str, ...] = ()
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.vae_scale: int = 2 ** (len(self.vae.config["block_out_channels"]) - 1)  # also while the VAE is released
        noise: Any = DDPMScheduler.from_config(self.scheduler.config)  # pyright: ignore
        self.alphas_cumprod: Tensor = noise.alphas_cumprod
        self._alphas: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        sd_parts.require_schedule(self.name, self.alphas_cumprod)
        self.prediction_type: str = noise.config["prediction_type"]
        if self.prediction_type not in {"epsilon", "v_prediction"}:
            raise EraseError(f"{self.name} predicts {self.prediction_type!r}; only epsilon and v_prediction are known")

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
            unet_file=None if weights_file is None else str(weights_file),
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
        if cls._is_second(folder):
            return "Stable Diffusion 2 is written as a folder only (single files: Stable Diffusion 1 and XL)"
        return compvis.no_layout(read_json(folder / "unet" / "config.json"))

    @classmethod
    def checkpoint(cls, folder: Path, network: State | None = None) -> dict[str, Tensor]:
        return checkpoint.sd1(folder, network)

    @classmethod
    def keep(cls, pipeline: Any, cache_dir: Path | None = None) -> Path:
        return single_file.keep(pipeline, cls, cache_dir)

    @classmethod
    def needs_dtype(cls, folder: Path) -> bool:
        return pipeline_folder.needs_dtype(folder)

    def stored_network(self) -> UNet2DConditionModel:
        return self.read_network(self.folder, allow_pickle=self.allow_pickle, weights_file=self.unet_file)

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

    def predict(self, network: Any, x: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The noise that `network` sees in `x`; v predictions are converted: eps = sqrt(a) v + sqrt(1 - a) x."""
        output = network(x.to(self.unet.dtype), t, **self.inputs_of(x, c)).sample.float()
        if self.prediction_type == "epsilon":
            return output
        a = self._alphas_at(t, x)
        return a.sqrt() * output + (1 - a).sqrt() * x

    def inputs_of(self, x: Tensor, c: Conditioning) -> dict[str, Any]:
        """The UNet's arguments other than latents and timesteps."""
        return {"encoder_hidden_states": c.text_states.to(self.unet.dtype)}

    def add_noise(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x + sqrt(1 - a_t) eps, with diffusers' alphas_cumprod; t: int64, [n], 0 to 999."""
        a = self._alphas_at(t, x)
        return a.sqrt() * x + (1 - a).sqrt() * eps

    def _alphas_at(self, t: Tensor, x: Tensor) -> Tensor:
        """alphas_cumprod at timesteps t, [n, 1, 1, 1], with the dtype and on the device of x; copied there once."""
        where = x.device, x.dtype
        if where not in self._alphas:
            self._alphas[where] = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)
        return self._alphas[where][t][:, None, None, None]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
        """The text encoder's last hidden states, [len(prompts), tokens, d], on the CPU; see `Family.encode_text`."""
        refusal.refuse(prompts, "prompt")
        states = []
        for start in range(0, len(prompts), batch_size):
            ids = self._padded_tokens(prompts[start : start + batch_size])
            states.append(self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state.cpu())
        return Conditioning(torch.cat(states))

    def encode_tokens(self, tokens: Sequence[Sequence[int]], embeddings: Tensor | None = None) -> Conditioning:
        """The text encoder's last hidden states, [n, tokens, d]; see `Family.encode_tokens`."""
        empty = self._padded_tokens([""])[0].tolist()
        ids = torch.tensor([[empty[0], *row, *empty[1:]][: len(empty)] for row in tokens], device=self.device)

        def put(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if embeddings is None:
                return output
            return torch.cat([output[:, :1], embeddings, output[:, 1 + embeddings.shape[1] :]], 1)

        table: Any = self.text_encoder.get_input_embeddings()
        hook = table.register_forward_hook(put)
        try:
            return Conditioning(self.text_encoder(ids).last_hidden_state)
        finally:
            hook.remove()

    def text_of(self, tokens: Sequence[int]) -> str:
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    def _padded_tokens(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> Tensor:
        """int64, [len(prompts), tokens]."""
        how: dict[str, Any] = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        ids: Any = (tokenizer or self.tokenizer)(list(prompts), return_tensors="pt", **how)["input_ids"]
        return ids

    @property
    def text_encoders(self) -> Sequence[torch.nn.Module]:
        return (self.text_encoder,)

    @property
    def token_embeddings(self) -> Tensor:
        table: Any = self.text_encoder.get_input_embeddings()
        return table.weight

    def encode_with(self, prompts: Sequence[str], token: int, embedding: Tensor) -> Conditioning:
        refusal.refuse(prompts, "prompt")

        def put(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where((arguments[0] == token)[..., None], embedding, output)

        table: Any = self.text_encoder.get_input_embeddings()
        hook = table.register_forward_hook(put)
        try:
            return Conditioning(self.text_encoder(self._staged(self._padded_tokens(prompts))).last_hidden_state)
        finally:
            hook.remove()

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.model_max_length

    def tokens(self, prompt: str) -> list[int]:
        ids: Any = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens)["input_ids"]
        return list(ids[1:-1])

    def all_tokens(self, prompt: str) -> list[int]:
        ids: Any = self.tokenizer(prompt, verbose=False)["input_ids"]
        return list(ids[1:-1])

    def sampler(self, name: Sampler = "model") -> SchedulerMixin:
        """A fresh scheduler to draw with: the model's own, or DPM-Solver++ (Lu et al., 2022) for the same noise.

        The latter is what is known as DPM++ 2M Karras. Without Karras' spacing ten steps of it end no nearer to the
        exact solution than ten of DDIM (0.28 and 0.25 of its norm, embedded model); with it as near as 25 (0.03).
        """
        if name == "dpm++":
            return DPMSolverMultistepScheduler.from_config(self.scheduler.config, use_karras_sigmas=True)  # pyright: ignore
        return type(self.scheduler).from_config(self.scheduler.config)  # pyright: ignore

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        size: int | tuple[int, int],
        sampler: Sampler = "model",
        network: UNet2DConditionModel | None = None,
    ) -> Tensor:
        """Latents [n, 4, height / 8, width / 8], by diffusers' own pipeline; see `Family.draw`."""
        return self._drawn(
            prompts,
            network or self.unet,
            self.sampler(sampler),
            size=size,
            steps=steps,
            guidance=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )

    def draw_from(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        *,
        start: int,
        steps: int,
        guidance: float,
    ) -> Tensor:
        """By DDIM steps, whatever the model's own scheduler; see `Family.draw_from`."""
        scheduler: Any = self._ddim(self.prediction_type)
        every = scheduler.set_timesteps

        def set_timesteps(*arguments: Any, **more: Any) -> None:
            every(*arguments, **more)
            scheduler.timesteps = scheduler.timesteps[start:]

        scheduler.set_timesteps = set_timesteps
        height, width = (side * self.vae_scale for side in latents.shape[-2:])
        how: dict[str, Any] = {"size": (height, width), "steps": steps, "guidance": guidance}
        return self._drawn(prompts, self.unet, scheduler, latents=latents.to(self.device), **how)

    def _drawn(
        self,
        prompts: Sequence[str],
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        *,
        size: int | tuple[int, int],
        steps: int,
        guidance: float,
        **more: Any,
    ) -> Tensor:
        """Latents by diffusers' own pipeline. more: its further arguments."""
        refusal.refuse(prompts, "prompt")
        height, width = (size, size) if isinstance(size, int) else size
        pipeline = self.assembled(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        guarded = self.guard.on(pipeline) if self.guard else nullcontext()
        with evaluating(unet), predicting(unet, self.precision), guarded:
            return pipeline(
                list(prompts),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
                return_dict=False,
                **more,
            )[0].cpu()  # pyright: ignore

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

    def _ddim(self, prediction_type: str) -> DDIMScheduler:
        """DDIM steps on the model's schedule, for predictions of this type.

        Timesteps begin at the last one, 999, if the model's own do: distilled models such as Turbo, Lightning and LCM.
        """
        own: Any = self.scheduler
        is_trailing = own.config.get("timestep_spacing") == "trailing" or isinstance(own, LCMScheduler | TCDScheduler)
        spacing = "trailing" if is_trailing else "leading"
        how: dict[str, Any] = {"clip_sample": False, "timestep_spacing": spacing}
        return DDIMScheduler.from_config(own.config, prediction_type=prediction_type, **how)  # pyright: ignore

    def times(self, steps: int) -> Tensor:
        scheduler: Any = self._ddim(self.prediction_type)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, index: Tensor, c: Conditioning, empty: Conditioning, *, steps: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """By DDIM steps, whatever the model's own scheduler; see `Family.trajectory`."""
        guidance = max(guidance, 1)  # 0 is none too, as in diffusers
        scheduler = self._ddim("epsilon")
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.timesteps
        index = index.cpu()
        x, c, empty = self._staged(x.clone()), c.each(self._staged), empty.each(self._staged)
        with evaluating(self.unet), predicting(self.unet, self.precision):
            for number, time in enumerate(times[: int(index.max())].tolist()):
                rows = self._staged((index > number).nonzero().view(-1))
                t = torch.full((2 * len(rows),), time, device=self.device)
                both = Conditioning.cat([empty.expand(len(rows)), c[rows]])
                unconditional, conditional = self(x[rows].repeat(2, 1, 1, 1), t, both).chunk(2)
                eps = unconditional + guidance * (conditional - unconditional)
                x[rows] = scheduler.step(eps, time, x[rows]).prev_sample  # pyright: ignore
        return x, self._staged(times[index])

    def attention(self, x: Tensor, t: Tensor, c: Conditioning) -> list[Tensor]:
        """Probabilities of every cross-attention layer, [n * heads, queries, tokens] each, with their gradients.

        Fused kernels never hold these, so for this pass the plain processor takes their place; nor does checkpointing.
        """
        from diffusers.models.attention_processor import AttnProcessor

        found: list[Tensor] = []
        layers: Any = {name: m for name, m in self.unet.named_modules() if name.endswith("attn2")}
        before = {name: layer.processor for name, layer in layers.items()}
        checkpointing = self.unet.is_gradient_checkpointing

        def keep(layer: Any) -> Any:
            plain = type(layer).get_attention_scores

            def scores(*arguments: Any) -> Tensor:
                found.append(plain(layer, *arguments))
                return found[-1]

            return scores

        try:
            for layer in layers.values():
                layer.processor, layer.get_attention_scores = AttnProcessor(), keep(layer)
            self.unet.disable_gradient_checkpointing()
            self(x, t, c)
        finally:
            for name, layer in layers.items():
                layer.processor = before[name]
                layer.__dict__.pop("get_attention_scores", None)
            if checkpointing:
                self.unet.enable_gradient_checkpointing()
        return found

    def use_attention(self, kind: str) -> None:
        """`sdpa` is what diffusers does by itself; `xformers` needs its package and a GPU that it has kernels for."""
        if kind != "xformers":
            return
        if self.device.type != "cuda":
            raise EraseError(f"xformers needs a CUDA device but the model is on {self.device}; leave out --attention")
        try:
            self.unet.enable_xformers_memory_efficient_attention()
        except ModuleNotFoundError as error:
            raise missing("xformers") from error
        except Exception as error:  # diffusers tries the kernels out, and they fail in their own ways
            raise EraseError(f"xformers cannot be used here ({one_line(error)}); leave out --attention") from error
