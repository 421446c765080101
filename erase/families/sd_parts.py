"""Reads the components of a Stable Diffusion 1 or 2 folder and checks each one and their fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from erase.errors import EraseError
from erase.families import architecture, components, unet_file, vocabulary
from erase.families.components import one_line


@dataclass(frozen=True)
class Parts:
    """The components in float32 on the CPU, and lines for the user about how they were loaded."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    notes: tuple[str, ...]


def read(source: str | Path, folder: Path, *, allow_pickle: bool, unet: str | Path | None) -> Parts:
    """The parts of a folder. unet: a file of UNet weights, all or some, that replace the folder's.

    Raises:
        EraseError: a part is missing, damaged or of another model.
    """
    network = components.load(UNet2DConditionModel, folder / "unet", allow_pickle=allow_pickle)
    vae = components.load(AutoencoderKL, folder / "vae", allow_pickle=allow_pickle)
    text_encoder = components.load(CLIPTextModel, folder / "text_encoder", allow_pickle=allow_pickle)
    _require_fit(source, folder, network.config, vae.config, text_encoder.config)
    tokenizer = vocabulary.load(folder / "tokenizer", text_encoder)
    scheduler = load_scheduler(folder)
    notes = [] if unet is None else unet_file.put_into(network, unet, allow_pickle=allow_pickle)
    _require_working(folder, network, vae, text_encoder, tokenizer)
    return Parts(network, vae, text_encoder, tokenizer, scheduler, tuple(notes))


def load_scheduler(folder: Path) -> SchedulerMixin:
    import diffusers

    class_name = architecture.components(folder).get("scheduler", "")
    cls: Any = getattr(diffusers, class_name, None) if class_name else None
    if not isinstance(cls, type) or not issubclass(cls, SchedulerMixin):
        raise EraseError(f"{folder}/model_index.json names the scheduler {class_name!r}, which diffusers does not have")
    config = folder / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        raise EraseError(f"cannot load {folder / 'scheduler'}: it has no scheduler_config.json; download it again")
    components.require_types(config, cls)
    try:
        scheduler: Any = cls.from_pretrained(folder, subfolder="scheduler", local_files_only=True)  # pyright: ignore
    except Exception as error:
        raise EraseError(f"cannot load {folder / 'scheduler'}: {one_line(error)}; download it again") from error
    _require_sampling(folder, cls.from_config(scheduler.config))  # pyright: ignore
    return scheduler


def _require_fit(source: str | Path, folder: Path, unet: Any, vae: Any, text: Any) -> None:
    """Raise an EraseError where the parts do not belong to one text-to-image Stable Diffusion 1 or 2."""
    if unet["in_channels"] != 4 or unet["cross_attention_dim"] != text.hidden_size:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion 1 or 2: its UNet takes {unet['in_channels']} channels "
            f"and text states of width {unet['cross_attention_dim']}, but its text encoder makes {text.hidden_size}"
        )
    if vae["latent_channels"] != 4 or unet["out_channels"] != 4:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion 1 or 2: its latents have {vae['latent_channels']} "
            f"channels and its UNet gives {unet['out_channels']} instead of 4"
        )
    require_values(folder, unet, vae)
    require_text_values(folder / "text_encoder", text)


def require_values(folder: Path, unet: Any, vae: Any) -> None:
    """Raise an EraseError where a config of UNet or VAE holds a number that nothing can be computed with."""
    for name in ("norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor"):
        if not unet[name] > 0:
            raise EraseError(f"{folder}/unet/config.json: {name} is {unet[name]}; it must be above 0")
    if not 1e-3 <= vae["scaling_factor"] <= 1e3:
        raise EraseError(
            f"{folder}/vae/config.json: scaling_factor is {vae['scaling_factor']}; it must be 0.001 to 1000 "
            "(0.18215 in Stable Diffusion 1 and 2)"
        )
    size = unet["sample_size"]
    if not isinstance(size, int) or not 0 < size <= 1024:
        raise EraseError(
            f"{folder}/unet/config.json: sample_size is {size!r:.40}; it must be a side in latents, 1 to 1024"
        )


def require_text_values(folder: Path, text: Any) -> None:
    """Raise an EraseError where a text encoder's config holds a number that nothing can be computed with."""
    eps = text.layer_norm_eps
    if not isinstance(eps, int | float) or not 0 < eps <= 1:
        raise EraseError(f"{folder}/config.json: layer_norm_eps is {eps!r:.40}; it must be above 0 and at most 1")
    if type(text.eos_token_id) is not int or not 0 <= text.eos_token_id < text.vocab_size:
        raise EraseError(
            f"{folder}/config.json: eos_token_id is {text.eos_token_id!r:.40}; it must be a token, 0 to "
            f"{text.vocab_size - 1}"
        )


def _require_sampling(folder: Path, scheduler: Any) -> None:
    """Raise an EraseError unless the scheduler takes two steps from noise that end in finite latents."""
    x = torch.linspace(-1, 1, 4 * 4 * 4).view(1, 4, 4, 4)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # schedulers of flows have none
    try:
        scheduler.set_timesteps(2)
        for t in scheduler.timesteps:
            noise = scale(x, t)
            x = scheduler.step(noise / 2, t, x, return_dict=False)[0]
        finite = bool(x.isfinite().all())
    except Exception as error:  # a scheduler of another kind, or numbers that it cannot compute with
        raise EraseError(
            f"{folder}/scheduler: {type(scheduler).__name__} cannot generate images with its scheduler_config.json "
            f"({one_line(error)}); download it again"
        ) from error
    if not finite:
        raise EraseError(f"{folder}/scheduler: its scheduler_config.json gives latents that are not finite")


def _require_working(folder: Path, network: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Raise an EraseError unless each part works; see `require_working`."""
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]

    def encoded() -> Tensor:
        return text_encoder(ids).last_hidden_state

    def predicted() -> Tensor:
        return network(LATENTS, TIMES, encoder_hidden_states=encoded()).sample

    def decoded() -> Tensor:
        return vae.decode(LATENTS).sample

    require_working(folder, {"text_encoder": encoded, "unet": predicted, "vae": decoded})


# two inputs that each part must tell apart
PROMPTS = ["a red circle", "two dogs"]
LATENTS = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
TIMES = torch.tensor([1, 900])


@torch.no_grad()
def require_working(folder: Path, passes: Mapping[str, Callable[[], Tensor]]) -> None:
    """Raise an EraseError for a part that gives the same for different inputs, or what is not finite.

    passes: part -> one small pass through it, of `PROMPTS` or 8 x 8 `LATENTS`.
    """
    for part, compute in passes.items():
        try:
            output = compute()
        except Exception as error:  # a config that fits the weights can still be wrong
            raise EraseError(f"{folder / part} cannot be used: {one_line(error)}; download the model again") from error
        if not output.isfinite().all():
            raise EraseError(f"{folder / part} computes values that are not finite; its config or weights are damaged")
        if torch.equal(output[0], output[1]) or (output[0] - output[1]).abs().max() < 1e-6 * output.abs().max():
            raise EraseError(f"{folder / part} gives the same for all inputs; its config or weights are damaged")


def require_schedule(name: str, alphas_cumprod: Tensor) -> None:
    """Raise an EraseError unless the noise grows over 1000 timesteps, from nearly none to nearly all."""
    ordered = bool((alphas_cumprod.diff() < 0).all()) and 0 <= alphas_cumprod[-1] and alphas_cumprod[0] < 1
    if len(alphas_cumprod) != 1000 or not ordered:
        raise EraseError(
            f"{name}: its scheduler_config.json gives {len(alphas_cumprod)} timesteps, alphas_cumprod from "
            f"{alphas_cumprod[0]:.3g} to {alphas_cumprod[-1]:.3g}; Stable Diffusion has 1000, falling from 1 to 0"
        )
