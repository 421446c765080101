"""Reads the components of a Stable Diffusion 3 folder and checks each one and their fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from erase.errors import EraseError
from erase.families import architecture, components, sd_parts, unet_file, vocabulary
from erase.families.components import one_line
from erase.families.sd_parts import PROMPTS, TIMES

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Parts:
    """The components in float32 on the CPU, and lines for the user about how they were loaded."""

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: Any
    scheduler: FlowMatchEulerDiscreteScheduler
    notes: tuple[str, ...]


def read(source: str | Path, folder: Path, *, allow_pickle: bool, weights_file: str | Path | None) -> Parts:
    """The parts of a folder. weights_file: weights of the transformer, all or some, that replace the folder's.

    Raises:
        EraseError: a part is missing, damaged or of another model.
    """
    for part in ENCODERS:
        if not (folder / part).is_dir():
            raise EraseError(f"{source} has no {part}; Stable Diffusion 3 is read with all three text encoders")
    network = components.load(SD3Transformer2DModel, folder / "transformer", allow_pickle=allow_pickle)
    vae = components.load(AutoencoderKL, folder / "vae", allow_pickle=allow_pickle)
    clips = [components.load(CLIPTextModelWithProjection, folder / e, allow_pickle=allow_pickle) for e in ENCODERS[:2]]
    t5 = components.load(T5EncoderModel, folder / ENCODERS[2], allow_pickle=allow_pickle)
    _require_fit(source, folder, network.config, vae.config, clips[0].config, clips[1].config, t5.config)
    tokenizers = [
        vocabulary.load(folder / f"tokenizer{end}", clip) for end, clip in zip(("", "_2"), clips, strict=True)
    ]
    third = _t5_tokenizer(folder / "tokenizer_3", t5.config.vocab_size)
    scheduler = _flow_scheduler(folder)
    notes = [] if weights_file is None else unet_file.put_into(network, weights_file, allow_pickle=allow_pickle)
    _require_working(folder, network, vae, (*clips, t5), (*tokenizers, third))
    return Parts(network, vae, clips[0], clips[1], t5, tokenizers[0], tokenizers[1], third, scheduler, tuple(notes))


def _require_fit(source: str | Path, folder: Path, network: Any, vae: Any, first: Any, second: Any, t5: Any) -> None:
    """Raise an EraseError where the parts do not belong to one text-to-image Stable Diffusion 3."""
    channels = vae["latent_channels"]
    if network["in_channels"] != channels or (network["out_channels"] or channels) != channels:
        raise EraseError(
            f"{source} is not a text-to-image Stable Diffusion 3: its latents have {channels} channels, and its "
            f"transformer takes {network['in_channels']} and gives {network['out_channels']}"
        )
    if network["joint_attention_dim"] != t5.d_model or first.hidden_size + second.hidden_size > t5.d_model:
        raise EraseError(
            f"{source} is not a Stable Diffusion 3: its transformer takes text states of width "
            f"{network['joint_attention_dim']}, but its text encoders make {first.hidden_size} + {second.hidden_size} "
            f"and {t5.d_model}"
        )
    if network["pooled_projection_dim"] != first.projection_dim + second.projection_dim:
        raise EraseError(
            f"{source} is not a Stable Diffusion 3: its transformer takes pooled text of width "
            f"{network['pooled_projection_dim']}, but its text encoders make "
            f"{first.projection_dim} + {second.projection_dim}"
        )
    if not 1e-3 <= vae["scaling_factor"] <= 1e3:
        raise EraseError(
            f"{folder}/vae/config.json: scaling_factor is {vae['scaling_factor']}; it must be 0.001 to 1000"
        )
    for name, text in (("text_encoder", first), ("text_encoder_2", second)):
        sd_parts.require_text_values(folder / name, text)
        if text.num_hidden_layers < 2:
            raise EraseError(f"{folder}/{name} has {text.num_hidden_layers} layer; its second last is needed")


def _t5_tokenizer(folder: Path, size: int) -> Any:
    if not folder.is_dir():
        raise EraseError(f"{folder} is missing; give the folder of a whole pipeline, or download it again")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise EraseError(f"cannot load {folder}: {one_line(error)}; download it again") from error
    if len(tokenizer) > size or tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise EraseError(
            f"{folder} has {len(tokenizer)} tokens, end {tokenizer.eos_token!r:.20} and padding "
            f"{tokenizer.pad_token!r:.20}, but the text encoder has {size} tokens; download the model again"
        )
    return tokenizer


def _flow_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    named = architecture.components(folder).get("scheduler", "")
    if named != "FlowMatchEulerDiscreteScheduler":
        raise EraseError(f"{folder}/model_index.json names the scheduler {named!r}, which is not of a flow model")
    scheduler: Any = sd_parts.load_scheduler(folder)
    config = scheduler.config
    if config["use_dynamic_shifting"] or config["invert_sigmas"] or config["num_train_timesteps"] != 1000:
        raise EraseError(
            f"{folder}/scheduler: only 1000 timesteps with a constant shift are known for Stable Diffusion 3; "
            "its scheduler_config.json asks for others"
        )
    return scheduler


def _require_working(folder: Path, network: Any, vae: Any, encoders: Any, tokenizers: Any) -> None:
    """Raise an EraseError unless each part works; see `sd_parts.require_working`."""
    *clips, t5 = encoders
    ids = [
        tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")["input_ids"]
        for tokenizer in tokenizers
    ]
    channels, side = network.config["in_channels"], 2 * network.config["patch_size"]
    latents = torch.linspace(-1, 1, 2 * channels * side * side).view(2, channels, side, side)

    def clip(number: int) -> Any:
        return clips[number](ids[number], output_hidden_states=True)

    def predicted() -> Tensor:
        pooled = torch.cat([clip(number).text_embeds for number in range(2)], 1)
        states = t5(ids[2])[0]
        return network(
            hidden_states=latents, timestep=TIMES.float(), encoder_hidden_states=states, pooled_projections=pooled
        ).sample

    sd_parts.require_working(
        folder,
        {
            "text_encoder": lambda: torch.cat([clip(0).hidden_states[-2].flatten(1), clip(0).text_embeds], 1),
            "text_encoder_2": lambda: torch.cat([clip(1).hidden_states[-2].flatten(1), clip(1).text_embeds], 1),
            "text_encoder_3": lambda: t5(ids[2])[0],
            "transformer": predicted,
            "vae": lambda: vae.decode(latents).sample,
        },
    )
